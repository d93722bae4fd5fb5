"""The rows that a model reads together: newcomers join after their prompts were read, answers that are over leave.

Knows tokens, caches and experts. Does not know who waits (`polymerge.engine.local.batching` for a server, `offline`
for a list) or what tokens mean as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..answer import Answer
from ..sampling import choose_tokens
from ..streaming import TokenScore
from ..text import Decode, TextStream
from .cache import RunningCache
from .loaded import LoadedModel, positions

# A prompt is read in pieces of so many tokens: bounds what attention and the scores of a long one need.
CHUNK = 512


class RunningBatch:
    """Answers in the making. All calls come from one thread.

    Attributes:
        answers: in the order of the rows.
    """

    def __init__(self, engine: LoadedModel) -> None:
        self._engine, self._cache = engine, RunningCache()
        self.answers: list[Answer] = []
        self._assignment = ExitStack()
        self._assigned = False

    def __len__(self) -> int:
        return len(self.answers)

    def clear(self) -> list[Answer]:
        """Drops the caches. Returns the answers, which join again when they are to go on."""
        self.pause()
        dropped, self.answers, self._cache = self.answers, [], RunningCache()
        return dropped

    def pause(self) -> None:
        """Takes the rows' experts off the model, so that it can be used for something else."""
        self._assignment.close()
        self._assigned = False

    @torch.inference_mode()
    def leave(self) -> None:
        """Drops the answers that are over."""
        for row in reversed(range(len(self.answers))):
            if self.answers[row].over:
                self.pause()
                self._cache.leave(row)
                self.answers[row] = self.answers[-1]
                self.answers.pop()

    @torch.inference_mode()
    def join(self, newcomers: Sequence[Answer]) -> None:
        """Reads the newcomers' tokens, all in one batch, and takes the first new token of each."""
        self.pause()
        logits, cache = self._read(newcomers)
        staying = [row for row, answer in enumerate(newcomers) if not answer.over]
        if not staying:
            return
        joined = [newcomers[row] for row in staying]
        if len(staying) < len(newcomers):
            cache.batch_select_indices(torch.tensor(staying, device=logits.device))
        self._cache.join(cache, [len(answer.tokens) for answer in joined])
        self.answers += joined
        self._take(joined, logits[staying])

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row."""
        device = self._engine.device
        mask = self._cache.before_step().to(device)
        ids = torch.tensor([[answer.made[-1]] for answer in self.answers], device=device)
        places = torch.tensor([[length] for length in self._cache.lengths], device=device)
        self._assign()
        output = self._engine.hf(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=self._cache, use_cache=True
        )
        self._cache.after_step()
        self._take(self.answers, output.logits[:, -1])

    def _assign(self) -> None:
        """The rows' experts stay on the model until rows change or somebody else uses it."""
        if not self._assigned:
            self._assignment.enter_context(self._experts(self.answers))
            self._assigned = True

    def _experts(self, answers: Sequence[Answer]) -> AbstractContextManager[None]:
        return self._engine.assigned([answer.request.generate.expert for answer in answers], len(answers))

    def _read(self, answers: Sequence[Answer]) -> tuple[Tensor, Any]:
        """Logits after the last token of every row [B, V], and the rows' cache, padded on the left."""
        ids, mask = self._engine.padded([answer.tokens for answer in answers])
        places, cache, width = positions(mask), DynamicCache(), ids.shape[1]
        scorers = [_PromptScorer(self._engine, answer, width) for answer in answers]
        keep = 0 if any(scorer.wanted for scorer in scorers) else 1
        logits = torch.empty(0)
        with self._experts(answers):
            for start in range(0, width, CHUNK):
                end = min(start + CHUNK, width)
                logits = self._engine.hf(
                    input_ids=ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=places[:, start:end],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=keep,
                ).logits
                for row, scorer in enumerate(scorers):
                    scorer.see(logits[row], start)
        for scorer, answer in zip(scorers, answers, strict=True):
            if not answer.made:
                answer.take_prompt(scorer.scores)
        return logits[:, -1], cache

    def _take(self, answers: Sequence[Answer], logits: Tensor) -> None:
        requests = [answer.request for answer in answers]
        tokens = choose_tokens(logits, [answer.sampler for answer in answers])
        for row, (answer, request, token) in enumerate(zip(list(answers), requests, tokens, strict=True)):
            wanted = request.logprobs is not None
            answer.take(token, self._score(answer, logits[row : row + 1], token) if wanted else None)

    @staticmethod
    def _score(answer: Answer, logits: Tensor, token: int) -> TokenScore:
        return token_scores(answer.text_of, logits, [token], answer.request.logprobs or 0)[0]


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
