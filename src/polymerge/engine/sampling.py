"""How an answer goes on: the next token of single rows, each by its own request. All loops of this process ask here.

Knows logits, requests and random numbers. Does not know text, ends or batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .base import GenerateRequest

# The nucleus is looked for among so many of the likeliest tokens before the whole vocabulary is sorted.
NUCLEUS = 256


class Sampler:
    """What one answer's tokens are chosen by.

    Attributes:
        generator: its own random numbers, so that a seeded answer is the same whatever else runs.
        seen: the tokens of its prompt and of the answer so far.
    """

    def __init__(self, request: GenerateRequest, prompt: Iterable[int]) -> None:
        self.request, self.seen = request, set(prompt)
        self.generator = torch.Generator()
        if request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(request.seed)

    @property
    def penalty(self) -> float:
        penalty = self.request.repetition_penalty
        return 1.0 if penalty is None else penalty


def choose_tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of every row, each by its own sampler. A row that draws takes one number from its generator.

    First the repetition penalty, then the likeliest token or, over a softmax at the row's temperature, a draw from what
    `min_p`, `top_k` and `top_p` leave, in this order: that of vLLM.

    Args:
        logits: [B, V], left as they are.
    """
    logits = _penalised(logits.float(), samplers)
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for row, sampler in enumerate(samplers):
        if not sampler.request.greedy:
            tokens[row] = _sample(logits[row], sampler.request, sampler.generator)
    return tokens


def _penalised(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Logits of seen tokens divided by their row's penalty, or multiplied where they are under 0 (Keskar et al. 2019,
    arXiv 1909.05858, as transformers and vLLM have it). [B, V]"""
    places = [(row, token, s.penalty) for row, s in enumerate(samplers) if s.penalty != 1 for token in s.seen]
    if not places:
        return logits
    rows, tokens, penalties = zip(*places, strict=True)
    index = (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
    factors = torch.tensor(penalties, dtype=logits.dtype, device=logits.device)
    values = logits[index]
    return logits.index_put(index, torch.where(values < 0, values * factors, values / factors))


def _sample(logits: Tensor, request: GenerateRequest, generator: torch.Generator) -> int:
    """One token of those that the request leaves. logits [V]"""
    probabilities = torch.softmax(logits.double() / request.temperature, dim=-1)
    draw = torch.rand((), generator=generator, dtype=torch.float64).to(logits.device)
    if request.top_p >= 1 and not request.top_k and not request.min_p:
        return _drawn(probabilities, draw)
    values, tokens = _kept(probabilities, request)
    return int(tokens[_drawn(values, draw)])


def _kept(probabilities: Tensor, request: GenerateRequest) -> tuple[Tensor, Tensor]:
    """Probabilities of the tokens that may be drawn, the likeliest first, and the tokens, some of them too many."""
    values, tokens = _likeliest(probabilities, request)
    values = values[values >= request.min_p * values[0]]
    share = float(values.sum()) if request.top_k or request.min_p else 1.0
    before = values.cumsum(0) - values
    kept = max(1, int((before < request.top_p * share).sum()))  # the token that crosses the share belongs to it
    return values[:kept], tokens


def _likeliest(probabilities: Tensor, request: GenerateRequest) -> tuple[Tensor, Tensor]:
    """The likeliest tokens in order, as many as the request may draw from. probabilities [V]"""
    few = min(request.top_k or NUCLEUS, len(probabilities))
    values, tokens = probabilities.topk(few)
    if request.top_k or few == len(probabilities):
        return values, tokens
    left = values[-1] >= request.min_p * values[0] if request.min_p else values.sum() < request.top_p
    if left:
        values, tokens = probabilities.sort(descending=True)
    return values, tokens


def _drawn(weights: Tensor, draw: Tensor) -> int:
    """The place at which a number in [0, 1) falls. weights [K], at least one over 0"""
    sums = weights.cumsum(0)
    return min(int(torch.searchsorted(sums, draw * sums[-1], right=True)), len(weights) - 1)
