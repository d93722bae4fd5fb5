"""A JSON file that says which version of its format it has: read whole and checked, or one line that says the fix.

Knows how such a file may be broken. Does not know what it is: a bundle's manifest, its router, an export's note.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ..errors import PolymergeError, first_problem

Content = TypeVar("Content", bound=BaseModel)


def read_versioned(kind: type[Content], file: Path, *, error: type[PolymergeError], missing: str, fix: str) -> Content:
    """The file's content.

    Args:
        kind: its `format_version` names those that can be read.
        error: raised for a file that is missing (`missing` is all it says), damaged (`fix` is the end of what it
            says), or of another version.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(missing) from None
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{file}: cannot be read: {reason}; {fix}") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    versions = get_args(kind.model_fields["format_version"].annotation)
    if version not in versions:
        *others, last = versions
        known = f"versions {', '.join(map(str, others))} and {last}" if others else f"version {last}"
        raise error(f"{file}: format version {version!r}; this polymerge reads {known}")
    try:
        return kind.model_validate(data)
    except ValidationError as reason:
        raise error(f"{file}: {first_problem(reason)}; {fix}") from None
