"""The prompts of both stages: Jinja templates in files, by version, with a user's own in front of them.

Knows where a template is looked for and which variables it may name. Templates run in a sandbox: they see the values
below and nothing else. Does not know models.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import RecipeError
from ..recipe.response import PromptVersion

Stage = Literal["think", "format"]
OWN = Path(__file__).with_name("prompts")
# What a template may name. `thought` is what the thinker wrote.
VARIABLES: Mapping[str, frozenset[str]] = {
    "think": frozenset({"question", "choices", "field"}),
    "format": frozenset({"question", "choices", "field", "thought"}),
}
NAMES = tuple(f"{stage}.{kind}" for stage in ("think", "format") for kind in ("choice", "text"))
FIELD = re.compile(r"[\w][\w .-]{0,63}")


class Templates:
    """The prompts of one version.

    A template is called `think.choice`, `think.text`, `format.choice` or `format.text` (`.jinja`): the stage, and
    whether the answer is one of several choices or free text. It is looked for in `folder/<field>/`, in `folder` and
    among polymerge's own, in this order.

    Raises:
        RecipeError: a template of `folder` does not parse or names an unknown variable; every one is checked at once.
    """

    def __init__(self, version: PromptVersion, folder: str | Path | None = None) -> None:
        self.version = version
        self._environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._files = _files_below(OWN / version)
        if folder is not None:
            self._files |= _files_below(Path(folder))
        self._compiled = {key: self._compile(file) for key, file in self._files.items()}

    @cached_property
    def digest(self) -> str:
        """Changes with every template's text."""
        texts = [f"{key}\0{file.read_text(encoding='utf-8')}" for key, file in sorted(self._files.items())]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

    def render(self, stage: Stage, *, question: str, choices: Sequence[str], field: str, thought: str = "") -> str:
        """The prompt.

        Raises:
            RecipeError: the template fails on these values.
        """
        name = f"{stage}.{'choice' if choices else 'text'}"
        key = (field, name) if (field, name) in self._compiled else ("", name)
        values = {"question": question, "choices": list(choices), "field": field, "thought": thought}
        try:
            return self._compiled[key].render({name: values[name] for name in VARIABLES[stage]})
        except Exception as error:  # a template is a small program: it may raise anything
            raise RecipeError(f"{self._files[key]}: {_reason(error)}") from None

    def _compile(self, file: Path) -> jinja2.Template:
        try:
            text = file.read_text(encoding="utf-8").removesuffix("\n")
            tree = self._environment.parse(text)
            named = jinja2.meta.find_undeclared_variables(tree) - set(self._environment.globals)
            known = VARIABLES[file.name.split(".")[0]]
            if named - known:
                unknown = ", ".join(repr(name) for name in sorted(named - known))
                raise RecipeError(f"{file}: unknown variable {unknown}; known are {', '.join(sorted(known))}")
            return self._environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise RecipeError(f"{file}, line {error.lineno}: {_reason(error)}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{file}: cannot be read: {_reason(error)}") from None


def _files_below(folder: Path) -> dict[tuple[str, str], Path]:
    """(field, template's name) -> file; the field is "" for the templates of all fields."""
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder of templates")
    files = {}
    for file in sorted([*folder.glob("*.jinja"), *folder.glob("*/*.jinja")]):
        field = "" if file.parent == folder else file.parent.name
        if file.stem not in NAMES:
            raise RecipeError(f"{file}: not the name of a template; they are {', '.join(NAMES)} (.jinja)")
        if field and not FIELD.fullmatch(field):
            raise RecipeError(f"{file.parent}: not the name of a field")
        files[field, file.stem] = file
    return files


def _reason(error: Any) -> str:
    return " ".join(str(getattr(error, "message", None) or error).split()) or type(error).__name__
