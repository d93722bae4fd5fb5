"""The form of an answer in vLLM's words, `structured_outputs`. Knows nothing of requests."""

from __future__ import annotations

import json
from typing import Any

from ...errors import ModelError
from ..grammar import in_lark
from ..structure import Structure

# The library that holds the embedded engine's answers. vLLM's own choice lets white space between two signs of JSON go
# on without an end, and a weak model writes nothing else then.
GUIDANCE = {"backend": "guidance"}


def form_of(structure: Structure | None, tokenizer: Any = None) -> dict[str, Any]:
    """Fields of /v1/completions. vLLM refuses itself what it cannot hold.

    Args:
        tokenizer: transformers', for a server that was started with `GUIDANCE`: it gets the embedded engine's grammar
            and would refuse the tags.

    Raises:
        ModelError: what should be JSON is none.
    """
    if structure is None:
        return {}
    if tokenizer is not None and (grammar := in_lark(structure, tokenizer)) is not None:
        return {"structured_outputs": {"grammar": grammar}}
    said: Any = structure.text
    if structure.kind in ("json", "choice"):
        try:
            said = json.loads(structure.text)
        except ValueError as error:
            raise ModelError(f"{structure.name}: cannot be used: {error}") from None
    elif structure.kind == "calls":
        said = _tags(json.loads(structure.text))
        return {"structured_outputs": {"structural_tag": json.dumps(said)}} if said else {}
    return {"structured_outputs": {structure.kind: said}}


def _tags(said: dict[str, Any]) -> dict[str, Any] | None:
    """Free text until a call begins, as XGrammar's structural tags have it. A call without a mark before it is not held
    to its schema."""
    if not said["begin"]:
        return None
    content = {"type": "json_schema", "json_schema": said["schema"]}
    tag = {"type": "tag", "begin": said["begin"], "content": content, "end": said["end"]}
    form = {"type": "triggered_tags", "triggers": [said["begin"].strip()], "tags": [tag]}
    return {"type": "structural_tag", "format": form | ({} if said["several"] else {"stop_after_first": True})}
