"""Which expert answers a request: a model's name, or the router's choice over a conversation.

The server keeps no conversations. With `auto` every request brings all its turns, so the same walk over them finds the
same expert: the first user turn chooses, and a later one changes the expert only where its field is likelier than the
conversation's by a margin. Routes are remembered by a hash of their text, so only the newest turn is embedded.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..engine.base import Engine
from ..engine.mixture import AVERAGE, expert_of, members
from ..router.route import Route, Routes
from .errors import ApiError, about
from .lanes import Lane
from .settings import ServeSettings

if TYPE_CHECKING:
    from ..model.assignment import RowExpert

# Texts that the router is given in one call; others wait for as long as that takes.
TEXTS_AT_ONCE = 8
AUTO, STAGED = "auto", "staged"


@dataclass(frozen=True)
class Choice:
    """The expert of one answer, and why.

    Attributes:
        expert: what the engine is asked for.
        route: None where the request named the expert.
        kept: whether the conversation's expert was kept against the last turn's own route.
        stage, thoughts: of the staged response.
    """

    expert: RowExpert
    route: Route | None = None
    kept: bool = False
    stage: str = "direct"
    reason: str = ""
    thoughts: str | None = None

    @property
    def name(self) -> str:
        """For people and labels; a mixture as JSON."""
        if self.expert is None:
            return AVERAGE
        return self.expert if isinstance(self.expert, str) else json.dumps(dict(self.expert), sort_keys=True)

    @property
    def body(self) -> dict[str, Any]:
        """`response.polymerge`."""
        expert = self.expert if isinstance(self.expert, Mapping) else self.name
        route = self.route
        return {
            "expert": dict(expert) if isinstance(expert, Mapping) else expert,
            "field": route.field if route else None,
            "confidence": round(route.confidence, 4) if route else None,
            "fallback": route.fallback if route else False,
            "kept": self.kept,
            "reason": self.reason or (route.reason if route else "the request named it"),
            "stage": self.stage,
        } | ({"thoughts": self.thoughts} if self.thoughts is not None else {})

    @property
    def headers(self) -> dict[str, str]:
        """Header values are percent-encoded where they are not plain ASCII."""
        headers = {"x-polymerge-expert": quote(self.name, safe=' {}":,.')}
        if self.route:
            headers["x-polymerge-field"] = quote(self.route.field, safe=" ")
            headers["x-polymerge-confidence"] = f"{self.route.confidence:.4f}"
        return headers


class Chooser:
    """Names and texts to experts. Used from the event loop; the router embeds in a thread of its own.

    Args:
        settings: its `margin`, `max_turns` and `max_routes` count.
    """

    def __init__(self, engine: Engine, router: Routes | None, settings: ServeSettings, *, staged: bool = False) -> None:
        self._engine, self._router, self._settings, self._staged = engine, router, settings, staged
        self._known: OrderedDict[bytes, Route] = OrderedDict()
        self._lane = Lane("router", router.route, TEXTS_AT_ONCE) if router else None

    @property
    def models(self) -> list[str]:
        """What `model` may be, mixtures apart."""
        first, last = [AUTO] if self._router else [], [STAGED] if self._staged else []
        return [*first, *self._engine.experts, AVERAGE, *last]

    async def choose(self, model: str, turns: Sequence[str], *, sticky: bool = True) -> Choice:
        """The expert for a conversation of these user turns; a plain text is one turn.

        Raises:
            ApiError: there is no such model.
        """
        self.check(model)
        if model != AUTO:
            return Choice(expert_of(model))
        texts = [turn for turn in turns if turn.strip()]
        if not texts:
            return Choice(None, reason="there is no text to route by")
        routes = await self.routes(texts[-self._settings.max_turns :] if sticky else texts[-1:])
        choice = self._walk(routes)
        if missing := members(choice.expert).difference(self._engine.experts):
            reason = f"the router chose {', '.join(sorted(missing))}, which is not loaded; the average answers"
            return replace(choice, expert=None, reason=reason)
        return choice

    def check(self, model: str) -> None:
        """Raises ApiError unless the model is there, or all members of a mixture are."""
        if model in self.models:
            return
        with about("model"):
            mixture = expert_of(model)
        if isinstance(mixture, Mapping):
            for member in mixture:
                self.check(member)
                if member in (AUTO, STAGED):
                    raise ApiError(400, f"model: {member} is no part of a mixture", param="model")
            return
        near = difflib.get_close_matches(model, self.models, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(self.models)}"
        if model == AUTO:
            hint = "; this bundle has no router, name an expert"
        raise ApiError(404, f"no model {model!r}{hint}", param="model", code="model_not_found")

    async def routes(self, texts: Sequence[str]) -> list[Route]:
        """One route a text; only those not remembered are embedded."""
        if self._lane is None:
            raise ApiError(404, "this bundle has no router", code="model_not_found")
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        routes = {key: self._known[key] for key in keys if key in self._known}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in routes}
        if new:
            routes |= dict(zip(new, await self._lane.ask(list(new.values())), strict=True))
        for key in keys:
            self._known[key] = routes[key]
            self._known.move_to_end(key)
        while len(self._known) > self._settings.max_routes:
            self._known.popitem(last=False)
        return [routes[key] for key in keys]

    def _walk(self, routes: Sequence[Route]) -> Choice:
        kept = routes[0]
        for route in routes[1:]:
            if kept.fallback or self._changes(kept, route):
                kept = route
        last = routes[-1]
        if kept is last or kept.expert == last.expert:
            return Choice(last.expert, last)
        alone = "the fallback" if last.fallback else last.field
        reason = f"the conversation is about {kept.field}; its last turn alone would go to {alone}"
        return Choice(kept.expert, kept, kept=True, reason=reason)

    def _changes(self, kept: Route, route: Route) -> bool:
        """An unsure turn changes nothing, nor does one that fits the conversation's field almost as well."""
        if route.fallback:
            return False
        ahead = route.scores.get(route.field, route.confidence) - route.scores.get(kept.field, 0.0)
        return route.field == kept.field or ahead >= self._settings.margin
