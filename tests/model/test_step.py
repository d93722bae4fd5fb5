"""A step of fixed shapes against the model's own forward, on the CPU, where it is run and not captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from polymerge import load_model
from polymerge.model.mixed import MixedModel
from polymerge.model.step import FixedStep, Row
from tests.conftest import Merged
from tests.tiny import VOCAB

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS, WIDTH, COLUMNS, PLACES = (9, 5, 7), 9, 16, 4
FIRST, SECOND = ["e1", None, "e0"], ["e2", "e2", "e1"]


class Read:
    """Three prompts of different lengths, padded on the left and read by their experts."""

    def __init__(self, model: MixedModel, experts: list[str | None]) -> None:
        ids = torch.randint(3, VOCAB, (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(0))
        self.model, self.experts = model, experts
        self.starts = [WIDTH - length for length in LENGTHS]
        self.mask = (torch.arange(WIDTH) >= torch.tensor(self.starts)[:, None]).long()
        self.cache: Any = DynamicCache()
        places = (self.mask.cumsum(1) - 1).clamp(min=0)
        model(ids, experts=experts, attention_mask=self.mask, position_ids=places, past_key_values=self.cache)

    def views(self) -> list[Any]:
        """Buffers with one row more than is read and room for some columns."""
        pairs = []
        for layer in self.cache.layers:
            buffers = [torch.zeros(PLACES, k.shape[1], COLUMNS, k.shape[3]) for k in (layer.keys, layer.values)]
            for buffer, kept in zip(buffers, (layer.keys, layer.values), strict=True):
                buffer[: len(LENGTHS), :, :WIDTH] = kept
            pairs.append(tuple(buffers))
        return pairs

    def rows(self, tokens: list[int], after: int) -> list[Row]:
        numbers = {name: n for n, name in enumerate([*self.model.experts, None])}
        each = zip(tokens, LENGTHS, self.starts, self.experts, strict=True)
        return [Row(token, length + after, start, numbers[expert]) for token, length, start, expert in each]

    def expected(self, tokens: list[int], after: int) -> torch.Tensor:
        """By the model itself, one token further."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        places = torch.tensor(LENGTHS)[:, None] + after
        ids = torch.tensor(tokens)[:, None]
        logits: torch.Tensor = self.model(
            ids, experts=self.experts, attention_mask=self.mask, position_ids=places, past_key_values=self.cache
        ).logits
        return logits[:, -1]


@pytest.mark.parametrize("rate", [0.0, 0.6])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "qwen3", "phi3", "gpt2"])
@torch.inference_mode()
def test_it_gives_the_forwards_logits_whoever_the_rows_experts_are(
    merged: Merged, architecture: str, rate: float
) -> None:
    model = load_model(merged(architecture, compress_rate=rate)[0])
    first, second = Read(model, list(FIRST)), Read(model, list(SECOND))
    layers = first.views()
    step = FixedStep(model.hf, layers, model.assignment, mixed=True)
    for read in (first, second):  # one step for both batches
        for mine, theirs in zip(layers, read.views(), strict=True):
            for buffer, values in zip(mine, theirs, strict=True):
                buffer.copy_(values)
        for after, tokens in enumerate([[5, 6, 7], [50, 40, 30]]):
            got = step.run(read.rows(tokens, after), WIDTH + after).clone()
            torch.testing.assert_close(got, read.expected(tokens, after), rtol=1e-4, atol=1e-4)
    assert not model.assignment.fixed and model.assignment.average_only


@torch.inference_mode()
def test_rows_of_the_average_alone_take_the_plain_path(merged: Merged) -> None:
    model = load_model(merged("llama", compress_rate=0.6)[0])
    read = Read(model, [None] * 3)
    step = FixedStep(model.hf, read.views(), model.assignment, mixed=False)
    got = step.run(read.rows([5, 6, 7], 0), WIDTH)
    torch.testing.assert_close(got, read.expected([5, 6, 7], 0), rtol=1e-5, atol=1e-5)


def test_whoever_reads_the_rows_experts_on_the_host_is_named(merged: Merged) -> None:
    assert load_model(merged("llama")[0]).step_objection() is None
    assert "MixedBlockExperts" in str(load_model(merged("mixtral")[0]).step_objection())
