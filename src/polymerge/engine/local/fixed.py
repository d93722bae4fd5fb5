"""A batch whose rows begin and end together, for models that keep more than keys and values (Mamba and its kin).

The model's own loop in transformers moves its caches; which token comes next and when an answer ends is decided where
it is for everybody. Knows rows; does not know caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from ..answer import Answer
from ..sampling import choose_tokens
from .loaded import LoadedModel


@torch.inference_mode()
def answer_fixed(model: LoadedModel, answers: Sequence[Answer]) -> list[Answer]:
    """Makes these answers, all in one batch, and returns them. One that was begun goes on."""
    for answer in answers:
        if not answer.made:
            answer.take_prompt(())
    rows = [answer for answer in answers if not answer.over]
    if rows:
        ids, mask = model.padded([answer.tokens for answer in rows])
        chosen = _Chosen(rows, int(model.tokenizer.pad_token_id))
        experts = [answer.request.generate.expert for answer in rows]
        _forget(model.hf, ids)
        with model.assigned(experts, len(rows)), without_settings(model.hf, chosen.pad):
            model.hf.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(answer.longest - len(answer.tokens) for answer in rows),
                logits_processor=LogitsProcessorList([chosen]),
                stopping_criteria=StoppingCriteriaList([chosen.over]),
            )
    return list(answers)


def _forget(hf: Any, ids: Tensor) -> None:
    """Where modules hold a text's states themselves (RecurrentGemma), a prompt of one token would go on with the last
    text's."""
    base = hf.base_model
    if hasattr(base, "_setup_cache"):
        base._setup_cache(hf.config, len(ids), ids.device, hf.dtype)


class _Chosen:
    """Puts our choice in the place of a model's logits."""

    def __init__(self, rows: Sequence[Answer], pad: int) -> None:
        self._rows, self.pad = rows, pad

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """logits [B, V] -> 0 at every row's next token, -inf elsewhere"""
        tokens = choose_tokens(logits, [answer.sampler for answer in self._rows])
        tokens = [self.pad if answer.over else token for answer, token in zip(self._rows, tokens, strict=True)]
        for answer, token in zip(self._rows, tokens, strict=True):
            answer.take(token, None)
        places = torch.tensor(tokens, device=logits.device)[:, None]
        return torch.full_like(logits, -torch.inf).scatter(1, places, 0.0)

    def over(self, ids: Tensor, logits: Any, **_: Any) -> Tensor:
        """A stopping criterion: bool [B]"""
        return torch.tensor([answer.over for answer in self._rows], device=ids.device)


@contextmanager
def without_settings(model: Any, pad: int) -> Iterator[None]:
    """The checkpoint's generation settings have been looked at; transformers' loop must not apply them again."""
    before = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=pad)
    try:
        yield
    finally:
        model.generation_config = before
