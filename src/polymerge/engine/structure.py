"""The form that an answer must have: JSON, a regular expression, one of some texts, a grammar, calls of tools.

Knows how a form is written down. Does not know tokens or how an answer is held to it (`polymerge.engine.grammar`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ModelError

Kind = Literal["json", "regex", "choice", "grammar", "calls"]


@dataclass(frozen=True)
class Structure:
    """One form.

    Attributes:
        text: a JSON schema, a regular expression, a JSON list of texts, a grammar in Lark's syntax or in GBNF, or the
            JSON object of `calls_structure`.
        name: of the option that asked for it, with which errors begin.
    """

    kind: Kind
    text: str
    name: str = "structure"


def json_structure(schema: Mapping[str, Any] | str | bool, name: str = "json_schema") -> Structure:
    """Valid JSON that a schema allows; a schema may be given as its text."""
    return Structure("json", schema if isinstance(schema, str) else json.dumps(schema), name)


def json_object(name: str = "json_object") -> Structure:
    """Any JSON object."""
    return json_structure({"type": "object"}, name)


def choice_structure(choices: Sequence[str], name: str = "choice") -> Structure:
    """One of these texts, character for character."""
    return Structure("choice", json.dumps(list(choices)), name)


def calls_structure(
    begin: str, schema: Mapping[str, Any], end: str, *, several: bool, name: str = "tools"
) -> Structure:
    """Free text, which may go on with calls of tools: whatever stands between `begin` and `end` is JSON of the schema.

    Args:
        begin: may be the text of a special token. Empty: the whole answer is one call, or text that does not begin
            like one.
        several: whether another call may follow one.
    """
    said = {"begin": begin, "schema": schema, "end": end, "several": several}
    return Structure("calls", json.dumps(said), name)


def asked_structure(
    *,
    json_schema: Mapping[str, Any] | str | Path | None = None,
    json_object: bool = False,
    regex: str | None = None,
    grammar: str | Path | None = None,
    choice: Sequence[str] | None = None,
) -> Structure | None:
    """The one form that is asked for; None where there is none.

    Args:
        json_schema: a schema, its file, or its text.
        grammar: in Lark's syntax or GBNF, or its file.

    Raises:
        ModelError: two forms, a file that cannot be read, or no answer to choose from.
    """
    asked = []
    if choice is not None and not choice:
        raise ModelError("--choice: an empty list leaves no answer to choose from")
    if json_schema is not None:
        given = json_schema if isinstance(json_schema, Mapping) else _text(json_schema, "--json-schema")
        asked.append(json_structure(given, "--json-schema"))
    if json_object:
        asked.append(json_structure({"type": "object"}, "--json-object"))
    if regex is not None:
        asked.append(Structure("regex", regex, "--regex"))
    if grammar is not None:
        asked.append(Structure("grammar", _text(grammar, "--grammar"), "--grammar"))
    if choice is not None:
        asked.append(choice_structure(choice, "--choice"))
    if len(asked) > 1:
        raise ModelError(f"{asked[1].name}: not together with {asked[0].name}; an answer has one form")
    return asked[0] if asked else None


def _text(given: str | Path, name: str) -> str:
    """The text of a file, or a text that is none's name."""
    if isinstance(given, str) and any(sign in given for sign in "{\n=:"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise ModelError(f"{name}: {given}: cannot be read ({reason})") from None
