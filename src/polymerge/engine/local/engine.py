"""The embedded engine: a bundle or a plain checkpoint, run by transformers in this process.

Makes answers by the running batch that a server has. Scores and embeddings go in batches of like length and bounded
size; one that runs out of memory is halved. Knows padding and caches; does not know routers or prompts' wording.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...errors import ModelError
from ..answer import Answer, Collector, new_answer
from ..base import FloatArray, GenerateRequest, Generation, Pooling, Prompt, Score, ScoreRequest
from ..scoring import scored_pair
from ..streaming import Listener, StreamRequest
from .cache import joins
from .fixed import answer_fixed
from .hidden import hidden_states
from .loaded import LoadedModel, positions
from .offline import answer_all
from .padding import Together, rows_together

Item = TypeVar("Item")
Result = TypeVar("Result")


class HFEngine(LoadedModel):
    """An `Engine` of this process. `from_bundle` and `from_checkpoint` make one."""

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """As in the contract, by the loop of a server. A request that draws without a seed takes one from torch's
        global generator, so that `torch.manual_seed` fixes what a program draws."""
        return [generation for generation, _ in self._written(requests)]

    def written(self, requests: Sequence[GenerateRequest]) -> list[list[int]]:
        """Token ids of the same answers, end tokens too."""
        return [ids for _, ids in self._written(requests)]

    def stream(self, requests: Sequence[GenerateRequest], listeners: Sequence[Listener]) -> None:
        """The same, while listeners hear the answers piece by piece from this thread; it returns when all are over."""
        self._run(self._answers(requests, listeners))

    def _written(self, requests: Sequence[GenerateRequest]) -> list[tuple[Generation, list[int]]]:
        collectors = [Collector() for _ in requests]
        answers = self._answers(requests, collectors)
        self._run(answers)
        return [(c.result(len(a.prompt)), a.made) for c, a in zip(collectors, answers, strict=True)]

    def _answers(self, requests: Sequence[GenerateRequest], listeners: Sequence[Listener]) -> list[Answer]:
        return [self._answer(*pair) for pair in zip(requests, listeners, strict=True)]

    def _answer(self, request: GenerateRequest, listener: Listener) -> Answer:
        self.check_expert(request.expert)
        prompt, asked = self.ids(request.prompt, request.expert), StreamRequest(_seeded(request))
        voice = self.voices.of(request.expert)
        return new_answer(asked, prompt, listener, voice=voice, matcher=self.grammars.matcher(request.structure, voice))

    def _run(self, answers: Sequence[Answer]) -> None:
        if joins(self.hf):
            answer_all(self, answers)
        else:
            rows, prompts = [answer.longest for answer in answers], [len(answer.prompt) for answer in answers]
            self._in_batches(answers, rows, lambda batch: answer_fixed(self, batch), prompts)

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """As in the contract. Contexts that several requests share are computed once: the choices of a question."""
        groups: dict[tuple[tuple[int, ...], str], list[tuple[int, list[int]]]] = {}
        experts = {}
        for number, request in enumerate(requests):
            self.check_expert(request.expert)
            context, continuation = self.pair(request)
            key = (tuple(context), json.dumps(request.expert, sort_keys=True))
            experts[key] = request.expert
            groups.setdefault(key, []).append((number, continuation))
        items = [(list(key[0]), experts[key], [ids for _, ids in group]) for key, group in groups.items()]
        lengths = [(len(context) + max(map(len, ids))) * len(ids) for context, _, ids in items]
        scores = self._in_batches(items, lengths, self._score_batch, [len(context) for context, _, _ in items])
        ordered: list[Score | None] = [None] * len(requests)
        for group, of_group in zip(groups.values(), scores, strict=True):
            for (number, _), score in zip(group, of_group, strict=True):
                ordered[number] = score
        return [score for score in ordered if score is not None]

    def embed(
        self, prompts: Sequence[Prompt], *, layers: Sequence[int] = (-1,), pooling: Pooling = "last"
    ) -> FloatArray:
        """As in the contract: [len(prompts), len(layers), hidden], float32."""
        encoded = [self.embeddable(prompt) for prompt in prompts]

        def batch(rows: Sequence[list[int]]) -> list[FloatArray]:
            return self._embed_batch(rows, layers, pooling)

        lengths = [len(ids) for ids in encoded]
        vectors = self._in_batches(encoded, lengths, batch, lengths)
        width = self.hf.config.get_text_config().hidden_size
        return np.stack(vectors) if vectors else np.zeros((0, len(layers), width), dtype=np.float32)

    def embeddable(self, prompt: Prompt) -> list[int]:
        """Token ids of a text to embed. Raises ModelError for one that is empty or does not fit the model."""
        ids = self.ids(prompt)
        if not 0 < len(ids) <= self.max_length:
            raise ModelError(f"embed: a text has {len(ids)} tokens; 1 to {self.max_length} fit the model")
        return ids

    def pair(self, request: ScoreRequest) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation. Raises ModelError as `loglikelihood` does."""
        continuation, voice = request.continuation, self.voices.of(request.expert)
        ids = voice.encode(continuation, special=False) if isinstance(continuation, str) else continuation
        ids = self.checked(ids, request.expert)
        return scored_pair(self.ids(request.context, request.expert), ids, voice.tokenizer, voice.max_length)

    def _in_batches(
        self, items: Sequence[Item], lengths: Sequence[int], run: Callable[[Sequence[Item]], list[Result]],
        prompts: Sequence[int],
    ) -> list[Result]:  # fmt: skip
        """`run` on batches of like length, the longest first: running out of memory shows at once.

        Args:
            prompts: tokens of each that would be padded to one width, where the model can be padded.
        """
        results: list[Result | None] = [None] * len(items)
        order = sorted(range(len(items)), key=lambda n: -lengths[n])
        together = self._together if len(items) > 1 else "padded"
        if together == "padded":
            groups = [order]
        elif together == "alike":
            groups = [[n for n in order if prompts[n] == width] for width in sorted(set(prompts), reverse=True)]
        else:
            groups = [[n] for n in order]
        for numbers in (batch for group in groups for batch in _batches(group, lengths, self.batch_tokens)):
            for number, result in zip(numbers, _backing_off([items[n] for n in numbers], run), strict=True):
                results[number] = result
        return results  # type: ignore[return-value]

    @cached_property
    def _together(self) -> Together:
        return rows_together(self)

    @torch.inference_mode()
    def _score_batch(self, rows: Sequence[tuple[list[int], Any, list[list[int]]]]) -> list[list[Score]]:
        """Contexts once, then every continuation after its context's cache."""
        ids, mask = self.padded([context for context, _, _ in rows])
        counts = [len(continuations) for _, _, continuations in rows]
        with self.assigned([expert for _, expert, _ in rows], len(rows)):
            read = self.hf(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(mask),
                use_cache=True,
                logits_to_keep=1,
            )
        repeats = torch.tensor(counts, device=ids.device)
        first = torch.log_softmax(read.logits[:, -1].float(), dim=-1).repeat_interleave(repeats, dim=0)  # [C, V]
        flat = [continuation for _, _, continuations in rows for continuation in continuations]
        longest = max(len(continuation) for continuation in flat)
        later = None
        if longest > 1:
            read.past_key_values.reorder_cache(torch.arange(len(rows), device=ids.device).repeat_interleave(repeats))
            experts = [expert for (_, expert, _), count in zip(rows, counts, strict=True) for _ in range(count)]
            later = self._continue(flat, mask.repeat_interleave(repeats, dim=0), experts, read.past_key_values)
        scores = iter(
            [
                self._score(continuation, first[n], later[n] if later is not None else None)
                for n, continuation in enumerate(flat)
            ]
        )
        return [[next(scores) for _ in range(count)] for count in counts]

    def _continue(self, flat: Sequence[list[int]], mask: Tensor, experts: Sequence[Any], cache: Any) -> Tensor:
        """Logits [C, longest - 1, V] after every token of the continuations but the last, padded on the right."""
        width = max(len(row) for row in flat) - 1
        ids = torch.full((len(flat), width), int(self.tokenizer.pad_token_id))
        for number, row in enumerate(flat):
            ids[number, : len(row) - 1] = torch.tensor(row[:-1])
        whole = torch.cat([mask, torch.ones_like(ids).to(mask)], dim=1)
        with self.assigned(experts, len(flat)):
            logits: Tensor = self.hf(
                input_ids=ids.to(self.device),
                attention_mask=whole,
                position_ids=positions(whole)[:, -width:],
                past_key_values=cache,
                use_cache=True,
            ).logits
        return logits

    def _score(self, continuation: list[int], first: Tensor, later: Tensor | None) -> Score:
        total, greedy = float(first[continuation[0]]), int(first.argmax()) == continuation[0]
        if later is not None and len(continuation) > 1:
            logits = later[: len(continuation) - 1].float()
            rest = torch.tensor(continuation[1:], device=logits.device)
            total += float(torch.log_softmax(logits, dim=-1).gather(1, rest[:, None]).sum())
            greedy = greedy and bool((logits.argmax(dim=-1) == rest).all())
        return Score(total, greedy, len(continuation))

    @torch.inference_mode()
    def _embed_batch(self, rows: Sequence[list[int]], layers: Sequence[int], pooling: Pooling) -> list[FloatArray]:
        ids, mask = self.padded(rows)
        with self.assigned(None, len(rows)):
            read = hidden_states(
                self.hf.base_model,
                layers,
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(mask),
                use_cache=False,
            )
        states = torch.stack(read, dim=1).float()  # [B, L, T, H]
        if pooling == "last":
            pooled = states[:, :, -1]
        else:
            share = mask[:, None, :, None].float()
            pooled = (states * share).sum(2) / share.sum(2)
        return list(pooled.cpu().numpy())


def _seeded(request: GenerateRequest) -> GenerateRequest:
    if request.greedy or request.seed is not None:
        return request
    return replace(request, seed=int(torch.randint(2**62, ())))


def _batches(order: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Runs of `order` whose padded size stays within the budget. `order` is by falling length."""
    batch: list[int] = []
    for number in order:
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _backing_off(items: Sequence[Item], run: Callable[[Sequence[Item]], list[Result]]) -> list[Result]:
    """Runs a batch; one that does not fit the device's memory runs as two halves."""
    try:
        return run(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise ModelError("out of memory on one request; a shorter prompt or a smaller model is needed") from None
    torch.cuda.empty_cache()
    middle = len(items) // 2
    return _backing_off(items[:middle], run) + _backing_off(items[middle:], run)
