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
