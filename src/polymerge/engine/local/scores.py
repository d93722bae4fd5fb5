"""Requests for scores in the pieces that are scored together: those of one context, which is read once.

Knows tokens and how many a piece costs; does not know when it is scored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..base import ScoreRequest

if TYPE_CHECKING:
    from ...model.assignment import RowExpert
    from .engine import HFEngine

# A question with more choices than this is scored in several pieces.
MOST_CHOICES = 16


@dataclass
class ScoreGroup:
    """Requests of one context and one expert, as token ids.

    Attributes:
        places: of the requests in the caller's list.
        tokens: that a model reads for them.
    """

    requests: list[ScoreRequest] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    tokens: int = 0


def grouped(engine: HFEngine, requests: Sequence[ScoreRequest], check: Callable[[RowExpert], None]) -> list[ScoreGroup]:
    """The requests by context, each context in its first one's place.

    Args:
        check: refuses an expert that there is not.

    Raises:
        ModelError: as `loglikelihood` does.
    """
    groups: list[ScoreGroup] = []
    open_groups: dict[tuple[tuple[int, ...], str], ScoreGroup] = {}
    for place, request in enumerate(requests):
        check(request.expert)
        context, continuation = engine.pair(request)
        key = (tuple(context), json.dumps(request.expert, sort_keys=True))
        group = open_groups.get(key)
        if group is None or len(group.requests) >= MOST_CHOICES:
            group = open_groups[key] = ScoreGroup(tokens=len(context))
            groups.append(group)
        group.requests.append(replace(request, context=context, continuation=continuation))
        group.places.append(place)
        group.tokens += len(continuation)
    return groups
