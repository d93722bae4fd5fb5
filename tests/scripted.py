"""Stand-ins for a model and a router: what they say is written down in the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from polymerge.engine.base import FloatArray, GenerateRequest, Generation, Message, Pooling, Prompt, Score, ScoreRequest
from polymerge.router.route import Route

# (expert's name, prompt's text) -> the answer
Answer = Callable[[Any, str], str]
BOS = 1


class ScriptedEngine:
    """One token a character. A continuation is likely where it is what the script answers.

    Args:
        bos: whether the tokenizer puts its first token before a text.
    """

    def __init__(
        self, answer: Answer, experts: Sequence[str] = (), *, bos: bool = False, fingerprint: str = "scripted"
    ) -> None:
        self._answer, self.experts, self.fingerprint, self._bos = answer, list(experts), fingerprint, bos
        self.max_length = 4096
        self.asked: list[GenerateRequest | ScoreRequest] = []

    def max_length_of(self, expert: Any = None) -> int:
        return self.max_length

    def encode(self, text: str, *, special: bool = True, expert: Any = None) -> list[int]:
        ids = [BOS if letter == "¤" else ord(letter) for letter in text]
        return [BOS, *ids] if self._bos and special else ids

    def decode(self, ids: Sequence[int], *, expert: Any = None) -> str:
        return "".join(chr(token) for token in ids if token != BOS)

    def chat_prompt(
        self, messages: Sequence[Message], *, expert: Any = None, go_on: bool = False, tools: Any = ()
    ) -> list[int]:
        return self.encode("".join(f"{message['content']}\n" for message in messages))

    def _text(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else self.decode(prompt)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        self.asked += requests
        texts = [self._answer(request.expert, self._text(request.prompt).strip()) for request in requests]
        return [
            Generation(text[: r.max_new_tokens], len(r.prompt), len(text), "stop")
            for r, text in zip(requests, texts, strict=True)
        ]

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        self.asked += requests
        scores = []
        for request in requests:
            wanted = self._answer(request.expert, self._text(request.context).strip())
            text = self._text(request.continuation).strip()
            scores.append(
                Score(0.0 if text == wanted else -float(len(text)), text == wanted, len(request.continuation))
            )
        return scores

    def embed(
        self, prompts: Sequence[Prompt], *, layers: Sequence[int] = (-1,), pooling: Pooling = "last"
    ) -> FloatArray:
        return np.zeros((len(prompts), len(layers), 2), dtype=np.float32)


class ScriptedRouter:
    """Routes by the first word that it knows; without one, to the average."""

    def __init__(self, words: Mapping[str, str]) -> None:
        self._words = words
        self.seen: list[str] = []

    def route(self, texts: Sequence[str]) -> list[Route]:
        self.seen += texts
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> Route:
        field = next((self._words[word] for word in text.split() if word in self._words), None)
        fields = sorted(set(self._words.values()))
        scores = {name: (0.8 if name == field else 0.2 / max(1, len(fields) - 1)) for name in fields}
        return Route(field, field or fields[0], 0.8 if field else 0.1, scores, fallback=field is None)
