"""What is measured of a served result: accuracy, distance from the originals, and speed on a mixed batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peer_methods.served import Served
from polymerge.demo.measure import accuracy
from polymerge.demo.skills import Skill
from polymerge.demo.train import encode, format_prompt
from polymerge.search.agreement import Agreement, Reference
from polymerge.search.examples import Example

NEW_TOKENS, REPEATS = 16, 3


@dataclass(frozen=True)
class Held:
    """The held-out requests of every expert, and what the originals say on the first of them."""

    skills: Mapping[str, Skill]
    references: Mapping[str, Reference]
    compared: int

    @classmethod
    def of(cls, skills: Sequence[Skill], sources: Mapping[str, str], compared: int) -> Held:
        references = {
            skill.name: Reference(sources[skill.name], [Example(e.prompt, e.answer) for e in skill.test[:compared]])
            for skill in skills
        }
        return cls({skill.name: skill for skill in skills}, references, compared)


def accuracies(served: Served, held: Held) -> dict[str, float]:
    """Greedy answers, exact match: the demo's measure."""
    return {
        name: accuracy(
            lambda ids, mask, room, name=name: served.generate(ids, mask, [name] * len(ids), max_new_tokens=room),  # type: ignore[misc]
            served.tokenizer,
            skill,
        )
        for name, skill in held.skills.items()
    }


def agreements(served: Served, held: Held) -> dict[str, Agreement]:
    """KL(original || result) on each expert's own requests and reference answers."""
    return {name: _agreement(served, held, name) for name in held.skills}


def _agreement(served: Served, held: Held, name: str) -> Agreement:
    tests = held.skills[name].test[: held.compared]
    prompts = iter([len(encode(served.tokenizer, example)[0]) for example in tests])
    return held.references[name].against(lambda ids: served.logits(ids, next(prompts), name), together=0)


def tokens_per_second(served: Served, held: Held, rows: int) -> float:
    """New tokens a second of one batch whose rows take the experts in turn, prompts and routing included."""
    names = [list(held.skills)[number % len(held.skills)] for number in range(rows)]
    texts = [format_prompt(held.skills[name].test[n // len(held.skills)].prompt) for n, name in enumerate(names)]
    inputs: Any = served.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    taken = []
    for _ in range(REPEATS + 1):  # the first one warms up
        began = time.perf_counter()
        options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
        served.generate(inputs["input_ids"], inputs["attention_mask"], names, **options)
        taken.append(time.perf_counter() - began)
    return rows * NEW_TOKENS / statistics.median(taken[1:])


def measure(served: Served, held: Held, rows: int) -> dict[str, Any]:
    """All three, as plain data."""
    with torch.no_grad():
        by_expert = agreements(served, held)
        return {
            "accuracy": accuracies(served, held),
            "kl": {name: agreement.kl for name, agreement in by_expert.items()},
            "top1": {name: agreement.top1 for name, agreement in by_expert.items()},
            "tokens_per_second": tokens_per_second(served, held, rows),
            "one_batch": served.one_batch,
        }
