"""A scripted engine: a text's vector is read off its words, so that a test says where a text lies."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from polymerge.engine.base import FloatArray, Score, ScoreRequest
from polymerge.router.samples import Sample

WIDTH = 24
# A word of a field pulls a vector towards the field's own direction; other words are noise around nothing.
TOPICS = {
    "math": ["sum", "plus", "times", "minus", "count"],
    "shell": ["grep", "list", "files", "folder", "delete"],
    "json": ["object", "key", "value", "array", "nested"],
}
NOISE = [f"n{number}" for number in range(40)]


class ScriptedEngine:
    """Words are tokens; ids are made as words are met. `seen` holds every prompt that was embedded."""

    def __init__(self, experts: Sequence[str] = ("math", "shell", "json"), *, max_length: int = 64) -> None:
        self.experts, self.max_length, self.fingerprint = list(experts), max_length, "scripted"
        self.words: list[str] = ["<s>"]
        self.depth = 30
        self.seen: list[list[int]] = []

    def max_length_of(self, expert: Any = None) -> int:
        return self.max_length

    def encode(self, text: str, *, special: bool = True, expert: Any = None) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [0] * special + [self.words.index(word) for word in text.split()]

    def decode(self, ids: Sequence[int], *, expert: Any = None) -> str:
        return " ".join(self.words[n] for n in ids if n)

    def embed(self, prompts: Sequence[Any], *, layers: Sequence[int] = (-1,), pooling: str = "last") -> FloatArray:
        vectors = np.zeros((len(prompts), len(layers), WIDTH), dtype=np.float32)
        for number, prompt in enumerate(prompts):
            ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
            assert 0 < len(ids) <= self.max_length
            self.seen.append(ids)
            vectors[number] = sum(word_vector(self.words[n]) for n in ids)
        return vectors + 5.0  # a common part, as hidden states have

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """An expert likes an answer that holds its own name."""
        return [
            Score(0.0 if str(r.expert) in self.decode(list(r.continuation)) else -9.0, True, len(r.continuation))
            for r in requests
        ]

    def chat_prompt(self, messages: Any, *, expert: Any = None, tools: Any = ()) -> list[int]:
        return self.encode(messages[-1]["content"])

    def generate(self, requests: Any) -> Any:
        raise NotImplementedError


@cache
def word_vector(word: str) -> FloatArray:
    """A fixed random direction for a word; words of one topic share a large part."""
    topic = next((name for name, words in TOPICS.items() if word in words), None)
    vector = _direction(word)
    return vector if topic is None else 2.5 * _direction(f"topic {topic}") + vector


def _direction(word: str) -> FloatArray:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
    vector = np.random.default_rng(seed).standard_normal(WIDTH)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def make_samples(count: int, *, seed: int = 0, fields: Sequence[str] = ("math", "shell", "json")) -> list[Sample]:
    """`count` texts a field: two words of its topic among noise."""
    rng = np.random.default_rng(seed)
    samples = []
    for field in fields:
        for _ in range(count):
            words = [*rng.choice(TOPICS[field], 2), *rng.choice(NOISE, 3)]
            samples.append(Sample(" ".join(map(str, rng.permutation(words))), field, f"answer of {field}"))
    return samples


def strangers(count: int, *, seed: int = 1) -> list[Sample]:
    """Texts that belong to no field."""
    rng = np.random.default_rng(seed)
    return [Sample(" ".join(map(str, rng.choice(NOISE, 5))), "none") for _ in range(count)]
