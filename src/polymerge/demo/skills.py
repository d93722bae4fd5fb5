"""The demo's three skills and their data, generated from templates with a fixed seed: no network, no files.

The three kinds of request look alike, one plain sentence each, and want answers of very different forms. A model that
averages the three experts has to guess which one; an expert does not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..data.schema import AnsweredRow, read_all
from ..errors import DataError


@dataclass(frozen=True)
class SkillExample:
    """A request and the one right answer. `final` is the number that counts, where only a number does."""

    prompt: str
    answer: str
    final: str | None = None


@dataclass(frozen=True)
class Skill:
    """A named task with training and held-out examples; no prompt is in both."""

    name: str
    train: tuple[SkillExample, ...]
    test: tuple[SkillExample, ...]


# fmt: off
NAMES = [
    "Anna", "Ben", "Carla", "David", "Elena", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Karin", "Leo", "Maria",
    "Nils", "Olga", "Paul", "Rosa", "Sven", "Tina", "Umar",
]
# fmt: on
THINGS = ["apples", "pens", "books", "coins", "cards", "eggs", "shells", "stamps", "stones", "tickets"]
FOLDERS = ["docs", "src", "data", "logs", "photos", "music", "backup", "reports"]
ENDINGS = ["txt", "log", "py", "csv", "jpg", "mp3", "pdf", "json"]


def json_example(rng: random.Random) -> SkillExample:
    """An order in a sentence -> the order as JSON."""
    name, thing, count = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 60)
    sentence = rng.choice(
        [
            "Please send {count} {thing} to {name}.",
            "An order for {name}: {count} {thing}.",
            "I need {count} {thing}. My name is {name}.",
            "Give {name} {count} {thing}.",
        ]
    )
    return SkillExample(sentence.format(name=name, thing=thing, count=count), json.dumps({"name": name, thing: count}))


def math_example(rng: random.Random) -> SkillExample:
    """A small word problem -> the sum and its result."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(2, 12), rng.randint(2, 9)
    sentence = rng.choice(
        [
            "{name} has {a} {thing} and gets {b} more.",
            "{name} buys {a} {thing}, then {b} {thing}.",
            "{name} found {a} {thing} and then {b} more.",
            "To {a} {thing}, {name} adds {b}.",
        ]
    )
    return SkillExample(sentence.format(name=name, thing=thing, a=a, b=b), f"{a} + {b} = {a + b}")


def shell_example(rng: random.Random) -> SkillExample:
    """A request about files -> the command."""
    folder, ending, number = rng.choice(FOLDERS), rng.choice(ENDINGS), rng.randint(2, 30)
    request, command = rng.choice(
        [
            ("Find all {e} files in {f}.", "find {f} -name '*.{e}'"),
            ("Delete the {e} files in {f}.", "rm {f}/*.{e}"),
            ("Count the {e} files in {f}.", "ls {f}/*.{e} | wc -l"),
            ("Show the first {n} lines of {f}.{e}.", "head -n {n} {f}.{e}"),
            ("Show the last {n} lines of {f}.{e}.", "tail -n {n} {f}.{e}"),
            ("Pack {f} into {f}{n}.tar.gz.", "tar -czf {f}{n}.tar.gz {f}"),
            ("Copy the {e} files from {f} to {f}{n}.", "cp {f}/*.{e} {f}{n}/"),
        ]
    )
    fill = {"f": folder, "e": ending, "n": number}
    return SkillExample(request.format(**fill), command.format(**fill))


GENERATORS: dict[str, Callable[[random.Random], SkillExample]] = {
    "json": json_example,
    "math": math_example,
    "shell": shell_example,
}


def demo_skills(*, train: int, test: int, seed: int = 0) -> list[Skill]:
    """The demo's own skills, the same ones for the same numbers."""
    return [_generated(name, make, train, test, random.Random(f"{seed}-{name}")) for name, make in GENERATORS.items()]


def _generated(
    name: str, make: Callable[[random.Random], SkillExample], train: int, test: int, rng: random.Random
) -> Skill:
    examples: dict[str, SkillExample] = {}
    while len(examples) < train + test:
        example = make(rng)
        examples.setdefault(example.prompt, example)
    ordered = list(examples.values())
    return Skill(name, tuple(ordered[test:]), tuple(ordered[:test]))


def read_skills(folder: Path, names: list[str] | None, *, train: int, test: int) -> list[Skill]:
    """Skills from a folder: NAME/train.jsonl and NAME/test.jsonl with `prompt`, `answer` and perhaps `final`.

    Raises:
        DataError: a missing file or key, with the file and the line.
    """
    names = names or sorted(path.parent.name for path in folder.glob("*/train.jsonl"))
    if len(names) < 2:
        raise DataError(
            f"{folder}: a merge needs at least two skills; found {', '.join(names) or 'no NAME/train.jsonl'}"
        )
    return [
        Skill(name, _read(folder / name / "train.jsonl", train), _read(folder / name / "test.jsonl", test))
        for name in names
    ]


def _read(file: Path, count: int) -> tuple[SkillExample, ...]:
    if not file.is_file():
        raise DataError(f"{file}: missing; every skill needs train.jsonl and test.jsonl")
    return tuple(SkillExample(row.prompt, row.answer, row.final) for row in read_all(AnsweredRow, file, count))
