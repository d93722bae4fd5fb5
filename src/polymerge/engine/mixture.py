"""How a person names what answers: an expert, the average, or several experts by their weights, `math:0.7+code:0.3`.

The one reader of such words, for the API's `model` and the command line's `--expert`. Names hold neither `+` nor `:`.
Knows words; whether there is such an expert is the engine's to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    from ..model.assignment import RowExpert

AVERAGE = "average"


def expert_of(text: str) -> RowExpert:
    """What an engine is asked for: a name, None for `average`, or a mixture {name: weight}. A part without a weight
    has 1; only their shares count.

    Raises:
        ModelError: a part without a name, named twice, or with a weight that is no positive number.
    """
    if "+" not in text and ":" not in text:
        return None if text == AVERAGE else text
    mixture: dict[str, float] = {}
    for part in text.split("+"):
        name, colon, weight = part.strip().partition(":")
        if not name or name in mixture:
            raise ModelError(f"{text}: {'an expert has no name' if not name else f'{name} is there twice'}")
        mixture[name] = _weight(weight, text) if colon else 1.0
    return mixture


def in_words(expert: RowExpert) -> str:
    """What `expert_of` reads as this expert."""
    if isinstance(expert, Mapping):
        return "+".join(f"{name}:{weight}" for name, weight in expert.items())
    return AVERAGE if expert is None else expert


def members(expert: RowExpert) -> set[str]:
    """The names in what an engine is asked for."""
    named = {expert} if isinstance(expert, str) else set(expert or ())
    return named - {AVERAGE}


def _weight(words: str, text: str) -> float:
    try:
        weight = float(words)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ModelError(f"{text}: {words!r} is no weight; write it as math:0.7+code:0.3")
    return weight
