"""The form of an answer in llama.cpp's words: a JSON schema, or a grammar in GBNF. Knows nothing of requests."""

from __future__ import annotations

import json
from typing import Any

from ...errors import ModelError
from ..structure import Structure


def form_of(structure: Structure | None) -> dict[str, Any]:
    """Fields of /completion. What may go on with calls of tools is not held to anything there.

    Raises:
        ModelError: llama.cpp does not take this form.
    """
    if structure is None or structure.kind == "calls":
        return {}
    if structure.kind == "json":
        return {"json_schema": json.loads(structure.text)}
    if structure.kind == "choice":
        return {"grammar": "root ::= " + " | ".join(map(json.dumps, json.loads(structure.text)))}
    if structure.kind == "regex":
        raise ModelError(f"{structure.name}: llama.cpp takes no regular expressions; say it as a grammar in GBNF")
    if "::=" not in structure.text:
        raise ModelError(f"{structure.name}: llama.cpp takes grammars in GBNF")
    return {"grammar": structure.text}
