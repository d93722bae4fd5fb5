"""The embedded engine: a bundle or a plain checkpoint, run by transformers in this process.

Puts requests of like length into batches of bounded size, and halves a batch that runs out of memory. Knows tokens,
padding and caches; does not know routers or prompts' wording.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...bundle.bundle import Bundle
from ...errors import ModelError
from ...host import DTYPES, pick_device, pick_dtype
from ...model import MixedModel, load_model
from ...recipe.merge import Source
from ...sources.adapter import AdapterCheckpoint
from ...sources.checkpoint import Checkpoint
from ...sources.fingerprint import digest_beside
from ...sources.opening import open_checkpoint
from ..base import FloatArray, GenerateRequest, Generation, Message, Pooling, Prompt, Score, ScoreRequest
from ..sampling import StopTexts, first_stop
from ..scoring import scored_pair

# Tokens of a batch, padding included: wide enough to keep two to sixteen cores busy, small enough for a laptop.
BATCH_TOKENS = 4096
Item = TypeVar("Item")
Result = TypeVar("Result")


class HFEngine:
    """Runs a model that transformers has loaded.

    Args:
        model: a MixedModel, or a transformers causal language model whose requests name no expert.
        fingerprint: changes with anything that the results depend on.
        batch_tokens: tokens of one batch at most, padding included; one request always fits.
    """

    def __init__(self, model: Any, tokenizer: Any, *, fingerprint: str, batch_tokens: int = BATCH_TOKENS) -> None:
        self.model, self.tokenizer, self.fingerprint = model, tokenizer, fingerprint
        self.batch_tokens = batch_tokens
        self._mixed = isinstance(model, MixedModel)
        self.hf: Any = model.hf if self._mixed else model
        self._vocabulary = int(self.hf.config.get_text_config().vocab_size)

    @classmethod
    def from_bundle(cls, bundle: Bundle | str | Path, *, batch_tokens: int = BATCH_TOKENS, **load: Any) -> HFEngine:
        """A bundle; further arguments are `load_model`'s."""
        model = load_model(bundle, **load)
        return cls(model, model.tokenizer, fingerprint=model.bundle.digest, batch_tokens=batch_tokens)

    @classmethod
    def from_checkpoint(
        cls,
        source: Source | str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        batch_tokens: int = BATCH_TOKENS,
    ) -> HFEngine:
        """A plain model: a folder, a hub id, a GGUF file, an adapter over its base or `package:NAME`, as in a recipe.

        Raises:
            SourceError: it cannot be read. ModelError: transformers cannot load it.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        checkpoint = open_checkpoint(source)
        place = pick_device(device)
        chosen = pick_dtype(dtype, place, _stored_dtype(checkpoint))
        options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        try:
            model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=chosen, **options)
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, padding_side="left", **options)
        except Exception as error:  # transformers raises many types for one unusable folder
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{checkpoint.label}: transformers cannot load it ({reason})") from None
        if isinstance(checkpoint, AdapterCheckpoint):  # its folder is the base's
            _put_adapter(model, checkpoint)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.eval().requires_grad_(False).to(place)
        parts = [*checkpoint.fingerprint(), digest_beside(checkpoint.folder)]
        digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        return cls(model, tokenizer, fingerprint=digest, batch_tokens=batch_tokens)

    @property
    def experts(self) -> list[str]:
        """Names of the bundle's experts; none for a plain model."""
        return list(self.model.experts) if self._mixed else []

    @property
    def max_length(self) -> int:
        """The context, in tokens."""
        text_config = self.hf.config.get_text_config()
        return int(getattr(text_config, "max_position_embeddings", 0) or self.tokenizer.model_max_length)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return torch.device(self.hf.device)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Raises ModelError for ids outside the vocabulary."""
        text: str = self.tokenizer.decode(self.checked(ids), skip_special_tokens=True)
        return text

    def token_text(self, token: int) -> str:
        """One token alone, special tokens too; it may be a part of a character."""
        text: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return text

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation; without a chat template, its turns one below the other."""
        if self.tokenizer.chat_template is None:
            return self.encode("".join(f"{message['content']}\n" for message in messages))
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self.encode(text, special=False)  # a rendered template holds its special tokens already

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """As in the contract. Rows of one batch share their sampling settings; greedy ones share a batch whatever
        their lengths."""
        encoded = [(request, self._ids(request.prompt)) for request in requests]
        for request, ids in encoded:
            if not ids:
                raise ModelError("generate: the prompt is empty")
            if len(ids) >= self.max_length:
                raise ModelError(f"generate: the prompt has {len(ids)} tokens, the model's context {self.max_length}")
            self._check(request.expert)
        results: list[Generation | None] = [None] * len(requests)
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for number, (request, _) in enumerate(encoded):
            sampling = (request.temperature, request.top_p, request.seed) if request.temperature > 0 else ()
            kinds.setdefault((*sampling, _room(request.max_new_tokens)), []).append(number)
        for numbers in kinds.values():
            lengths = [len(encoded[n][1]) + encoded[n][0].max_new_tokens for n in numbers]
            found = self._in_batches([encoded[n] for n in numbers], lengths, self._generate_batch)
            for number, generation in zip(numbers, found, strict=True):
                results[number] = generation
        return [result for result in results if result is not None]

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """As in the contract. Contexts that several requests share are computed once: the choices of a question."""
        groups: dict[tuple[tuple[int, ...], str], list[tuple[int, list[int]]]] = {}
        experts = {}
        for number, request in enumerate(requests):
            self._check(request.expert)
            context, continuation = self._pair(request)
            key = (tuple(context), json.dumps(request.expert, sort_keys=True))
            experts[key] = request.expert
            groups.setdefault(key, []).append((number, continuation))
        items = [(list(key[0]), experts[key], [ids for _, ids in found]) for key, found in groups.items()]
        lengths = [(len(context) + max(map(len, ids))) * len(ids) for context, _, ids in items]
        scores = self._in_batches(items, lengths, self._score_batch)
        ordered: list[Score | None] = [None] * len(requests)
        for group, own in zip(groups.values(), scores, strict=True):
            for (number, _), score in zip(group, own, strict=True):
                ordered[number] = score
        return [score for score in ordered if score is not None]

    def embed(
        self, prompts: Sequence[Prompt], *, layers: Sequence[int] = (-1,), pooling: Pooling = "last"
    ) -> FloatArray:
        """As in the contract: [len(prompts), len(layers), hidden], float32."""
        encoded = [self._ids(prompt) for prompt in prompts]
        for ids in encoded:
            if not 0 < len(ids) <= self.max_length:
                raise ModelError(f"embed: a text has {len(ids)} tokens; 1 to {self.max_length} fit the model")

        def batch(rows: Sequence[list[int]]) -> list[FloatArray]:
            return self._embed_batch(rows, layers, pooling)

        found = self._in_batches(encoded, [len(ids) for ids in encoded], batch)
        width = self.hf.config.get_text_config().hidden_size
        return np.stack(found) if found else np.zeros((0, len(layers), width), dtype=np.float32)

    def _ids(self, prompt: Prompt) -> list[int]:
        return self.encode(prompt) if isinstance(prompt, str) else self.checked(prompt)

    def checked(self, ids: Sequence[int]) -> list[int]:
        """Token ids as they are. Raises ModelError for one outside the vocabulary."""
        if ids and not (min(ids) >= 0 and max(ids) < self._vocabulary):
            wrong = next(token for token in ids if not 0 <= token < self._vocabulary)
            raise ModelError(f"token {wrong}: the vocabulary ends at {self._vocabulary - 1}")
        return list(ids)

    def _pair(self, request: ScoreRequest) -> tuple[list[int], list[int]]:
        continuation = request.continuation
        ids = self.encode(continuation, special=False) if isinstance(continuation, str) else self.checked(continuation)
        return scored_pair(self._ids(request.context), ids, self.tokenizer, self.max_length)

    def _check(self, expert: Any) -> None:
        if self._mixed:
            self.model.check_experts(expert)
        elif expert not in (None, "average"):
            raise ModelError(f"a plain model has no experts; the request asks for {expert!r}")

    def assigned(self, experts: Any, rows: int) -> AbstractContextManager[None]:
        """Everything that runs inside uses these experts, one a row. Raises ModelError as `generate` does."""
        return self.model.assigned(experts, rows) if self._mixed else nullcontext()

    def _in_batches(
        self, items: Sequence[Item], lengths: Sequence[int], run: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result]:
        """`run` on batches of like length, the longest first: running out of memory shows at once."""
        results: list[Result | None] = [None] * len(items)
        order = sorted(range(len(items)), key=lambda n: -lengths[n])
        for numbers in _batches(order, lengths, self.batch_tokens):
            for number, result in zip(numbers, _backing_off([items[n] for n in numbers], run), strict=True):
                results[number] = result
        return results  # type: ignore[return-value]

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """ids and attention mask [B, T], padded on the left."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), int(self.tokenizer.pad_token_id))
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :] = torch.tensor(row)
            mask[number, width - len(row) :] = 1
        return ids.to(self.device), mask.to(self.device)

    @torch.inference_mode()
    def _generate_batch(self, rows: Sequence[tuple[GenerateRequest, list[int]]]) -> list[Generation]:
        requests = [request for request, _ in rows]
        ids, mask = self.padded([own for _, own in rows])
        first, width = requests[0], ids.shape[1]
        options: dict[str, Any] = {"do_sample": False}
        if first.temperature > 0:
            options = {"do_sample": True, "temperature": first.temperature, "top_p": first.top_p, "top_k": 0}
            if first.seed is not None:
                torch.manual_seed(first.seed)
        stop = StopTexts(self.tokenizer, [r.stop for r in requests], [r.max_new_tokens for r in requests], width)
        room = min(max(request.max_new_tokens for request in requests), self.max_length - width)
        experts = {"experts": [request.expert for request in requests]} if self._mixed else {}
        output = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=room,
            stopping_criteria=[stop],
            pad_token_id=self.tokenizer.pad_token_id,
            **experts,
            **options,
        )
        return [
            self._generation(request, len(own), new.tolist())
            for (request, own), new in zip(rows, output[:, width:], strict=True)
        ]

    def _generation(self, request: GenerateRequest, prompt_tokens: int, new: list[int]) -> Generation:
        ends = self.end_tokens()
        new = new[: request.max_new_tokens]
        end = next((place for place, token in enumerate(new) if token in ends), None)
        kept = new if end is None else new[:end]
        text, stopped = first_stop(self.decode(kept), request.stop)
        finished = end is not None or stopped
        tokens = len(kept) + (end is not None)
        return Generation(text, prompt_tokens, tokens, "stop" if finished else "length")

    def end_tokens(self) -> set[int]:
        """Tokens after which an answer is over."""
        ends = self.hf.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [ends]
        return {int(token) for token in (*listed, self.tokenizer.eos_token_id) if token is not None}

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
        flat = [continuation for _, _, found in rows for continuation in found]
        longest = max(len(continuation) for continuation in flat)
        later = None
        if longest > 1:
            read.past_key_values.reorder_cache(torch.arange(len(rows), device=ids.device).repeat_interleave(repeats))
            experts = [expert for (_, expert, _), count in zip(rows, counts, strict=True) for _ in range(count)]
            later = self._continue(flat, mask.repeat_interleave(repeats, dim=0), experts, read.past_key_values)
        scores = iter(
            [self._score(own, first[n], later[n] if later is not None else None) for n, own in enumerate(flat)]
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
            found = self.hf.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(mask),
                use_cache=False,
                output_hidden_states=True,
            )
        states = torch.stack([found.hidden_states[layer] for layer in layers], dim=1).float()  # [B, L, T, H]
        if pooling == "last":
            pooled = states[:, :, -1]
        else:
            share = mask[:, None, :, None].float()
            pooled = (states * share).sum(2) / share.sum(2)
        return list(pooled.cpu().numpy())


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the checkpoint's configuration, or else of its first tensor that a model computes with."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    stored = next((info.dtype for info in checkpoint.tensors.values() if info.dtype), torch.float32)
    return DTYPES.get(str(named), stored)


@torch.no_grad()
def _put_adapter(model: Any, checkpoint: AdapterCheckpoint) -> None:
    """Puts every tensor that the adapter changes into its base."""
    parameters = model.state_dict()
    for name in checkpoint.changed:
        if name not in parameters:
            raise ModelError(f"{checkpoint.label}: the adapter changes {name!r}, which the loaded base does not have")
        parameters[name].copy_(checkpoint.read(name))


def positions(mask: Tensor) -> Tensor:
    """Positions that padding on the left does not shift. [B, T]"""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _room(tokens: int) -> int:
    """Budgets of new tokens that may share a batch: equal up to a factor of two."""
    return max(1, tokens).bit_length()


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
