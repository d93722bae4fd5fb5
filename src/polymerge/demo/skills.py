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
from typing import Any

from ..errors import RecipeError


@dataclass(frozen=True)
class Example:
    """A request and the one right answer. `final` is the number that counts, where only a number does."""

    prompt: str
    answer: str
    final: str | None = None


@dataclass(frozen=True)
class Skill:
    """A named task with training and held-out examples; no prompt is in both."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    def is_right(self, example: Example, text: str) -> bool:
        """Exact match after collapsing white space; for examples with `final`, of the last number in the text."""
        if example.final is not None:
            numbers = [word.strip(".,;:!?$%") for word in text.replace("=", " ").split()]
            numbers = [word for word in numbers if word.lstrip("-").replace(".", "", 1).isdigit()]
            return bool(numbers) and float(numbers[-1]) == float(example.final)
        return " ".join(text.split()) == " ".join(example.answer.split())


# fmt: off
NAMES = [
    "Anna", "Ben", "Carla", "David", "Elena", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Karin", "Leo", "Maria",
    "Nils", "Olga", "Paul", "Rosa", "Sven", "Tina", "Umar",
]
# fmt: on
THINGS = ["apples", "pens", "books", "coins", "cards", "eggs", "shells", "stamps", "stones", "tickets"]
FOLDERS = ["docs", "src", "data", "logs", "photos", "music", "backup", "reports"]
ENDINGS = ["txt", "log", "py", "csv", "jpg", "mp3", "pdf", "json"]


def json_example(rng: random.Random) -> Example:
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
    return Example(sentence.format(name=name, thing=thing, count=count), json.dumps({"name": name, thing: count}))


def math_example(rng: random.Random) -> Example:
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
    return Example(sentence.format(name=name, thing=thing, a=a, b=b), f"{a} + {b} = {a + b}")


def shell_example(rng: random.Random) -> Example:
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
    return Example(request.format(**fill), command.format(**fill))


GENERATORS: dict[str, Callable[[random.Random], Example]] = {
    "json": json_example,
    "math": math_example,
    "shell": shell_example,
}


def demo_skills(*, train: int, test: int, seed: int = 0) -> list[Skill]:
    """The demo's own skills, the same ones for the same numbers."""
    return [_generated(name, make, train, test, random.Random(f"{seed}-{name}")) for name, make in GENERATORS.items()]


def _generated(name: str, make: Callable[[random.Random], Example], train: int, test: int, rng: random.Random) -> Skill:
    examples: dict[str, Example] = {}
    while len(examples) < train + test:
        example = make(rng)
        examples.setdefault(example.prompt, example)
    ordered = list(examples.values())
    return Skill(name, tuple(ordered[test:]), tuple(ordered[:test]))


def read_skills(folder: Path, names: list[str] | None, *, train: int, test: int) -> list[Skill]:
    """Skills from a folder: NAME/train.jsonl and NAME/test.jsonl with `prompt`, `answer` and perhaps `final`.

    Raises:
        RecipeError: a missing file or key, with the file and the line.
    """
    found = names or sorted(path.parent.name for path in folder.glob("*/train.jsonl"))
    if len(found) < 2:
        raise RecipeError(
            f"{folder}: a merge needs at least two skills; found {', '.join(found) or 'no NAME/train.jsonl'}"
        )
    return [
        Skill(
            name, tuple(_read(folder / name / "train.jsonl", train)), tuple(_read(folder / name / "test.jsonl", test))
        )
        for name in found
    ]


def _read(file: Path, count: int) -> list[Example]:
    if not file.is_file():
        raise RecipeError(f"{file}: missing; every skill needs train.jsonl and test.jsonl")
    examples: list[Example] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if len(examples) == count:
            break
        try:
            row: dict[str, Any] = json.loads(line)
            examples.append(Example(row["prompt"], row["answer"], row.get("final")))
        except (ValueError, KeyError, TypeError):
            raise RecipeError(f"{file}, line {number}: not a JSON object with 'prompt' and 'answer'") from None
    return examples
