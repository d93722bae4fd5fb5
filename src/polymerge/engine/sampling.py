"""How an answer goes on: the next token of single rows, each by its own request. All loops of this process ask here.

Knows logits, requests and random numbers. Does not know text, ends or batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .base import GenerateRequest
from .grammar import Matcher

# The nucleus is looked for among so many of the likeliest tokens before the whole vocabulary is sorted.
NUCLEUS = 256


class Sampler:
    """What one answer's tokens are chosen by.

    Attributes:
        generator: its own random numbers, so that a seeded answer is the same whatever else runs.
        seen: the tokens of its prompt and of the answer so far.
        made: token -> how often it stands in the answer so far.
        matcher: holds the answer to its form; None where it has none.
    """

    def __init__(self, request: GenerateRequest, prompt: Iterable[int], matcher: Matcher | None = None) -> None:
        self.request, self.seen, self.matcher = request, set(prompt), matcher
        self.made: Counter[int] = Counter()
        self.generator = torch.Generator()
        if request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(request.seed)

    @property
    def penalty(self) -> float:
        penalty = self.request.repetition_penalty
        return 1.0 if penalty is None else penalty

    def take(self, token: int) -> bool:
        """One more token of the answer. False where its form could not be held."""
        self.seen.add(token)
        self.made[token] += 1
        return self.matcher is None or self.matcher.take(token)

    @property
    def complete(self) -> bool:
        """Whether the answer's form is whole and allows nothing more."""
        return self.matcher is not None and self.matcher.complete

    def added(self, vocabulary: int) -> dict[int, float]:
        """Token -> what is added to its logit: the request's bias, less OpenAI's penalties of what the answer has."""
        asked = self.request
        added = {token: value for token, value in asked.logit_bias.items() if token < vocabulary}
        if asked.presence_penalty or asked.frequency_penalty:
            for token, count in self.made.items():
                penalty = asked.presence_penalty + count * asked.frequency_penalty
                added[token] = added.get(token, 0.0) - penalty
        return added


def choose_tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of every row, each by its own sampler. A row that draws takes one number from its generator.

    First biases, penalties and what the row's form allows, then the likeliest token or, over a softmax at the row's
    temperature, a draw from what `min_p`, `top_k` and `top_p` leave, in this order: that of vLLM. All rows that draw do
    so together.

    Args:
        logits: [B, V], left as they are.
    """
    logits = _formed(_penalised(_biased(logits.float(), samplers), samplers), samplers)
    chosen = logits.argmax(dim=-1)
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.request.greedy]
    # Apart, for these draw in other orders of the tokens, and a row's draw must not depend on who is beside it.
    for cut in (False, True):
        if among := [row for row in drawing if _all_are_left(samplers[row]) is not cut]:
            rows = torch.tensor(among, device=logits.device)
            chosen[rows] = _sample(logits[rows], [samplers[row] for row in among])
    tokens: list[int] = chosen.tolist()
    return tokens


def _biased(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Logits with what requests add to those of some tokens. [B, V]"""
    added = [sampler.added(logits.shape[-1]) for sampler in samplers]
    places = [(row, token, value) for row, its in enumerate(added) for token, value in its.items()]
    if not places:
        return logits
    rows, tokens, values = zip(*places, strict=True)
    index = (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
    return logits.index_put(index, torch.tensor(values, dtype=logits.dtype, device=logits.device), accumulate=True)


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


def _formed(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Logits with -inf for tokens that the form of a row's answer does not allow. [B, V]"""
    held = [(row, sampler.matcher) for row, sampler in enumerate(samplers) if sampler.matcher is not None]
    if not held:
        return logits
    allowed = torch.stack([torch.from_numpy(matcher.allowed(logits.shape[1])) for _, matcher in held])
    rows = torch.tensor([row for row, _ in held], device=logits.device)
    return logits.index_copy(0, rows, logits[rows].masked_fill(~allowed.to(logits.device), -torch.inf))


def _sample(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """One token a row of those that its request leaves. logits [S, V] -> [S]"""
    requests = [sampler.request for sampler in samplers]
    temperatures = _column([request.temperature for request in requests], logits)
    probabilities = torch.softmax(logits.double() / temperatures, dim=-1)
    draws = torch.stack([torch.rand((), generator=s.generator, dtype=torch.float64) for s in samplers])
    draws = draws.to(logits.device)
    if all(map(_all_are_left, samplers)):
        return _drawn(probabilities, draws)
    values, tokens = _likeliest(probabilities, requests)
    kept = torch.where(_is_left(values, requests), values, 0.0)
    return tokens.gather(1, _drawn(kept, draws)[:, None])[:, 0]


def _all_are_left(sampler: Sampler) -> bool:
    request = sampler.request
    return request.top_p >= 1 and not request.top_k and not request.min_p


def _is_left(values: Tensor, requests: Sequence[GenerateRequest]) -> Tensor:
    """Which of the likeliest tokens may be drawn. values [S, K], the likeliest first -> bool [S, K]"""
    size = values.shape[1]
    places = torch.arange(size, device=values.device)
    most = _column([request.top_k or size for request in requests], values)
    left = (places < most) & (values >= _column([request.min_p for request in requests], values) * values[:, :1])
    values = torch.where(left, values, 0.0)
    # A share of what the others leave; of everything where they leave everything, whatever is looked at here.
    cut = torch.tensor([bool(request.top_k or request.min_p) for request in requests], device=values.device)
    share = torch.where(cut, values.sum(-1), 1.0)[:, None]
    before = values.cumsum(-1) - values
    left &= before < _column([request.top_p for request in requests], values) * share
    left[:, 0] = True  # the token that crosses the share belongs to it
    return left


def _likeliest(probabilities: Tensor, requests: Sequence[GenerateRequest]) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of every row in order, as many as its request may draw from, or more. [S, V] -> [S, K]"""
    size = probabilities.shape[1]
    few = min(max(request.top_k or NUCLEUS for request in requests), size)
    values, tokens = probabilities.topk(few)
    if few == size:
        return values, tokens
    min_p = _column([request.min_p for request in requests], values)
    top_p = _column([request.top_p for request in requests], values)
    more = torch.where(min_p > 0, values[:, -1:] >= min_p * values[:, :1], values.sum(-1, keepdim=True) < top_p)
    more &= _column([0.0 if request.top_k else 1.0 for request in requests], values) > 0
    return probabilities.sort(descending=True) if bool(more.any()) else (values, tokens)


def _drawn(weights: Tensor, draws: Tensor) -> Tensor:
    """The place in every row at which a number in [0, 1) falls. weights [S, K], at least one a row over 0 -> [S]"""
    sums = weights.cumsum(-1)
    places = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)[:, 0]
    # A draw so near to 1 that it was rounded to the whole sum falls on none.
    return torch.where(places < weights.shape[1], places, weights.argmax(dim=-1))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """[S, 1]"""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
