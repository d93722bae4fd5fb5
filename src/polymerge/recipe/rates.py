"""The compress rate of every matrix: one for all, one a layer, or one a pattern of names.

Knows how rates are written and which one a name has; does not know what a rate means (`polymerge.method.rsvd`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, TypeAlias

from pydantic import PlainSerializer, PlainValidator

# The published setting; what a mapping without `default` has for the rest.
PUBLISHED_RATE = 0.95
DEFAULT = "default"
# One number, one a layer, or pattern -> number.
AnyRates: TypeAlias = float | tuple[float, ...] | dict[str, float]


def read_rates(value: Any) -> Any:
    """A number, a list of them or a mapping to them, each in [0, 1]. Raises ValueError."""
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("an empty list has no rate for any layer")
        return tuple(_rate(number, f"number {place}") for place, number in enumerate(value, 1))
    if isinstance(value, dict):
        if not value or not all(isinstance(name, str) and name for name in value):
            raise ValueError("a mapping needs patterns of names, such as '*.mlp.*', and rates")
        return {name: _rate(number, repr(name)) for name, number in value.items()}
    return _rate(value, "")


def _rate(value: Any, whose: str) -> float:
    of = f"{whose}: " if whose else ""
    try:
        if isinstance(value, bool):
            raise ValueError
        rate = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{of}{value!r} is not a number; give one, a list of one a layer, or patterns") from None
    if not math.isfinite(rate):
        raise ValueError(f"{of}Input should be a finite number")
    if not 0.0 <= rate <= 1.0:
        bound = "greater than or equal to 0" if rate < 0 else "less than or equal to 1"
        raise ValueError(f"{of}Input should be {bound}")
    return rate + 0.0  # -0.0 is 0


Rates: TypeAlias = Annotated[AnyRates, PlainValidator(read_rates), PlainSerializer(lambda rates: rates)]


def read_named_rates(value: Any) -> Any:
    """As `read_rates`, of what is in no layer: no list. Raises ValueError."""
    if isinstance(value, list | tuple):
        raise ValueError("embeddings and heads are in no layer; give one number, or patterns of names")
    return read_rates(value)


NamedRates: TypeAlias = Annotated[
    float | dict[str, float], PlainValidator(read_named_rates), PlainSerializer(lambda rates: rates)
]


def rate_of(rates: AnyRates, *names: str) -> float:
    """The rate of a matrix.

    Of a list, the number of its layer, and the lowest where it is in none. Of a mapping, that of the first pattern that
    one of its names matches, as shells match (`*`, `?`, `[0-3]`), and then `default`'s.

    Args:
        names: its module's, in which the layer's number is the first, and others that patterns may match.
    """
    if isinstance(rates, dict):
        first = _first_pattern(rates, names)
        return rates[first] if first is not None else rates.get(DEFAULT, PUBLISHED_RATE)
    if isinstance(rates, tuple):
        layer = layer_number(names[0])
        return rates[layer] if 0 <= layer < len(rates) else min(rates)
    return rates


def _first_pattern(rates: Iterable[str], names: Iterable[str]) -> str | None:
    patterns = (pattern for pattern in rates if pattern != DEFAULT)
    return next((p for p in patterns if any(fnmatchcase(name, p) for name in names)), None)


def tilted(rate: float, layers: int, tilt: float) -> AnyRates:
    """One rate a layer: the first keeps 2 ** `tilt` times what `rate` keeps, the last 2 ** -`tilt` times.

    A `tilt` of 0, or a model of one layer, has one rate for all.
    """
    if not tilt or layers < 2:
        return rate
    shares = ((1 - rate) * 2 ** (tilt * (1 - 2 * layer / (layers - 1))) for layer in range(layers))
    return tuple(round(1 - min(1.0, share), 6) for share in shares)


def misfit(rates: AnyRates, matrices: Iterable[tuple[str, ...]]) -> str | None:
    """Why rates are not those of a model with these matrices (their names, as for `rate_of`); None where they are."""
    matrices = list(matrices)
    if isinstance(rates, tuple):
        layers = count_layers(names[0] for names in matrices)
        return None if len(rates) == layers else f"has {len(rates)} numbers, but the model has {layers} layers"
    if isinstance(rates, dict):
        for pattern in (pattern for pattern in rates if pattern != DEFAULT):
            if not any(fnmatchcase(name, pattern) for names in matrices for name in names):
                example = f", such as {matrices[0][0]!r}" if matrices else ""
                return f"the pattern {pattern!r} matches no matrix{example}"
            if not any(_first_pattern(rates, names) == pattern for names in matrices):
                return f"the pattern {pattern!r} is never the first that matches; write it before the wider ones"
    return None


def in_words(rates: AnyRates) -> str:
    """`0.95`; `0.5 to 0.95 by layer`; `0.9 for *.mlp.*, 0.95 for the rest`."""
    if isinstance(rates, tuple):
        return f"{min(rates):g} to {max(rates):g} by layer"
    if isinstance(rates, dict):
        named = [f"{rate:g} for {pattern}" for pattern, rate in rates.items() if pattern != DEFAULT]
        return ", ".join([*named, f"{rates.get(DEFAULT, PUBLISHED_RATE):g} for the rest"])
    return f"{rates:g}"


def layer_number(module: str) -> int:
    """The first number in a module's name, -1 where there is none."""
    number = re.search(r"\.(\d+)\.", module)
    return int(number[1]) if number else -1


def count_layers(modules: Iterable[str]) -> int:
    """The highest layer's number in names of modules, + 1; 0 where none has a number."""
    return max(map(layer_number, modules), default=-1) + 1
