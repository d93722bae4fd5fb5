"""How an answer goes on and when it ends: the next token of single rows, their stop texts and budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import GenerateRequest

# A temperature under this is greedy: dividing by it leaves the range of numbers.
COLDEST = 1e-4
# The nucleus is looked for among so many of the likeliest tokens before the whole vocabulary is sorted.
NUCLEUS = 256


class StopTexts:
    """A stopping criterion of transformers: a row is done at one of its stop texts or at its own budget of tokens.

    Args:
        stops, budgets: of every row.
        start: tokens of the padded prompts.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[Sequence[str]], budgets: Sequence[int], start: int) -> None:
        self._tokenizer, self._stops, self._budgets, self._start = tokenizer, stops, budgets, start
        self._any = any(stops)

    def __call__(self, ids: Tensor, scores: Any = None, **_: Any) -> Tensor:
        """ids [B, T] -> bool [B]"""
        made = ids.shape[1] - self._start
        done = [made >= budget for budget in self._budgets]
        if self._any:
            for row, stops in enumerate(self._stops):
                if stops and not done[row]:
                    done[row] = first_stop(self._tokenizer.decode(ids[row, self._start :]), stops)[1]
        return torch.tensor(done, device=ids.device)


def first_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before its first stop text, and whether there was one."""
    found = [place for place in (text.find(stop) for stop in stops if stop) if place >= 0]
    return (text[: min(found)], True) if found else (text, False)


def choose_tokens(
    logits: Tensor, requests: Sequence[GenerateRequest], generators: Sequence[torch.Generator]
) -> list[int]:
    """The next token of every row, each by its own request.

    A row that samples takes one number from its own generator, so a seeded answer is the same whatever else runs.

    Args:
        logits: [B, V].
        generators: of every row, on the CPU; used where the row samples.
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for row, (request, generator) in enumerate(zip(requests, generators, strict=True)):
        if request.temperature >= COLDEST:
            tokens[row] = _sample(logits[row], request.temperature, request.top_p, generator)
    return tokens


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token of the likeliest ones that make up `top_p`. logits [V]"""
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    draw = torch.rand((), generator=generator, dtype=torch.float64).to(logits.device)
    if top_p >= 1:
        return _drawn(probabilities, draw)
    few = min(NUCLEUS, len(probabilities))
    values, tokens = probabilities.topk(few)
    if few < len(probabilities) and values.sum() < top_p:
        values, tokens = probabilities.sort(descending=True)
    before = values.cumsum(0) - values
    values = values[: max(1, int((before < top_p).sum()))]  # the token that crosses the share belongs to it
    return int(tokens[_drawn(values, draw)])


def _drawn(weights: Tensor, draw: Tensor) -> int:
    """The place at which a number in [0, 1) falls. weights [K], at least one over 0"""
    sums = weights.cumsum(0)
    return min(int(torch.searchsorted(sums, draw * sums[-1], right=True)), len(weights) - 1)
