"""Newcomers whose tokens are read together, piece by piece, before they join the running batch.

Knows tokens, padding and a cache of their own. Does not know the running rows (`polymerge.engine.local.running`), or
how large a piece may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache

from ..answer import Answer
from ..streaming import TokenScore
from ..text import Decode, TextStream
from .loaded import LoadedModel, positions
from .prefix import PrefixCache


class Reading:
    """Padded on the left to one width, of which the first columns may be known already.

    Attributes:
        answers: the newcomers.
        cache: of their rows, up to what was read.
    """

    def __init__(self, engine: LoadedModel, answers: Sequence[Answer], prefixes: PrefixCache) -> None:
        self.answers = list(answers)
        self._engine, self._prefixes = engine, prefixes
        self._width = max(len(answer.tokens) for answer in answers)
        self._scorers = [_PromptScorer(engine, answer, self._width) for answer in answers]
        self._wanted = any(scorer.wanted for scorer in self._scorers)
        self.cache, self._column, self._begun = DynamicCache(), 0, False

    @property
    def left(self) -> int:
        """Columns that are to be read."""
        self._begin()
        return self._width - self._column

    @property
    def rest(self) -> int:
        """Tokens that are to be read, padding included."""
        return len(self.answers) * self.left

    @property
    def over(self) -> bool:
        """Nobody waits for it any more."""
        return all(answer.over for answer in self.answers)

    def read(self, columns: int) -> Tensor | None:
        """Reads so many more. Returns the logits [B, V] after the last token when all are read."""
        self._begin()
        start, end = self._column, min(self._column + columns, self._width)
        with self._engine.assigned([answer.request.generate.expert for answer in self.answers], len(self.answers)):
            logits: Tensor = self._engine.hf(
                input_ids=self._ids[:, start:end],
                attention_mask=self._mask[:, :end],
                position_ids=self._places[:, start:end],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=0 if self._wanted else 1,
            ).logits
        for row, scorer in enumerate(self._scorers):
            scorer.see(logits[row], start)
        self._column = end
        if self.left:
            return None
        for row, (scorer, answer) in enumerate(zip(self._scorers, self.answers, strict=True)):
            self._prefixes.keep(answer.request.generate.expert, answer.tokens, self.cache.layers, row)
            if not answer.made:
                answer.take_prompt(scorer.scores)
        return logits[:, -1]

    def _begin(self) -> None:
        """Nothing is on the device before: what fails here fails where the answers stand in their batch."""
        if self._begun:
            return
        self._begun = True
        self._ids, self._mask = self._engine.padded([answer.tokens for answer in self.answers])
        self._places = positions(self._mask)
        if not self._wanted:
            self._take_known()

    def _take_known(self) -> None:
        """The columns that are known in every row, padding included."""
        rows = [(answer.request.generate.expert, answer.tokens) for answer in self.answers]
        pads = [self._width - len(tokens) for _, tokens in rows]
        column = min(pad + self._prefixes.known(*row) for pad, row in zip(pads, rows, strict=True))
        if all(column <= pad for pad in pads):
            return
        parts: list[Tensor | None] = [
            self._prefixes.states(*row, column - pad) if pad < column else None
            for pad, row in zip(pads, rows, strict=True)
        ]
        known = next(part for part in parts if part is not None)
        whole = known.new_zeros(*known.shape[:2], len(parts), known.shape[2], column, known.shape[4])
        for row, part in enumerate(parts):
            if part is not None:
                whole[:, :, row, :, column - part.shape[3] :] = part
        for number, (keys, values) in enumerate(zip(*whole, strict=True)):
            self.cache.update(keys, values, number)
        self._column = column


class _PromptScorer:
    """The scores of one row's prompt, gathered as its pieces are read."""

    def __init__(self, engine: LoadedModel, answer: Answer, width: int) -> None:
        self._engine, self._answer, self._pad = engine, answer, width - len(answer.tokens)
        self.wanted = answer.request.score_prompt and not answer.made
        self._text = TextStream(answer.text_of)
        self.scores: list[TokenScore] = []

    def see(self, logits: Tensor, start: int) -> None:
        """logits [T, V] after the columns from `start` on; every one scores the token that comes next."""
        if not self.wanted:
            return
        prompt = self._answer.prompt
        if not self.scores and prompt:
            self.scores += self._placed([TokenScore(self._answer.text_of(prompt[:1], True), None)], prompt[:1])
        first = max(self._pad, start)
        logits = logits[first - start :]
        targets = prompt[first - self._pad + 1 : first - self._pad + 1 + len(logits)]
        top = self._answer.request.logprobs or 0
        scores = token_scores(self._answer.text_of, logits[: len(targets)], targets, top)
        self.scores += self._placed(scores, targets)

    def _placed(self, scores: Sequence[TokenScore], tokens: Sequence[int]) -> list[TokenScore]:
        """Scores with the places at which their texts begin."""
        placed = []
        for score, token in zip(scores, tokens, strict=True):
            placed.append(replace(score, start=self._text.read))
            self._text.push(token)
        return placed


def token_scores(text_of: Decode, logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Scores of tokens [T] under logits [T, V], with the `top` likeliest alternatives."""
    if not len(tokens):
        return []
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, likeliest = logprobs.topk(min(top, logits.shape[-1]), dim=-1)
    scores = []
    for token, logprob, row, ids in zip(tokens, chosen, values.tolist(), likeliest.tolist(), strict=True):
        others = tuple((text_of([other], True), value) for other, value in zip(ids, row, strict=True))
        scores.append(TokenScore(text_of([token], True), logprob, others, tuple(ids)))
    return scores
