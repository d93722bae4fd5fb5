"""Experts whose positions differ: every row of a mixed batch is what its original gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from polymerge import load_model, merge
from polymerge.errors import ModelError, SourceError
from polymerge.merging.grow import add_expert, remove_expert
from tests.tiny import ARCHITECTURES, COMMON, make_experts

LENGTHS = (9, 5, 9, 7, 6)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 128},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, **LLAMA3}},
    # beyond 4 positions its frequencies change with the longest row
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "max_position_embeddings": 4,
    },
}


def experts_with(architecture: str, folder: Path, settings: list[dict[str, Any]]) -> dict[str, Path]:
    """Experts that share an architecture, with these settings in place of its own."""
    experts = make_experts(architecture, folder, count=len(settings))
    for path, changes in zip(experts.values(), settings, strict=True):
        config = hf.AutoConfig.from_pretrained(path)
        for name, value in changes.items():
            setattr(config, name, value)
        config.save_pretrained(path)
    return experts


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 90, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, : max(LENGTHS) - length] = 0
    return ids, mask


def bundle_of(experts: dict[str, Path], folder: Path, **settings: Any) -> Any:
    sources = {name: str(path) for name, path in experts.items()}
    return merge({"experts": sources, "compress_rate": 0.0, **settings}, folder / "bundle")


def check_rows(model: Any, experts: dict[str, Path], rows: list[str]) -> None:
    """The batch, then a step with the cache, against each original that runs its own rows alone."""
    ids, mask = batch()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    following = torch.arange(20, 20 + len(rows))[:, None]
    longer = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], dim=1)
    for with_places in (True, False):  # without, transformers makes one row of positions for all
        given = {"position_ids": places} if with_places else {}
        step = {"position_ids": places[:, -1:] + 1} if with_places else {}
        with torch.no_grad():
            first = model(ids, attention_mask=mask, experts=rows, use_cache=True, **given)
            cached = {"past_key_values": first.past_key_values, "attention_mask": longer}
            second = model(following, experts=rows, **cached, **step).logits
        for name, path in experts.items():
            numbers = torch.tensor([number for number, row in enumerate(rows) if row == name], dtype=torch.long)
            if not len(numbers):
                continue
            original = hf.AutoModelForCausalLM.from_pretrained(path).eval()
            some, later = ({key: value[numbers] for key, value in part.items()} for part in (given, step))
            with torch.no_grad():
                one = original(ids[numbers], attention_mask=mask[numbers], use_cache=True, **some)
                two = original(
                    following[numbers], attention_mask=longer[numbers], past_key_values=one.past_key_values, **later
                ).logits
            seen = mask[numbers].bool()
            torch.testing.assert_close(first.logits[numbers][seen], one.logits[seen], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(second[numbers], two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ROPES)
def test_rows_have_the_positions_of_their_expert(tmp_path: Path, kind: str) -> None:
    experts = experts_with("llama", tmp_path, [{}, ROPES[kind], {}])
    bundle = bundle_of(experts, tmp_path)
    assert [bundle.manifest.experts[name].persona for name in experts] == [(), ("positions",), ()]
    check_rows(load_model(bundle, device="cpu"), experts, ["e0", "e1", "e2", "e1", "e0"])


def test_three_kinds_of_positions_in_one_batch(tmp_path: Path) -> None:
    experts = experts_with("llama", tmp_path, [ROPES["linear"], ROPES["theta"], ROPES["yarn"]])
    model = load_model(bundle_of(experts, tmp_path), device="cpu")
    check_rows(model, experts, ["e0", "e1", "e2", "e1", "e0"])
    check_rows(model, experts, ["e1"] * 5)


def test_positions_that_depend_on_the_layer(tmp_path: Path) -> None:
    other = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    }
    config = hf.Gemma3TextConfig(
        **COMMON, head_dim=12, sliding_window=64, layer_types=["sliding_attention", "full_attention"]
    )
    experts = make_experts("gemma3", tmp_path, count=2, config=config)
    config.rope_parameters = other
    config.architectures = ["Gemma3ForCausalLM"]
    config.save_pretrained(experts["e1"])
    check_rows(load_model(bundle_of(experts, tmp_path), device="cpu"), experts, ["e0", "e1", "e1", "e0", "e1"])


def test_the_average_has_the_first_expert_s_positions(tmp_path: Path) -> None:
    experts = experts_with("llama", tmp_path, [{}, ROPES["theta"]])
    bundle = bundle_of(experts, tmp_path, compress_rate=0.9)
    average = hf.AutoModelForCausalLM.from_pretrained(bundle.path).eval()
    ids, mask = batch()
    with torch.no_grad():
        rows = load_model(bundle, device="cpu")(ids, attention_mask=mask, experts=[None, "e1", None, "e1", "e1"]).logits
        expected = average(ids[::2], attention_mask=mask[::2]).logits
    torch.testing.assert_close(rows[:3:2][mask[:3:2].bool()], expected[:2][mask[:3:2].bool()], rtol=1e-4, atol=1e-4)
    assert any("the average has what 'e0' has" in note for note in bundle.manifest.notes)


def test_generate_with_beams_follows_the_rows(tmp_path: Path) -> None:
    experts = experts_with("llama", tmp_path, [{}, ROPES["theta"]])
    model = load_model(bundle_of(experts, tmp_path), device="cpu")
    ids, mask = batch()
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    rows = ["e0", "e1", "e1", "e0", "e1"]
    mixed = model.generate(ids, attention_mask=mask, experts=rows, **options)
    for name, path in experts.items():
        numbers = [number for number, row in enumerate(rows) if row == name]
        original = hf.AutoModelForCausalLM.from_pretrained(path).eval()
        assert torch.equal(mixed[numbers], original.generate(ids[numbers], attention_mask=mask[numbers], **options))


def test_a_mixture_of_other_positions_is_refused(tmp_path: Path) -> None:
    experts = experts_with("llama", tmp_path, [{}, ROPES["theta"], {}])
    model = load_model(bundle_of(experts, tmp_path), device="cpu")
    model.check_experts({"e0": 0.5, "e2": 0.5})
    for mixture in ({"e0": 0.5, "e1": 0.5}, {"average": 0.5, "e1": 0.5}):
        with pytest.raises(ModelError, match=r"positions.*'e1'|'e1'.*positions"):
            model.check_experts(mixture)


@pytest.mark.parametrize(
    ("architecture", "change", "reason"),
    [
        ("bloom", {"max_position_embeddings": 64}, "no module that makes positions"),
        ("deepseek", {"rope_parameters": {**YARN, "mscale_all_dim": 1.0}}, "reads scaling as well"),
        ("gpt-neox", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "other dimensions"),
    ],
)
def test_what_cannot_follow_the_rows_is_refused(
    tmp_path: Path, architecture: str, change: dict[str, Any], reason: str
) -> None:
    configs = {
        "bloom": lambda: hf.BloomConfig(vocab_size=96, hidden_size=48, n_layer=2, n_head=4),
        "deepseek": lambda: hf.DeepseekV2Config(
            **COMMON, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=2,
        ),
        "gpt-neox": ARCHITECTURES["gpt-neox"],
    }  # fmt: skip
    experts = make_experts(architecture, tmp_path, count=2, config=configs[architecture]())
    config = hf.AutoConfig.from_pretrained(experts["e1"])
    for name, value in change.items():
        setattr(config, name, value)
    config.save_pretrained(experts["e1"])
    with pytest.raises(SourceError, match=rf"'e0' and expert 'e1' differ in .*{reason}"):
        bundle_of(experts, tmp_path)


def test_an_added_expert_brings_its_positions(tmp_path: Path) -> None:
    experts = experts_with("llama", tmp_path, [{}, {}, ROPES["linear"]])
    bundle = bundle_of({name: experts[name] for name in ("e0", "e1")}, tmp_path)
    assert bundle.manifest.format_version == 1
    added = add_expert(bundle, "e2", experts["e2"])
    assert added.persona == ("positions",) and added.bundle.manifest.format_version == 3
    check_rows(load_model(added.bundle, device="cpu"), experts, ["e0", "e2", "e1", "e2", "e2"])
    assert remove_expert(added.bundle, "e2").manifest.format_version == 1
