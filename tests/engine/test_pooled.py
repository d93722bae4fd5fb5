"""An engine that only generates, behind a server."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from polymerge.engine import GenerateRequest, Generation
from polymerge.engine.pooled import PooledEngine
from polymerge.engine.streaming import StreamRequest
from polymerge.errors import DeadlineError, EngineBusyError, EngineDownError, ModelError
from tests.engine.test_batching import Heard


class Scripted:
    """Answers with the expert's name when it may."""

    experts, max_length, fingerprint = ("e0",), 100, "scripted"

    def __init__(self) -> None:
        self.may = threading.Event()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [1] * len(text.split())

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        assert self.may.wait(10)
        if requests[0].expert is None:
            raise ZeroDivisionError
        return [Generation(f"by {requests[0].expert}", 2, 3, "stop")]


def start(engine: PooledEngine, **options: Any) -> tuple[Any, Heard]:
    heard = Heard()
    request = StreamRequest(GenerateRequest("two words", options.pop("expert", "e0")), **options)
    return engine.submit([request], [heard])[0], heard


def test_answers_and_errors_come_in_one_piece() -> None:
    scripted = Scripted()
    engine = PooledEngine(scripted)  # type: ignore[arg-type]
    stream, heard = start(engine)
    _, broken = start(engine, expert=None)
    assert (engine.state.running, stream.prompt_tokens) == (2, 2)
    scripted.may.set()
    assert heard.text == "by e0" and heard.pieces[0].tokens == 3
    assert broken.done.wait(10) and isinstance(broken.error, ZeroDivisionError)
    engine.close()
    assert engine.state.running == 0
    with pytest.raises(EngineDownError):
        start(engine)


def test_queues_deadlines_and_cancelled_calls() -> None:
    scripted = Scripted()
    engine = PooledEngine(scripted, max_running=1, max_waiting=2)  # type: ignore[arg-type]
    _, late = start(engine, seconds=0.05)
    gone, unheard = start(engine)
    _, last = start(engine)
    with pytest.raises(EngineBusyError):
        start(engine)
    gone.cancel()
    assert late.done.wait(10) and isinstance(late.error, DeadlineError)
    scripted.may.set()
    assert last.text == "by e0"
    engine.close()
    assert not unheard.done.is_set() and not late.pieces


def test_what_it_cannot_tell_is_refused() -> None:
    with pytest.raises(ModelError, match="logprobs"):
        start(PooledEngine(Scripted()), logprobs=0)  # type: ignore[arg-type]
