"""Rows as users send them who write otherwise than the samples: made out of the data folder alone, the same every time.

A field's rows are split by wording: clusters of like texts (k-means of TF-IDF vectors, which know nothing of the model
that is measured) are kept away from the samples, and are the rows of new wording. Test rows of the other clusters are
asked as they are, with an instruction, with a greeting, and with typing errors. GSM8K is math from another source;
strangers are of public sets that no router is fitted to. `Side.DEVELOPMENT` is made of training rows, and of strangers
from other sets: choices are made there, and figures are read off `Side.TEST`.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polymerge.data.rows import read_rows
from polymerge.router.samples import OUTSIDE, Sample, read_fields
from shift import AS_THEY_ARE, Row

CLUSTERS = 6
# Clusters of a field, the largest first, that are kept away from the samples.
AWAY = {"test": (1, 4), "development": (2,)}
CLUSTERED = 600  # training rows of a field that are looked at
POOL, HELD = 160, 40  # samples of a field to draw from, and validation samples
NEW, PLAIN, CHANGED = 40, 20, 16  # rows of a field: of new wording, as they are, and of each change
STRANGERS = 60  # of a set, at most
GREETINGS = (
    ("Hi there! ", " Thanks a lot!"),
    ("Hello, I hope you are well. ", " Thank you in advance."),
    ("Hey, quick one: ", " cheers"),
    ("Good morning. ", " Many thanks, and have a nice day."),
    ("hi, sorry to bother you again. ", " I'd be glad for any help."),
    ("Dear team, ", " Kind regards"),
)
LONGEST = 80  # words of a stranger of the competition's file


class Side(Enum):
    """Where rows come from: choices are made on the one side and figures read off the other."""

    TEST = "test"
    DEVELOPMENT = "development"


class Shifted(NamedTuple):
    """Samples to fit to, validation samples of the same wording, and rows to ask."""

    train: list[Sample]
    held: list[Sample]
    rows: list[Row]


def make(data: Path, fields: Sequence[str], side: Side = Side.TEST) -> Shifted:
    """The samples and rows of these fields, and strangers."""
    train, held, rows = [], [], []
    for field in fields:
        of_field = _of_field(data, field, side)
        train += of_field.train
        held += of_field.held
        rows += of_field.rows
    strangers = _strangers(data) if side is Side.TEST else _other_strangers(data)
    return Shifted(train, held, [*rows, *_other_sources(data, fields, side), *strangers])


def _of_field(data: Path, field: str, side: Side) -> Shifted:
    parts = {
        split: read_fields(data, split, fields=[field], limit=CLUSTERED if split == "train" else None)
        for split in ("train", "validation", "test")
    }
    clusters = _clusters({split: [sample.text for sample in part] for split, part in parts.items()})
    away_from_all = np.isin(clusters["train"], AWAY["test"])
    pool = [parts["train"][n] for n in np.flatnonzero(~away_from_all)[:POOL]]
    kept = np.flatnonzero(~np.isin(clusters["validation"], AWAY["test"]))[:HELD]
    if side is Side.TEST:
        away = np.isin(clusters["test"], AWAY["test"])
        asked = parts["test"]
        return Shifted(pool, [parts["validation"][n] for n in kept], list(_asked(data, field, asked, away)))
    numbers = np.flatnonzero(~away_from_all)
    away = np.isin(clusters["train"][numbers], AWAY["development"])
    train = [parts["train"][n] for n in numbers[:POOL][~away[:POOL]]]
    held = [parts["validation"][n] for n in kept if clusters["validation"][n] not in AWAY["development"]]
    after = [parts["train"][n] for n in numbers[POOL:]]
    return Shifted(train, held, list(_asked(data, field, after, away[POOL:])))


def _clusters(texts: dict[str, list[str]]) -> dict[str, Any]:
    """The cluster of every text, 0 the largest among the training rows; fitted to these alone."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(sublinear_tf=True, min_df=2).fit(texts["train"])
    fitted = KMeans(CLUSTERS, n_init=3, random_state=0).fit(words.transform(texts["train"]))
    place = np.argsort(np.argsort(-np.bincount(fitted.labels_, minlength=CLUSTERS), kind="stable"))
    return {split: place[fitted.predict(words.transform(part))] for split, part in texts.items()}


def _asked(data: Path, field: str, samples: Sequence[Sample], away: Any) -> Iterator[Row]:
    """Rows of new wording, and of known wording as they are and changed."""
    new = (sample for sample, kept_away in zip(samples, away, strict=True) if kept_away)
    for sample in islice(new, NEW):
        yield Row(sample.text, field, "new wording", sample.answer)
    known = (sample for sample, kept_away in zip(samples, away, strict=True) if not kept_away)
    instruction = json.loads((data / "instructions.json").read_text(encoding="utf-8"))[field]
    changes: dict[str, tuple[int, Callable[[str, random.Random], str]]] = {
        AS_THEY_ARE: (PLAIN, lambda text, rng: text),
        "instruction": (CHANGED, lambda text, rng: instruction.replace("{prompt}", text)),
        "greeting": (CHANGED, _greeted),
        "typing errors": (CHANGED, mistyped),
    }
    for kind, (count, change) in changes.items():
        for sample in islice(known, count):
            yield Row(change(sample.text, random.Random(sample.text)), field, kind, sample.answer)


def _greeted(text: str, rng: random.Random) -> str:
    before, after = rng.choice(GREETINGS)
    return f"{before}{text}{after}"


def mistyped(text: str, rng: random.Random) -> str:
    """The text with a letter lost, doubled or swapped in every fourth longer word, at least in one."""
    words = text.split(" ")
    long = [n for n, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    for number in rng.sample(long, min(len(long), max(1, len(long) // 4))):
        word = words[number]
        place = rng.randrange(1, len(word) - 1)
        lost, doubled, swapped = word[place + 1], word[place] * 2 + word[place + 1], word[place + 1] + word[place]
        words[number] = word[:place] + rng.choice([lost, doubled, swapped]) + word[place + 2 :]
    return " ".join(words)


def _other_sources(data: Path, fields: Sequence[str], side: Side) -> list[Row]:
    """GSM8K for math."""
    if "math" not in fields or side is not Side.TEST:
        return []
    return [Row(text, "math", "other source") for text in _prompts(data / "router/routellm_gsm8k.jsonl", STRANGERS)]


def _strangers(data: Path) -> list[Row]:
    """Chat, logic, restaurants as forms, exams. Rows that count objects are left out: they are no strangers to math."""
    logic = [row["prompt"] for _, row in read_rows(data / "heldout/bbh.jsonl") if row["task"] != "object_counting"]
    texts = {
        "chat": _prompts(data / "heldout/clinc_oos.jsonl", STRANGERS),
        "logic": _spread(logic, STRANGERS),
        "restaurants": _prompts(data / "heldout/e2e.jsonl", STRANGERS // 2),
        "exams": _prompts(data / "router/routellm_mmlu.jsonl", STRANGERS),
    }
    return [Row(text, OUTSIDE, kind) for kind, part in texts.items() for text in part]


def _other_strangers(data: Path) -> list[Row]:
    """Short tasks of the competition's file, without those of GSM8K and MMLU."""
    kinds = [row["task"] for _, row in read_rows(data / "competition/test_tasks.jsonl")]
    with (data / "competition/test.csv").open(newline="", encoding="utf-8") as file:
        texts = [row["input"] for row in csv.DictReader(file)]
    chosen = [
        text
        for text, kind in zip(texts, kinds, strict=True)
        if kind not in ("gsm8k", "mmlu") and text.strip() and len(text.split()) <= LONGEST
    ]
    return [Row(text, OUTSIDE, "competition") for text in _spread(chosen, STRANGERS)]


def _prompts(file: Path, count: int) -> list[str]:
    return _spread([row["prompt"] for _, row in read_rows(file)], count)


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """So many of them from all over the file."""
    return [texts[n] for n in np.unique(np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(int))]
