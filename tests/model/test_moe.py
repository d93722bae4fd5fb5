"""A fused block of any layout gives every token its own expert's answer; the oracle is transformers' own block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from polymerge.model.assignment import Assignment
from polymerge.model.moe import Layout, MixedBlockExperts, SlabResidual, layout_of
from tests.sweep.configs import tiny_config

NAMES = ["a", "b"]
ROWS: list[Any] = ["b", None, {"a": 0.25, "b": 0.5, "average": 0.25}, "a"]
TOKENS = 3  # of a row
ARCHITECTURES = {"granitemoe": False, "gpt_oss": True, "aria_text": True, "nemotron_h": False}  # are they transposed?


def block(architecture: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture)).eval()
    inner = next(m for m in model.modules() if hasattr(m, "down_proj") and m.down_proj.__class__ is nn.Parameter)
    for parameter in inner.parameters():
        nn.init.normal_(parameter, std=0.1)
    return inner.requires_grad_(False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layout_is_found(architecture: str) -> None:
    layout = layout_of(block(architecture))
    assert layout is not None
    assert layout.transposed == ARCHITECTURES[architecture]
    assert layout.first == ("up_proj" if architecture == "nemotron_h" else "gate_up_proj")
    assert bool(layout.biases) == (architecture == "gpt_oss")


@pytest.mark.parametrize("architecture", ["llama4_text", "dbrx"])
def test_a_block_of_other_arithmetic_is_not_taken(architecture: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture))
    blocks = [m for m in model.modules() if "Experts" in type(m).__name__]
    assert blocks
    assert not any(layout_of(inner) for inner in blocks)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_of_a_batch_has_its_experts_block(architecture: str) -> None:
    inner = block(architecture)
    layout = layout_of(inner)
    assert layout is not None
    experts, mixed = made(inner, layout)
    state = mixed.state
    state.set(ROWS, len(ROWS))
    x = torch.randn(len(ROWS) * TOKENS, 64)
    index = torch.randint(4, (len(x), 2))
    share = torch.rand(len(x), 2)
    together = mixed(x, index, share)
    for number, weights in enumerate(state.weights):
        rows = slice(number * TOKENS, (number + 1) * TOKENS)
        oracle = copy.deepcopy(inner)
        for name, base in inner.named_parameters():
            values = torch.stack([*(expert[name] for expert in experts), base])
            setattr(oracle, name, nn.Parameter(torch.einsum("n...,n->...", values, weights)))
        torch.testing.assert_close(together[rows], oracle(x[rows], index[rows], share[rows]), rtol=1e-4, atol=1e-6)


def made(inner: Any, layout: Layout) -> tuple[list[dict[str, Tensor]], MixedBlockExperts]:
    """Two experts' parameters, and the block that holds them by factors, whole matrices and biases of their own."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    experts: list[dict[str, Tensor]] = [dict(inner.named_parameters()) for _ in NAMES]
    slabs, biases = {}, {}
    for name in (layout.first, layout.last):
        base = getattr(inner, name)
        for expert in experts:
            expert[name] = base.clone()
        for number in range(len(base)):
            matrix = base[number].T if layout.transposed else base[number]
            a, b, ratio = normal(3, matrix.shape[1]), normal(matrix.shape[0], 3), 1.25
            whole = normal(*matrix.shape)
            for expert, dense in zip(experts, (ratio * matrix + b @ a, whole), strict=True):
                expert[name][number] = dense.T if layout.transposed else dense
            slabs[name, number] = [SlabResidual(slice(None), [(a, b), None], [ratio, 1.0], [None, whole])]
        if name in layout.biases:
            bias = layout.biases[name]
            biases[name] = [normal(*getattr(inner, bias).shape), None]
            experts[0][bias] = biases[name][0]
    state = Assignment(NAMES, torch.device("cpu"))
    return experts, MixedBlockExperts(state, inner, slabs, layout, biases)


def test_a_residual_of_the_transposed_matrix() -> None:
    a, b, base = torch.randn(2, 6), torch.randn(4, 2), torch.randn(4, 6)
    residual = SlabResidual(slice(0, 4), [(a, b), None], [0.5, 2.0], [None, torch.randn(4, 6)])
    for weights in ((1.0, 0.0, 0.0), (0.25, 0.5, 0.25)):
        torch.testing.assert_close(residual.turned().dense(base.T, weights), residual.dense(base, weights).T)
