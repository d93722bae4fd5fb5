"""The form of an answer in llama.cpp's words: a JSON schema, or a grammar in GBNF. Knows nothing of requests.

xllamacpp is built with llguidance, which reads its options from the schema and takes grammars of its own; a llama.cpp
without it passes over the options, bounds white space itself, and ends its process at such a grammar.
"""

from __future__ import annotations

import json
from typing import Any

from ...errors import ModelError
from ..grammar import calls_in_lark
from ..structure import Structure

# Its llguidance lets white space go on without an end, whatever pattern it is given, and a weak model writes nothing
# else then: JSON stands on one line, as json.dumps writes it.
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}


# How llama.cpp is told that a grammar is one of llguidance's.
LLGUIDANCE = "%llguidance {}\n"


def form_of(structure: Structure | None, tokenizer: Any = None) -> dict[str, Any]:
    """Fields of /completion.

    Args:
        tokenizer: transformers', for a llama.cpp that is known to have llguidance. Of any other, what may go on with
            calls of tools is not held to anything.

    Raises:
        ModelError: llama.cpp does not take this form.
    """
    if structure is None:
        return {}
    if structure.kind == "calls":
        return {"grammar": LLGUIDANCE + calls_in_lark(structure, tokenizer, ONE_LINE)} if tokenizer else {}
    if structure.kind == "json":
        schema = json.loads(structure.text)
        return {"json_schema": {**schema, "x-guidance": ONE_LINE} if isinstance(schema, dict) else schema}
    if structure.kind == "choice":
        return {"grammar": "root ::= " + " | ".join(map(json.dumps, json.loads(structure.text)))}
    if structure.kind == "regex":
        raise ModelError(f"{structure.name}: llama.cpp takes no regular expressions; say it as a grammar in GBNF")
    if "::=" not in structure.text:
        raise ModelError(f"{structure.name}: llama.cpp takes grammars in GBNF")
    return {"grammar": structure.text}
