"""Numbers as a user writes them in a recipe: true is none, and bytes may have a unit.

Knows no key; which of them have which bounds is theirs.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator


def no_switch(value: Any) -> Any:
    """A value that is not true or false, which Python takes for 1 and 0. Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number")
    return value


def parse_size(value: Any) -> Any:
    """Bytes of `48 GB`, `512 MB` or a plain number (decimal, as disks and GPUs are sold)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)B?\s*", value) if isinstance(value, str) else None
    if isinstance(value, str) and not match:
        raise ValueError(f"{value!r} is not a size; write it as 48 GB or 512 MB")
    return round(float(match[1]) * 1000 ** " kMGT".index(match[2] or " ")) if match else value


Whole: TypeAlias = Annotated[int, BeforeValidator(no_switch)]
Real: TypeAlias = Annotated[float, BeforeValidator(no_switch)]
Size: TypeAlias = Annotated[Whole, BeforeValidator(parse_size)]
