"""Data sets of one's own: JSONL files whose rows hold a prompt and its answer.

A row has `prompt` and `answer`; `choices` where the answer is one of a closed list; `final` where only a number
counts; `task` where a file holds several kinds. Other keys are left alone. Knows files; does not know models.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, field_validator, model_validator

from ..errors import RecipeError


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class Row(BaseModel):
    """One question.

    Attributes:
        choices: the closed list that `answer` is one of.
        final: the number that counts in the answer; the rest of the answer does not.
        task: a name for a kind of question inside a file.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    prompt: str
    answer: Annotated[str, BeforeValidator(_text)]
    choices: tuple[str, ...] | None = None
    final: Annotated[str, BeforeValidator(_text)] | None = None
    task: str | None = None

    @field_validator("prompt")
    @classmethod
    def _is_not_empty(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("must not be empty")
        return prompt

    @field_validator("final")
    @classmethod
    def _is_a_number(cls, final: str | None) -> str | None:
        if final is not None:
            float(final.replace(",", ""))
        return final

    @model_validator(mode="after")
    def _is_a_choice(self) -> Row:
        if self.choices is not None and self.answer not in self.choices:
            raise ValueError("the answer is not one of the choices")
        if self.choices is not None and not all(self.choices):
            raise ValueError("a choice is empty")
        return self


def read_rows(file: Path, limit: int | None = None) -> list[Row]:
    """The rows of a file, or its first `limit`. Empty lines are left out.

    Raises:
        RecipeError: one line, with the file, the line and what is wrong.
    """
    rows: list[Row] = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(rows) == limit:
                    break
                if line.strip():
                    rows.append(_row(line, f"{file}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise RecipeError(f"{file}: holds no rows; a row is a JSON object with 'prompt' and 'answer'")
    return rows


def content_hash(file: Path) -> str:
    """SHA-256 of a file. Raises RecipeError where it cannot be read."""
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from None


def files_by_name(folder: Path, split: str = "test") -> dict[str, Path]:
    """NAME -> NAME/`split`.jsonl, in the order of the names. Raises RecipeError where there is none."""
    found = {file.parent.name: file for file in sorted(folder.glob(f"*/{split}.jsonl"))}
    if not found:
        raise RecipeError(f"{folder}: holds no NAME/{split}.jsonl")
    return found


def _row(line: str, where: str) -> Row:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise RecipeError(f"{where}: not a JSON object") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: not a JSON object")
    try:
        return Row.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{where}: {name + ': ' if name else ''}{message}") from None
