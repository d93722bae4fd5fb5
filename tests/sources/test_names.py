"""Bare against prefixed names, and buffers of old checkpoints: no difference between two experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from polymerge import merge
from polymerge.errors import SourceError
from polymerge.merging.sources import verify
from polymerge.sources.opening import open_checkpoint
from tests.sources.reading import assert_reads_fresh
from tests.tiny import make_experts

Checkpoints = Callable[[str], dict[str, Path]]
MASK = torch.ones(1, 1, 128, 128).tril()


def rewritten(folder: Path, rename: Callable[[str], str], extra: dict[str, torch.Tensor]) -> Path:
    """The folder's weights under other names, with tensors that lie beside them."""
    file = folder / "model.safetensors"
    tensors = {rename(name): value for name, value in load_file(file).items()}
    save_file({**tensors, **extra}, file, {"format": "pt"})
    return folder


OLD = {
    "gpt2": {
        "h.0.attn.bias": MASK,
        "h.1.attn.bias": MASK.to(torch.uint8),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    },
    "gpt-neox": {
        "gpt_neox.layers.0.attention.bias": MASK.bool(),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
    },
    "llama": {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "model.rotary_emb.inv_freq": torch.ones(6),
    },
}
PREFIX = {"gpt2": "transformer.", "gpt-neox": "gpt_neox.", "llama": "model."}


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("architecture", OLD)
def test_an_old_checkpoint_is_the_same_expert(tmp_path: Path, architecture: str, bare: bool) -> None:
    experts = make_experts(architecture, tmp_path)
    originals = {name: load_file(path / "model.safetensors") for name, path in experts.items()}
    prefix = PREFIX[architecture] if bare else ""
    extra = {name.removeprefix(prefix) if bare else name: value.clone() for name, value in OLD[architecture].items()}
    rewritten(experts["e0"], lambda name: name.removeprefix(prefix), extra)
    checkpoint = open_checkpoint(experts["e0"])
    assert list(checkpoint.tensors) == list(open_checkpoint(experts["e1"]).tensors)
    for name, value in originals["e0"].items():
        assert torch.equal(checkpoint.read(name), value) and torch.equal(checkpoint.read_rows(name, 1, 3), value[1:3])
    assert_reads_fresh(checkpoint)
    for order in (["e0", "e1"], ["e1", "e0"]):
        bundle = merge(
            {"experts": {name: str(experts[name]) for name in order}, "compress_rate": 0.0}, tmp_path / "".join(order)
        )
        for name in order:
            for tensor, value in originals[name].items():
                assert torch.equal(bundle.reconstruct(name, tensor), value), (name, tensor)
        assert verify(bundle, sources=True).ok


def test_a_bare_backbone_is_what_transformers_saves_of_it(tmp_path: Path) -> None:
    """GPT-2 on the hub was saved from GPT2Model."""
    folder = make_experts("gpt2", tmp_path, count=1)["e0"]
    original = transformers.AutoModelForCausalLM.from_pretrained(folder)
    original.transformer.save_pretrained(tmp_path / "bare")
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    assert list(open_checkpoint(tmp_path / "bare").tensors) == list(open_checkpoint(folder).tensors)


def test_a_bias_that_the_architecture_does_not_know_is_no_buffer(tmp_path: Path) -> None:
    folder = make_experts("gpt2", tmp_path, count=1)["e0"]
    rewritten(folder, str, {"transformer.h.0.attn.bias": torch.ones(48)})
    assert "transformer.h.0.attn.bias" in open_checkpoint(folder).tensors


def test_names_of_an_unknown_architecture_stay(tmp_path: Path) -> None:
    save_file({"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "of-nobody"}')
    assert list(open_checkpoint(tmp_path).tensors) == ["layers.0.self_attn.rotary_emb.inv_freq"]


def test_two_tensors_for_one_name_are_refused(tmp_path: Path) -> None:
    folder = make_experts("gpt2", tmp_path, count=1)["e0"]
    rewritten(folder, str, {"h.0.attn.c_attn.bias": torch.ones(144)})
    with pytest.raises(SourceError, match=r"'h\.0\.attn\.c_attn\.bias'.*'transformer\.h\.0\.attn\.c_attn\.bias'"):
        open_checkpoint(folder)
