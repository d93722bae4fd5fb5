"""vLLM behind a server: pieces, stop texts, scores, cancelling, deadlines; against a server without a model."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from polymerge.engine import GenerateRequest
from polymerge.engine.streaming import Piece, StreamRequest
from polymerge.engine.structure import Structure, calls_structure, json_object, json_structure
from polymerge.engine.vllm.api import VllmApi
from polymerge.engine.vllm.engine import VllmEngine
from polymerge.engine.vllm.streaming import VllmStreaming
from polymerge.errors import DeadlineError, EngineBusyError, EngineDownError, ModelError
from polymerge.serve.app import create_app
from tests.engine.vllm.fake import Complete, fake_vllm
from tests.engine.vllm.test_engine import MODELS, faithful, folder
from tests.serve.conftest import running as serving
from tests.tiny import text_tokenizer

__all__ = ["folder"]


class Heard:
    """A listener that waits for the end."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.error: Exception | None = None
        self.over = threading.Event()

    def __call__(self, heard: Piece | Exception) -> None:
        if isinstance(heard, Piece):
            self.pieces.append(heard)
        else:
            self.error = heard
        if isinstance(heard, Exception) or heard.finish:
            self.over.set()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@contextmanager
def running(folder: Path, complete: Complete, **options: Any) -> Iterator[VllmStreaming]:
    with fake_vllm(MODELS, complete) as url:
        engine = VllmStreaming(folder, VllmApi(url), **options)
        try:
            yield engine
        finally:
            engine.close(2.0)


def asked(prompt: Any, expert: Any = "a", *, stop: tuple[str, ...] = (), tokens: int = 6, **options: Any) -> Any:
    return StreamRequest(GenerateRequest(prompt, expert, max_new_tokens=tokens, stop=stop), **options)


def test_answers_come_in_pieces_and_end_as_the_embedded_ones_do(folder: Path) -> None:
    with running(folder, faithful) as engine:
        assert engine.defaults_of().ends == {2}
        heard = [Heard() for _ in range(4)]
        requests = [
            asked([5, 6, 7], tokens=4),
            asked("w8 w9 w10", None, stop=("w10",)),
            asked([11, 2, 12], "b"),  # 2 ends a text
            asked([13], "b", tokens=0),
        ]
        streams = engine.submit(requests, heard)
        assert all(one.over.wait(5) for one in heard)
        assert [stream.prompt_tokens for stream in streams] == [3, 3, 3, 1]
        assert [one.text for one in heard] == ["w5 w6 w7 w5", "w8 w9 ", "w11", ""]
        ends = [(one.pieces[-1].tokens, one.pieces[-1].finish) for one in heard]
        assert ends == [(4, "length"), (3, "stop"), (2, "stop"), (0, "length")]
        assert len(heard[0].pieces) > 1
        until = time.monotonic() + 3
        while engine.state.running and time.monotonic() < until:  # the last piece is heard before its thread is done
            time.sleep(0.02)
        assert engine.state.status == "ready" and engine.state.running == 0


def test_a_vllm_of_our_own_gets_the_embedded_engines_grammars_and_no_form_that_they_cannot_hold(
    folder: Path, tmp_path: Path
) -> None:
    bodies: list[dict[str, Any]] = []

    def noted(body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        return {"token_ids": [5, 6], "finish_reason": "stop"}

    shutil.copytree(folder, tmp_path / "folder")
    text_tokenizer().save_pretrained(tmp_path / "folder")
    calls = calls_structure("<c>", {"type": "object"}, "", several=True)
    with fake_vllm(MODELS, noted) as url:
        engine = VllmEngine(tmp_path / "folder", VllmApi(url), guided=True)
        for structure in (json_object(), calls, Structure("regex", "a+")):
            engine.generate([GenerateRequest([5], "a", max_new_tokens=2, structure=structure)])
        odd = json_structure({"type": "array", "uniqueItems": True})
        with pytest.raises(ModelError, match='the keyword "uniqueItems"'):
            engine.generate([GenerateRequest([5], "a", structure=odd)])
    whole, begun, regex = (body["structured_outputs"] for body in bodies)
    assert whole["grammar"].startswith("start: %json") and 'TEXT "<c>"' in begun["grammar"] and regex == {"regex": "a+"}


def test_tools_and_forms_of_a_request_reach_vllm_in_its_own_words(folder: Path) -> None:
    bodies: list[dict[str, Any]] = []

    def noted(body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        return {"token_ids": [5, 6], "finish_reason": "stop"}

    pay = {"name": "pay", "parameters": {"type": "object", "properties": {"sum": {"type": "integer"}}}}
    turn = {"model": "a", "messages": [{"role": "user", "content": "w5"}], "max_tokens": 8}
    tools = {"tools": [{"type": "function", "function": pay}]}
    with fake_vllm(MODELS, noted, max_model_len=4096) as url:
        engine = VllmStreaming(folder, VllmApi(url))
        with serving(create_app(engine), engine) as served:
            for more in ({"tool_choice": "required"}, {"stream": True}, {"tool_choice": "none"}):
                asked = httpx2.post(f"{served.url}/v1/chat/completions", json=turn | tools | more, timeout=20)
                assert asked.status_code == 200, asked.text
        engine.close(2.0)
    must, may, no = (body.get("structured_outputs") for body in bodies)
    assert must is not None and may is not None and no is None
    assert must["json"]["anyOf"][0]["properties"]["name"] == {"const": "pay"}
    tag = json.loads(may["structural_tag"])["format"]["tags"][0]
    assert tag["begin"] == "<tool_call>\n"
    assert tag["content"]["json_schema"]["anyOf"][0]["properties"]["arguments"]["properties"] == {
        "sum": {"type": "integer"}
    }


def test_scores_come_with_their_tokens(folder: Path) -> None:
    def scored(body: dict[str, Any]) -> dict[str, Any]:
        if "prompt_logprobs" in body:
            assert body["prompt_logprobs"] == 1
            return {"prompt_logprobs": [None, {"6": {"logprob": -1.0, "rank": 2}, "9": {"logprob": -0.5, "rank": 1}}]}
        top = [{"token_id:7": -0.25, "token_id:8": -0.125}]
        logprobs = {"tokens": ["token_id:7"], "token_logprobs": [-0.25], "top_logprobs": top}
        return {"token_ids": [7], "finish_reason": "length", "logprobs": logprobs}

    with running(folder, scored) as engine:
        heard = Heard()
        engine.submit([asked([5, 6], tokens=1, logprobs=1, score_prompt=True)], [heard])
        assert heard.over.wait(5) and heard.error is None
        prompt = [score for piece in heard.pieces for score in piece.prompt_scores]
        assert [(s.text, s.logprob, s.top) for s in prompt] == [("w5", None, ()), ("w6", -1.0, (("w9", -0.5),))]
        (score,) = [score for piece in heard.pieces for score in piece.scores]
        assert (score.text, score.logprob, score.top) == ("w7", -0.25, (("w8", -0.125),))


def test_a_cancelled_answer_is_not_heard_of_again_and_deadlines_are_kept(folder: Path) -> None:
    def slow(body: dict[str, Any]) -> dict[str, Any]:
        return {"token_ids": [5] * 30, "finish_reason": "length", "pause": 0.05}

    with running(folder, slow) as engine:
        cancelled, late = Heard(), Heard()
        first, _ = engine.submit([asked([5], tokens=30), asked([5], tokens=30, seconds=0.2)], [cancelled, late])
        while not cancelled.pieces:
            time.sleep(0.01)
        first.cancel()
        heard = len(cancelled.pieces)
        assert late.over.wait(5) and isinstance(late.error, DeadlineError)
        until = time.monotonic() + 3
        while engine.state.running and time.monotonic() < until:
            time.sleep(0.02)
        assert engine.state.running == 0 and len(cancelled.pieces) <= heard + 1


@pytest.mark.parametrize(
    ("complete", "error", "message"),
    [
        (lambda body: (400, "no such thing"), ModelError, "400: no such thing"),
        (lambda body: {"token_ids": [5, 6], "broken": True}, EngineDownError, "broke off"),
        (lambda body: {"text": "?"}, EngineDownError, "broke off"),
    ],
)
def test_what_goes_wrong_at_vllm_is_told_to_the_listener(
    folder: Path, complete: Complete, error: type[Exception], message: str
) -> None:
    with running(folder, complete) as engine:
        heard = Heard()
        engine.submit([asked([5])], [heard])
        assert heard.over.wait(5)
        assert isinstance(heard.error, error) and message in str(heard.error)
        assert len(str(heard.error).splitlines()) == 1


def test_a_full_queue_a_stopped_engine_and_unknown_experts_refuse(folder: Path) -> None:
    def slow(body: dict[str, Any]) -> dict[str, Any]:
        return {"token_ids": [5] * 10, "finish_reason": "length", "pause": 0.05}

    with running(folder, slow, concurrency=1) as engine:
        engine.max_waiting = 1
        heard = [Heard(), Heard()]
        engine.submit([asked([5]), asked([5])], heard)
        assert engine.state.running == 1 and engine.state.waiting == 1
        with pytest.raises(EngineBusyError, match="2 requests are under way"):
            engine.submit([asked([5])], [Heard()])
        for request, message in ((asked([5], "z"), "no expert 'z'"), (asked([]), "empty"), (asked([5] * 32), "32")):
            with pytest.raises(ModelError, match=message):
                engine.submit([request], [Heard()])
        engine.close(5.0)
        assert all(one.over.is_set() and one.error is None for one in heard)  # what was taken is finished
        with pytest.raises(EngineDownError, match="stopping"):
            engine.submit([asked([5])], [Heard()])
        assert engine.state.status == "stopped"


def test_a_vllm_that_is_gone_is_seen(folder: Path) -> None:
    with fake_vllm(MODELS, faithful) as url:
        engine = VllmStreaming(folder, VllmApi(url))
        assert engine.max_length == 32
    heard = Heard()
    engine.submit([asked([5])], [heard])
    assert heard.over.wait(5) and isinstance(heard.error, EngineDownError)
    assert engine.state.status == "restarting"
    engine.close(1.0)
