"""What a server may do and for whom: every limit of it, with its default, and the keys.

Does not know requests. What bounds a batch is the engine's to decide on (`polymerge.engine.admission`); its numbers
stand here with the others. OpenAI's own bounds (20 alternatives a token, 4 stop texts) belong to the protocol
(`polymerge.serve.schema`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..engine.admission import Limits
from ..errors import PolymergeError

# Names that a browser on this machine may call a server by. Another name that leads here is an attack on it
# (a web page whose name was pointed at 127.0.0.1 after it was loaded).
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def _limit(default: Any, least: float, most: float = float("inf")) -> Any:
    return field(default=default, metadata={"least": least, "most": most})


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a server.

    Attributes:
        keys: name -> API key (`polymerge.serve.keys`); without any, everyone may ask.
        key_file: where they come from, and from which SIGHUP reads them again.
        cors_origins: web pages of other origins that may ask.
        hosts: names under which the server may be asked; none is any.
        log_prompts: write prompts and answers to the log.

        requests_per_minute: of one key, or of everyone together where there are no keys; None is no limit.
        max_body_bytes: of a request.
        body_seconds: a body must be there so long after its headers.
        max_tokens: of one answer; also what an answer may have where a request names no number.
        max_choices: answers that one request may ask for.
        max_texts: that one request may embed or route.
        seconds: an answer must be whole so long after its request came, whatever it waited for; the model `staged`
            begins no thought later.
        max_questions: that wait for the thinker of the model `staged`; more are refused.

        margin: how much likelier the field of a new turn must be for a conversation to change its expert.
        max_turns: of a conversation that are looked at, the latest ones: an older turn's field has no say.
        max_routes: that are remembered, by a hash of their text.

        max_rows, max_waiting, cache_tokens, prompt_tokens, chunk_tokens, prefix_tokens: of the running batch and the
            queue before it; see `polymerge.engine.admission.Limits`. Requests of all kinds together have `max_rows +
            max_waiting` places.

        max_connections: at a time; beyond, the one that has waited longest without a request is closed.
        header_seconds: a connection must have sent a request's headers so long after it was opened.
        keep_alive_seconds: a connection without a request is kept so long.
        drain_seconds: what runs when the server ends may go on so long.
        close_seconds: what the engine still makes after that.

    Raises:
        PolymergeError: a limit that cannot be one.
    """

    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    key_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    log_prompts: bool = False
    feedback: Path | None = None

    requests_per_minute: int | None = _limit(None, 1)
    max_body_bytes: int = _limit(2**20, 1)
    body_seconds: float = _limit(60.0, 0)
    max_tokens: int = _limit(2048, 1)
    max_choices: int = _limit(64, 1)
    max_texts: int = _limit(2048, 1)
    seconds: float = _limit(600.0, 0)
    max_questions: int = _limit(64, 1)

    margin: float = _limit(0.2, 0, 1)
    max_turns: int = _limit(8, 1)
    max_routes: int = _limit(4096, 1)

    max_rows: int = _limit(Limits.max_rows, 1)
    max_waiting: int = _limit(Limits.max_waiting, 1)
    cache_tokens: int = _limit(Limits.cache_tokens, 1)
    prompt_tokens: int = _limit(Limits.prompt_tokens, 1)
    chunk_tokens: int = _limit(Limits.chunk_tokens, 1)
    prefix_tokens: int = _limit(Limits.prefix_tokens, 0)

    max_connections: int = _limit(1024, 1)
    header_seconds: float = _limit(10.0, 0)
    keep_alive_seconds: float = _limit(75.0, 0)
    drain_seconds: float = _limit(60.0, 0)
    close_seconds: float = _limit(5.0, 0)

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not limit.metadata or (value is None and limit.default is None):
                continue
            least, most = limit.metadata["least"], limit.metadata["most"]
            if not least <= value <= most:  # NaN is neither
                bounds = f"at least {least:g}" + (f" and at most {most:g}" if most < float("inf") else "")
                raise PolymergeError(f"{limit.name}: must be {bounds}, not {value}")

    @property
    def limits(self) -> Limits:
        """Those of the engine."""
        return Limits(**{limit.name: getattr(self, limit.name) for limit in fields(Limits)})
