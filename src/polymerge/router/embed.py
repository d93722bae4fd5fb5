"""Texts as vectors: the alignment prompt around a text, and where in the LLM its hidden state is read.

Knows prompts, tokens and cutting; does not know fields. The engine sorts the texts by length and runs them in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..engine.base import Engine, FloatArray, Pooling
from ..errors import RouterError

# done, of all
Progress = Callable[[int, int], None]
# As published by the competition's winning team; its spelling and its full stop are part of it.
ALIGNMENT_PROMPT = (
    "{input} Let's think about what task these questions belong to. These questions belong to the field of"
)
# Of the ChatML format: one token each to a model that knows it (SmolLM2, Qwen).
CHAT_MARKS = "<|im_start|>", "<|im_end|>"
# Asks what the text wants, as a chat in that format. With few samples a field it is ahead of the published one
# (docs/log-router.md).
TASK_PROMPT = (
    "<|im_start|>user\n{input}\n\nWhat kind of request is this, and what should be done with it? Answer in one word."
    "<|im_end|>\n<|im_start|>assistant\nThis is a request to"
)
# Names that stand for a template.
PROMPTS = {"published": ALIGNMENT_PROMPT, "task": TASK_PROMPT, "none": "{input}"}
INPUT = "{input}"
# Shares of the LLM's depth, chosen where known requests meet strangers and wording is new (docs/log-router.md): from
# two thirds on to before the end; and the mean over all tokens, the prompt's own among them, which have read the text.
DEPTHS = (2 / 3, 11 / 15, 4 / 5)


class EmbedSettings(BaseModel):
    """How a text becomes a vector.

    Attributes:
        template: the alignment prompt; {input} is the text's place, and alone the bare text. See PROMPTS. None is the
            published one, and leaves the choice to a fit (`settings.with_template`).
        layers: hidden states to take, as the engine counts them; several are set side by side, each of length 1. None
            takes those of `default_layers`.
        pooling: the last token's state or the mean over all tokens.
        max_tokens: longer texts are cut in the middle; the context's own limit holds too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str | None = None
    layers: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    pooling: Pooling = "mean"
    max_tokens: int = Field(default=1024, ge=2)

    @field_validator("template")
    @classmethod
    def _one_input(cls, template: str | None) -> str | None:
        if template is not None and template.count(INPUT) != 1:
            raise ValueError(f"the template must hold {INPUT} once")
        return template


def default_layers(depth: int) -> tuple[int, ...]:
    """The layers at DEPTHS of a model with `depth` layers, counted from the end; fewer where two are one."""
    return tuple(sorted({round(share * depth) - depth - 1 for share in DEPTHS}))


class Embedded(NamedTuple):
    """vectors [n, dimensions], float32, and how many tokens were cut out of every text."""

    vectors: FloatArray
    truncated: list[int]


class Embedder:
    """Texts to vectors with one engine. The prompt around the text is turned into tokens once.

    Attributes:
        settings: as given.
        layers: those that are read.
    """

    def __init__(self, engine: Engine, settings: EmbedSettings) -> None:
        self.engine, self.settings = engine, settings
        self.layers = default_layers(engine.depth) if settings.layers is None else settings.layers
        head, tail = (settings.template or ALIGNMENT_PROMPT).split(INPUT)
        self._head = engine.encode(head)  # with the tokenizer's special tokens, which begin the text
        self._tail = engine.encode(tail, special=False) if tail else []
        room = engine.max_length - len(self._head) - len(self._tail)
        if room < 2:
            raise RouterError(f"the alignment prompt leaves {room} of {engine.max_length} tokens for the text")
        self.room = min(room, settings.max_tokens)

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Vectors of non-empty texts.

        Raises:
            RouterError: a text is empty, a layer is not there, or a vector is not finite.
        """
        prompts, truncated = self.prompts(texts)
        try:
            states = self.engine.embed(prompts, layers=self.layers, pooling=self.settings.pooling)
        except IndexError:
            raise RouterError(f"layers {self.layers}: the model has fewer; -1 is always there") from None
        if len(self.layers) > 1:
            states = states / np.maximum(np.linalg.norm(states, axis=-1, keepdims=True), 1e-12)
        vectors = states.reshape(len(texts), -1)
        if not np.isfinite(vectors).all():
            raise RouterError("the model's hidden states are not finite; load it in float32 or bfloat16")
        return Embedded(vectors, truncated)

    def prompts(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Token ids of non-empty texts in the alignment prompt, and how many tokens were cut out of every text."""
        prompts, truncated = [], []
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise RouterError(f"text {number} of {len(texts)} is empty; there is nothing to route by")
            ids, cut = cut_middle(self.engine.encode(text, special=False), self.room)
            prompts.append([*self._head, *ids, *self._tail])
            truncated.append(cut)
        return prompts, truncated


def cut_middle(ids: Sequence[int], room: int) -> tuple[list[int], int]:
    """At most `room` tokens, the same number from both ends, and how many were left out.

    A request's task is most often said at its beginning or its end.
    """
    cut = len(ids) - room
    if cut <= 0:
        return list(ids), 0
    first = (room + 1) // 2
    return [*ids[:first], *ids[len(ids) - (room - first) :]], cut
