"""llama.cpp's side of the conversation by a server without a model; the real one is in test_real.py."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from polymerge.engine import GenerateRequest, ScoreRequest
from polymerge.engine.exported import Probe
from polymerge.engine.llamacpp import room
from polymerge.engine.llamacpp.api import LlamaApi
from polymerge.engine.llamacpp.engine import LlamaEngine, llama_engine
from polymerge.engine.llamacpp.folder import NOTE, GgufExpert, GgufNote, read_note
from polymerge.engine.streaming import Piece, StreamRequest
from polymerge.engine.structure import choice_structure, json_structure
from polymerge.errors import ModelError
from tests.served import Quiet, served
from tests.tiny import tiny_tokenizer

IDS = (5, 6, 7, 8)
LOGPROBS = {"a": -1.0, "b": -2.0, None: -4.0}
# complete(body of /completion) -> the tokens of the answer
Complete = Callable[[dict[str, Any]], list[int]]


@contextmanager
def fake_llama(adapters: list[str], complete: Complete, bodies: list[dict[str, Any]]) -> Iterator[str]:
    """A server that says of every token what `LOGPROBS` says of the applied adapter."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            replies: dict[str, Any] = {
                "/props": {"default_generation_settings": {"n_ctx": 64}, "total_slots": 4},
                "/lora-adapters": [{"id": n, "path": path} for n, path in enumerate(adapters)],
            }
            self.send(replies.get(self.path, {}))

        def do_POST(self) -> None:
            body = self.body()
            bodies.append(body)
            if body.get("stream"):
                self._stream(complete(body))
                return
            applied = [x["id"] for x in body["lora"] if x["scale"]]
            token = body["logit_bias"][0][0]
            logprob = LOGPROBS["ab"[applied[0]] if applied else None]
            told = {"id": token, "logprob": logprob, "top_logprobs": [{"id": token, "logprob": logprob}]}
            self.send({"completion_probabilities": [told]})

        def _stream(self, tokens: list[int]) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                for token in tokens:
                    self.event({"tokens": [token], "stop": False})
                self.event({"tokens": [], "stop": True, "stop_type": "eos"})

    with served(Handler) as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    experts = {}
    for name in ("a", "b"):
        file = tmp_path / f"experts/{name}/adapter.gguf"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"GGUF")
        probe = Probe(ids=IDS, expert=(LOGPROBS[name],) * 3, average=(LOGPROBS[None],) * 3)
        experts[name] = GgufExpert(
            adapter=f"experts/{name}/adapter.gguf", bytes=4, kl=0.0, kl_unfolded=0.0, kl_average=1.0, same_token=1.0,
            probe=probe,
        )  # fmt: skip
    note = GgufNote(
        polymerge_version="0", bundle="b", type="f16", base_bytes=4, context=32, written_by="polymerge",
        measured_with=None, calibration_tokens=3, experts=experts, lost=(), negligible=(),
    )  # fmt: skip
    (tmp_path / NOTE).write_text(note.to_json())
    return tmp_path


PATHS = ["x/experts/a/adapter.gguf", "x/experts/b/adapter.gguf"]


def test_every_adapter_is_probed_and_one_in_the_wrong_place_is_refused(folder: Path) -> None:
    with fake_llama(PATHS, lambda body: [], []) as url, llama_engine(folder, url=url) as engine:
        assert engine.experts == ["a", "b"] and engine.max_length == 32
    with (
        fake_llama(PATHS[::-1], lambda body: [], []) as url,
        pytest.raises(ModelError, match="in their order"),
        llama_engine(folder, url=url),
    ):
        pass


def test_an_adapter_that_is_ignored_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGPROBS, "b", LOGPROBS[None])
    with (
        fake_llama(PATHS, lambda body: [], []) as url,
        pytest.raises(ModelError, match=r"expert 'b' answers like the average; llama\.cpp ignores its adapter"),
        llama_engine(folder, url=url),
    ):
        pass


def test_answers_end_where_the_checkpoint_says_and_ask_for_their_adapter_alone(folder: Path) -> None:
    bodies: list[dict[str, Any]] = []
    with fake_llama(PATHS, lambda body: [9, 10, 2], bodies) as url:
        engine = LlamaEngine(folder, LlamaApi(url))
        one, two = engine.generate([GenerateRequest("w5 w6", "b"), GenerateRequest("w5", None, max_new_tokens=1)])
        engine.close()
    assert (one.text, one.tokens, one.finish) == ("w9 w10", 3, "stop")
    assert (two.text, two.tokens, two.finish) == ("w9", 1, "length")
    assert [x["scale"] for x in bodies[0]["lora"]] == [0.0, 1.0] and [x["scale"] for x in bodies[1]["lora"]] == [0, 0]
    assert bodies[0]["temperature"] == 0 and bodies[0]["repeat_penalty"] == 1.0


def test_an_answer_whose_form_is_whole_ends_at_whatever_token_llama_cpp_ends_it(folder: Path) -> None:
    """It takes more tokens for ends than a checkpoint may; another stream would begin the form anew."""
    bodies: list[dict[str, Any]] = []
    with fake_llama(PATHS, lambda body: [9, 7], bodies) as url:
        engine = LlamaEngine(folder, LlamaApi(url))
        form = choice_structure(["w9"])
        [held] = engine.generate([GenerateRequest("w5", "b", max_new_tokens=6, structure=form)])
        streams = len(bodies)
        [free] = engine.generate([GenerateRequest("w5", "b", max_new_tokens=6)])
        engine.close()
    assert (held.tokens, held.finish, streams) == (2, "stop", 1)
    assert (free.tokens, free.finish, len(bodies) - streams) == (6, "length", 3)


def test_forms_and_tokens_that_there_are_not_are_refused_by_name(folder: Path) -> None:
    """llama.cpp itself passes over a schema's keywords that it does not hold."""
    wrong = [
        (GenerateRequest("w5", structure=json_structure("{", "guided_json")), "guided_json: cannot be used: Expecting"),
        (GenerateRequest("w5", structure=json_structure({"type": "array", "uniqueItems": True})), "uniqueItems"),
        (GenerateRequest([5, 10**30]), f"token {10**30}: the vocabulary ends at"),
        (GenerateRequest([-1]), "token -1: the vocabulary ends at"),
    ]
    with fake_llama(PATHS, lambda body: [2], []) as url:
        engine = LlamaEngine(folder, LlamaApi(url))
        for request, message in wrong:
            with pytest.raises(ModelError, match=message):
                engine.generate([request])
        with pytest.raises(ModelError, match="the vocabulary ends at"):
            engine.decode([10**30])
        with pytest.raises(ModelError, match="the vocabulary ends at"):
            engine.loglikelihood([ScoreRequest("w5", [10**9], "a")])
        engine.close()


def test_scores_are_those_of_the_forced_tokens(folder: Path) -> None:
    with fake_llama(PATHS, lambda body: [], []) as url:
        engine = LlamaEngine(folder, LlamaApi(url))
        scores = engine.loglikelihood([ScoreRequest("w5", "w6 w7", "a"), ScoreRequest("w5", "w6")])
        engine.close()
    assert [(s.log_likelihood, s.tokens, s.is_greedy) for s in scores] == [(-2.0, 2, True), (-4.0, 1, True)]


def test_an_answer_that_was_set_aside_goes_on_from_its_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymerge.engine.llamacpp.reading.LEAST_TOKENS", 1)
    bodies: list[dict[str, Any]] = []
    heard: list[Piece | Exception] = []
    over, first = threading.Event(), threading.Event()

    def listen(piece: Piece | Exception) -> None:
        heard.append(piece)
        first.set()
        if isinstance(piece, Exception) or piece.finish:
            over.set()

    with fake_llama(PATHS, lambda body: [9, 10, 2] if len(bodies) == 1 else [11, 2], bodies) as url:
        engine = LlamaEngine(folder, LlamaApi(url))
        answer = engine._answer(StreamRequest(GenerateRequest("w5", "a", max_new_tokens=8)), listen)
        work = engine._work(answer)
        work.aside.set()
        assert not work.run(work) and answer.made == [9]
        work.aside.clear()
        assert work.run(work) and over.wait(10)
        engine.close()
    assert bodies[1]["prompt"] == [*bodies[0]["prompt"], 9] and bodies[1]["n_predict"] == 7
    assert "".join(piece.text for piece in heard if isinstance(piece, Piece)) == "w9 w11"


def test_a_token_that_only_llama_cpp_takes_for_an_end_does_not_end_the_answer(folder: Path) -> None:
    bodies: list[dict[str, Any]] = []
    with fake_llama(PATHS, lambda body: [9] if len(bodies) == 1 else [10, 2], bodies) as url:
        engine = LlamaEngine(folder, LlamaApi(url))
        (answer,) = engine.generate([GenerateRequest("w5", "a")])
        engine.close()
    assert answer.text == "w9 w10" and bodies[1]["prompt"] == [*bodies[0]["prompt"], 9]


def test_requests_that_llama_cpp_cannot_answer_are_refused(folder: Path) -> None:
    with fake_llama(PATHS, lambda body: [], []) as url:
        engine = LlamaEngine(folder, LlamaApi(url))
        for expert, message in (("c", "no expert 'c'"), ({"a": 0.5, "b": 0.5}, "one expert a request")):
            with pytest.raises(ModelError, match=message):
                engine.generate([GenerateRequest("w5", expert)])
        with pytest.raises(ModelError, match="hidden states"):
            engine.embed(["w5"])
        with pytest.raises(ModelError, match="the model's context 31"):
            engine.generate([GenerateRequest(list(range(3, 40)), "a")])
        engine.close()


def test_too_little_memory_is_told_before_a_file_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, and keys and values of 16 bits, two of 4096 numbers in each of 32 layers (Llama's own defaults)."""
    note, each = read_note(folder), 2 * 4096 * 32 * 2
    for free in (None, 3 * 4 + 8 * each):
        monkeypatch.setattr(room, "available_memory", lambda free=free: free)
        room.check_room(folder, note, 8)
    with pytest.raises(
        ModelError, match=r"wants 0\.00 GB of memory .* the cache of 9 tokens.*give fewer --cache-tokens"
    ):
        room.check_room(folder, note, 9)
    monkeypatch.setattr("polymerge.engine.llamacpp.engine.llama_server", lambda *_, **__: pytest.fail("was started"))
    with pytest.raises(ModelError, match="GB are free"), llama_engine(folder, cache_tokens=9):
        pass
