"""Engines, thinkers and routers that follow a script, so that a test says what a model would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from polymerge.engine import GenerateRequest, Generation, Score, ScoreRequest
from polymerge.errors import ModelError
from polymerge.router import Route
from polymerge.staged import Thought


class ScriptedEngine:
    """Tokens are characters. Answers are `write(prompt, expert)`, log-likelihoods of choices `like(prompt, choice)`."""

    def __init__(
        self,
        write: Callable[[str, Any], str] = lambda prompt, expert: "written",
        like: Callable[[str, str], float] = lambda prompt, choice: -float(len(choice)),
        experts: Sequence[str] = ("math", "law"),
        max_length: int = 100_000,
    ) -> None:
        self.experts, self.max_length, self.fingerprint = list(experts), max_length, "scripted"
        self.write, self.like = write, like
        self.prompts: list[str] = []

    def max_length_of(self, expert: Any = None) -> int:
        return self.max_length

    def encode(self, text: str, *, special: bool = True, expert: Any = None) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int], *, expert: Any = None) -> str:
        return "".join(map(chr, ids))

    def chat_prompt(self, messages: Sequence[Mapping[str, str]], *, expert: Any = None, tools: Any = ()) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>")

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        generations = []
        for request in requests:
            prompt = self._seen(request.prompt, request.expert)
            text = self.write(prompt, request.expert)
            generations.append(Generation(text, len(prompt), len(text), "stop"))
        return generations

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        scores = []
        for request in requests:
            prompt = self._seen(request.context, request.expert)
            choice = request.continuation
            choice = choice if isinstance(choice, str) else self.decode(choice)
            scores.append(Score(self.like(prompt, choice), False, len(choice)))
        return scores

    def embed(self, prompts: Sequence[Any], **_: Any) -> Any:
        return np.zeros((len(prompts), 1, 4), dtype=np.float32)

    def _seen(self, prompt: Any, expert: Any) -> str:
        if expert is not None and expert not in self.experts:
            raise ModelError(f"no expert {expert!r}")
        text = prompt if isinstance(prompt, str) else self.decode(prompt)
        if len(text) >= self.max_length:
            raise ModelError("the prompt is too long")
        self.prompts.append(text)
        return text


class ScriptedThinker:
    """Thinks `thought(prompt)`."""

    name = fingerprint = "scripted thinker"

    def __init__(self, thought: Callable[[str], Thought] = lambda prompt: Thought("a thought", 5, 2)) -> None:
        self.thought, self.prompts, self.unloaded = thought, list[str](), 0

    def think(self, prompts: Sequence[str], *, max_tokens: int, deadline: float | None = None) -> list[Thought]:
        self.prompts += prompts
        return [self.thought(prompt) for prompt in prompts]

    def unload(self) -> None:
        self.unloaded += 1


class ScriptedRouter:
    """Sends a text to the first expert whose name it holds, with the confidence of `confidence`."""

    def __init__(self, experts: Sequence[str] = ("math", "law"), confidence: float = 0.9) -> None:
        self.experts, self.confidence, self.calls = experts, confidence, 0

    def route(self, texts: Sequence[str]) -> list[Route]:
        self.calls += 1
        routes = []
        for text in texts:
            name = next((name for name in self.experts if name in text), None)
            routes.append(Route(name, name or "", self.confidence if name else 0.1, {}, fallback=name is None))
        return routes
