"""What the server counts, for Prometheus. Labels come from closed lists: no client can make a new series."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..engine.streaming import EngineState
from .routing import Choice

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class Metrics:
    """The server's counters, in a registry of their own.

    Args:
        state: the engine's.
        places: of the server's gate, that are taken.
    """

    def __init__(self, state: Callable[[], EngineState], places: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "polymerge_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=registry
        )
        self.seconds = Histogram(
            "polymerge_request_seconds",
            "From request to the answer's end.",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "polymerge_first_token_seconds", "From request to the first text.", buckets=SECONDS, registry=registry
        )
        self.tokens = Counter("polymerge_tokens", "Tokens read and made.", ["kind"], registry=registry)
        self.routes = Counter("polymerge_routes", "Routed requests by expert.", ["expert"], registry=registry)
        self.fallbacks = Counter("polymerge_fallbacks", "Routed requests that went to the fallback.", registry=registry)
        self.truncated = Counter("polymerge_truncated", "Texts that were cut to be routed.", registry=registry)
        self.confidence = Histogram(
            "polymerge_confidence", "The router's confidence.", buckets=SHARES, registry=registry
        )
        self.route_seconds = Histogram(
            "polymerge_route_seconds", "To choose the expert.", buckets=SECONDS, registry=registry
        )
        for name, what in (("running", "Answers in the running batch."), ("waiting", "Requests in the queue.")):
            gauge = Gauge(f"polymerge_{name}", what, registry=registry)
            gauge.set_function(lambda name=name: float(getattr(state(), name)))  # type: ignore[misc]
        held = Gauge("polymerge_under_way", "Places of requests that have not ended.", registry=registry)
        held.set_function(lambda: float(places()))

    def routed(self, choice: Choice) -> None:
        """Counts a choice of the router."""
        if choice.route is None:
            return
        self.routes.labels(choice.name if isinstance(choice.expert, str | None) else "mixture").inc()
        self.confidence.observe(choice.route.confidence)
        self.fallbacks.inc(int(choice.route.fallback))
        self.truncated.inc(int(choice.route.truncated > 0))

    def page(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
