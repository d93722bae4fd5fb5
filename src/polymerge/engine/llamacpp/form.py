"""The form of an answer in llama.cpp's words: a JSON schema, or a grammar in GBNF. Knows nothing of requests.

xllamacpp is built with llguidance, which reads its options from the schema; a llama.cpp without it passes over them and
bounds white space itself.
"""

from __future__ import annotations

import json
from typing import Any

from ...errors import ModelError
from ..structure import Structure

# Its llguidance lets white space go on without an end, whatever pattern it is given, and a weak model writes nothing
# else then: JSON stands on one line, as json.dumps writes it.
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}


def form_of(structure: Structure | None) -> dict[str, Any]:
    """Fields of /completion. What may go on with calls of tools is not held to anything there.

    Raises:
        ModelError: llama.cpp does not take this form.
    """
    if structure is None or structure.kind == "calls":
        return {}
    if structure.kind == "json":
        schema = json.loads(structure.text)
        return {"json_schema": {**schema, "x-guidance": ONE_LINE} if isinstance(schema, dict) else schema}
    if structure.kind == "choice":
        quoted = [json.dumps(choice, ensure_ascii=False) for choice in json.loads(structure.text)]
        return {"grammar": "root ::= " + " | ".join(quoted)}  # GBNF's \\u knows no pairs
    if structure.kind == "regex":
        raise ModelError(f"{structure.name}: llama.cpp takes no regular expressions; say it as a grammar in GBNF")
    if "::=" not in structure.text:
        raise ModelError(f"{structure.name}: llama.cpp takes grammars in GBNF")
    return {"grammar": structure.text}
