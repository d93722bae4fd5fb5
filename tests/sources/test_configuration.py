"""What a configuration says of the forward pass, key by key."""

from __future__ import annotations

from polymerge.sources.configuration import first_difference, settings_of


def test_a_table_by_number_is_compared_like_one_by_name() -> None:
    """As a file has it: JSON knows no numbers for keys. Aria's projector has such a table."""
    plain = {"model_type": "aria", "projector": {1225: 128, 4900: 256}}
    assert settings_of(plain) == settings_of({"model_type": "aria", "projector": {"1225": 128, "4900": 256}})
    other = {"model_type": "aria", "projector": {1225: 128, 4900: 255}}
    assert first_difference(settings_of(plain), settings_of(other)) == "projector.4900"


def test_what_only_sounds_like_a_setting_of_the_run_is_compared() -> None:
    """xLSTM's cap of its logits and Muse's multiplier begin as `output_attentions` does."""
    config = {"output_attentions": True, "output_logit_soft_cap": 30.0, "output_multiplier": 2.0}
    assert settings_of(config) == {"output_logit_soft_cap": 30.0, "output_multiplier": 2.0}


def test_a_number_is_the_one_that_32_bits_hold() -> None:
    """transformers reads 9.999999747378752e-06 from a GGUF file whose model's own configuration says 1e-05."""
    assert first_difference({"rms_norm_eps": 1e-05}, {"rms_norm_eps": 9.999999747378752e-06}) is None
    assert first_difference({"rms_norm_eps": 1e-05}, {"rms_norm_eps": 1.000001e-05}) == "rms_norm_eps"
    assert first_difference({"attn_scale": 1e300}, {"attn_scale": 2e300}) == "attn_scale"
