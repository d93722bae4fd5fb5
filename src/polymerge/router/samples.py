"""The samples that a router learns from and is measured on: a text and the name of its field.

Knows files; does not know models. `DIR/NAME/train.jsonl`, `validation.jsonl` and `test.jsonl` hold one JSON object a
line with `prompt`; the folder's name is the field.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..data.rows import place
from ..data.schema import PromptRow, read_as
from ..errors import DataError, RouterError

# The field of a text that belongs to no known one; such texts are only measured on, never learned from.
OUTSIDE = "none"


@dataclass(frozen=True)
class Sample:
    """A text with its field, and its reference answer where there is one."""

    text: str
    field: str
    answer: str = ""


def samples_of(
    data: str | Path | Sequence[Sample] | Mapping[str, Sequence[str]],
    split: str,
    *,
    fields: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[Sample]:
    """The samples of a folder's split as `read_fields` gives them; or those at hand, which are all for training.

    Raises:
        RouterError: as `read_fields`; or fields beside samples at hand, or what is no list of texts.
    """
    if isinstance(data, str | Path):
        return read_fields(Path(data), split, fields=fields, limit=limit)
    if fields is not None:
        raise RouterError("fields choose among a folder's; of samples at hand, give those that count")
    if split != "train":
        return []
    if isinstance(data, Mapping):
        at_hand = [Sample(text, name) for name, texts in data.items() for text in _texts(texts, name)]
    else:
        at_hand = list(data)
    if limit is None:
        return at_hand
    by_field: dict[str, list[Sample]] = {}
    for sample in at_hand:
        by_field.setdefault(sample.field, []).append(sample)
    return [sample for of_field in by_field.values() for sample in of_field[:limit]]


def _texts(texts: Sequence[str], field: str) -> Sequence[str]:
    """Raises RouterError for what is no list of texts; one text alone would be as many as it has letters."""
    if isinstance(texts, str | bytes) or not all(isinstance(text, str) for text in texts):
        raise RouterError(f"field {field!r}: give a list of texts")
    return texts


def read_fields(
    folder: Path, split: str, *, fields: Sequence[str] | None = None, limit: int | None = None
) -> list[Sample]:
    """The first `limit` samples of every field's `split`; fields in alphabetical order, or as they are given.

    Fields whose folder has no such split are left out.

    Raises:
        RouterError: the folder is missing, or a given field has no folder. DataError: a row is damaged.
    """
    if not folder.is_dir():
        raise RouterError(f"{folder}: no such folder; it holds NAME/train.jsonl for every field")
    missing = [name for name in fields or () if not (folder / name).is_dir()]
    if missing:
        raise RouterError(f"{folder / missing[0]}: no such folder, so there is no field {missing[0]!r}")
    names = fields or sorted(path.name for path in folder.iterdir() if path.is_dir())
    samples = []
    for name in names:
        file = folder / name / f"{split}.jsonl"
        rows = read_as(PromptRow, file) if file.is_file() else ()
        samples += [_sample(row, name) for _, row in islice(rows, limit)]
    return samples


def read_labelled(file: Path, key: str) -> list[Sample]:
    """Rows whose `key` names the field; `none` where no field is right. Raises DataError for a damaged row."""
    samples = []
    for number, row in read_as(PromptRow, file):
        field = row.text(key)
        if field is None:
            raise DataError(f'{place(file, number)}: needs a text "{key}" that names the field')
        samples.append(_sample(row, field))
    return samples


def _sample(row: PromptRow, field: str) -> Sample:
    return Sample(row.prompt, field, row.text("answer") or "")


def repeated(training: Sequence[Sample], validation: Sequence[Sample]) -> list[Sample]:
    """Validation samples whose text is a training sample's too, but for case and spaces: no measure of anything."""
    known = {_plain(sample.text) for sample in training}
    return [sample for sample in validation if _plain(sample.text) in known]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def check_training(samples: Sequence[Sample]) -> list[str]:
    """The fields, sorted. Raises RouterError where a classifier cannot learn from these samples."""
    counts = Counter(sample.field for sample in samples)
    fields = sorted(counts)
    if not fields:
        raise RouterError("no training samples; DIR/NAME/train.jsonl holds those of the field NAME")
    if OUTSIDE in counts:
        raise RouterError(f"a field cannot be called {OUTSIDE!r}: that is the name of texts that belong to no field")
    for name, count in sorted(counts.items()):
        if count < 2:
            raise RouterError(f"field {name!r} has one training sample; give it at least 2")
    return fields
