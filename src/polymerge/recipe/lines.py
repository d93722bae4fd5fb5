"""A YAML file of the user's and the line of a mistake in it: every problem is one line that names both.

Knows YAML and pydantic's problems. Of what a file may say it knows the sections alone, to name the keys that they have.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import RecipeError, on_one_line
from .response import StageSettings, ThinkerSettings
from .source import Source, source_of_text

# A key's path in a YAML file -> its line.
Lines = dict[tuple[str, ...], int]
Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], data: Any, *, where: str, lines: Lines) -> Model:
    """`data` as a model, or a RecipeError of one line.

    Args:
        where: the file's name.
        lines: of its keys, as `read_yaml` returns them.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = _to_tell(error)
        keys = tuple(str(part) for part in first["loc"] if part != "[key]")
        line = next((lines[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in lines), None)
        place = f"{where}, line {line}" if line else where
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"unknown key; {_hint(keys[-1], _fields_at(model, keys))}"
        message = _IN_WORDS.get(message, message)
        if keys[-1:] == ("experts",) and first["type"] in ("dict_type", "missing"):
            message = "write a mapping of names to sources, a line each: `math: ./math`"
        name = on_one_line(".".join(keys)) or "the whole file"
        raise RecipeError(f"{place}: {name}: {message}") from None


def as_source(given: Source | Mapping[str, Any] | str | Path, expert: str) -> Source:
    """One expert's source, as a recipe may write it. Raises RecipeError."""
    return given if isinstance(given, Source) else validated(Source, source_of_text(given), where=expert, lines={})


def _to_tell(error: ValidationError) -> ErrorDetails:
    """The first problem; of a key that is missing, an unknown key beside it that is like it: what it was written as."""
    first, *others = error.errors()
    missing = str(first["loc"][-1]) if first["loc"] else ""
    beside = (
        other
        for other in others
        if other["type"] == "extra_forbidden" and other["loc"][:-1] == first["loc"][:-1]
        if difflib.get_close_matches(str(other["loc"][-1]), [missing])
    )
    return next(beside, first) if first["type"] == "missing" else first


# pydantic's words for Python's types, in YAML's.
_IN_WORDS = {
    "Input should be a valid dictionary": "write a mapping, `key: value`",
    "Input should be a valid dictionary or instance of Recipe": "write a mapping, `key: value` lines, with `experts`",
    "Input should be a valid dictionary or instance of Source": "write a source, or a mapping with `source`",
    "Input should be a valid list": "write a list",
    "Input should be a valid string": "write a text",
    "Field required": "is missing",
}


def _hint(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"


def _fields_at(model: type[BaseModel], keys: tuple[str, ...]) -> set[str]:
    """The keys that are known where `keys` ends: the model's own, or further in those of a section or a source."""
    sections: dict[str, type[BaseModel]] = {"thinker": ThinkerSettings, "staged": StageSettings}
    return set((sections.get(keys[0], Source) if len(keys) > 1 else model).model_fields)


def read_yaml(path: Path) -> tuple[Any, Lines]:
    """The file's content and the line of every key (counted from 1). Raises RecipeError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot read the recipe: {getattr(error, 'strerror', None) or error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: Lines = {}
        if node is not None:
            _collect_lines(node, (), lines, path)
        return yaml.safe_load(text), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise RecipeError(f"{place}: not valid YAML: {reason}") from None
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply, or it holds itself") from None


# What a key is that nobody meant so.
_NO_TEXTS = {
    "tag:yaml.org,2002:bool": "true or false",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:timestamp": "a date",
}


def _collect_lines(node: yaml.Node, at: tuple[str, ...], lines: Lines, path: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*at, str(key.value))
        if isinstance(key, yaml.ScalarNode) and key.tag in _NO_TEXTS:  # `yes`, 1, ~
            kind = _NO_TEXTS[key.tag]
            name = f"{'.'.join(here)}: YAML reads {key.value!r} as {kind}; write it in quotes"
            raise RecipeError(f"{path}, line {key.start_mark.line + 1}: {name}")
        if here in lines:  # YAML itself would let the last one win, silently
            first, again = lines[here], key.start_mark.line + 1
            raise RecipeError(f"{path}, line {again}: {'.'.join(here)}: given twice (first in line {first})")
        lines[here] = key.start_mark.line + 1
        _collect_lines(value, here, lines, path)
