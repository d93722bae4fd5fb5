"""What a row of one's own data must hold: `prompt`, `answer`, `choices`, `final`, `task`. Other keys are left alone.

Knows keys and their values; does not know models, nor what a reader makes of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, field_validator, model_validator

from ..errors import DataError, first_problem
from .rows import parse_object, place, read_rows
from .score import as_number


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


# A text, or a number, which is taken as its text: 0 is "0".
Text = Annotated[str, BeforeValidator(_text)]


class PromptRow(BaseModel):
    """Something to ask."""

    model_config = ConfigDict(frozen=True, extra="allow")

    prompt: str

    @field_validator("prompt")
    @classmethod
    def _is_not_empty(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("must not be empty")
        return prompt

    def text(self, key: str) -> str | None:
        """The text or number under a further key; None where there is neither."""
        value = _text((self.model_extra or {}).get(key))
        return value if isinstance(value, str) else None


class ExampleRow(PromptRow):
    """Something to ask, with an answer where there is one."""

    answer: Text | None = None


class AnsweredRow(PromptRow):
    """A question whose right answer is known; `polymerge.data.score` judges by these keys.

    Attributes:
        choices: the closed list that `answer` is one of.
        final: the number that counts in the answer; the rest of the answer does not.
        task: a name for a kind of question inside a file.
    """

    answer: Text
    choices: tuple[Text, ...] | None = None
    final: Text | None = None
    task: str | None = None

    @field_validator("choices")
    @classmethod
    def _some_or_none(cls, choices: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if choices == ():
            raise ValueError("is empty; leave it out where an answer is free")
        return choices

    @field_validator("final")
    @classmethod
    def _is_a_number(cls, final: str | None) -> str | None:
        if final is not None and as_number(final) is None:
            raise ValueError("must be a number, like 42, -3 or 1,250.5")
        return final

    @model_validator(mode="after")
    def _is_a_choice(self) -> AnsweredRow:
        if self.choices is not None and self.answer not in self.choices:
            raise ValueError("the answer is not one of the choices")
        if self.choices is not None and not all(choice.strip() for choice in self.choices):
            raise ValueError("a choice is empty")
        if self.choices is not None and len({choice.strip() for choice in self.choices}) < len(self.choices):
            raise ValueError("two choices are the same")
        if self.choices is not None and len(self.choices) == 1:
            raise ValueError("it has one choice alone, which is always right")
        if not self.answer.strip():
            raise ValueError("the answer is empty")
        return self


AnyRow = TypeVar("AnyRow", bound=PromptRow)


def read_as(kind: type[AnyRow], file: str | Path) -> Iterator[tuple[int, AnyRow]]:
    """(line, row) of a JSONL file, one after the other.

    Raises:
        DataError: one line, with the file, the line and what is wrong.
    """
    for number, data in read_rows(file):
        yield number, as_row(kind, data, place(file, number))


def read_all(kind: type[AnyRow], file: str | Path, limit: int | None = None) -> list[AnyRow]:
    """The rows of a file, or its first `limit`. Raises DataError as `read_as` does, and where there is none."""
    rows = [row for _, row in islice(read_as(kind, file), limit)]
    if not rows:
        needed = " and ".join(f"'{name}'" for name, key in kind.model_fields.items() if key.is_required())
        raise DataError(f"{file}: holds no rows; a row is a JSON object with {needed}")
    return rows


def parse_row(kind: type[AnyRow], text: str, where: str) -> AnyRow:
    """The row that a line holds. Raises DataError, which begins with `where`."""
    try:
        data = parse_object(text)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return as_row(kind, data, where)


def as_row(kind: type[AnyRow], data: dict[str, Any], where: str) -> AnyRow:
    """A row with its keys checked. Raises DataError, which begins with `where`."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise DataError(f"{where}: {first_problem(error)}") from None
