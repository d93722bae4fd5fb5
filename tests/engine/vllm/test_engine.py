"""The vLLM engine's side of the conversation, against a server without a model. The real one is in test_vllm.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from polymerge.cli.main import main
from polymerge.engine import GenerateRequest, ScoreRequest
from polymerge.engine.exported import ExportedExpert, Probe
from polymerge.engine.vllm.api import VllmApi
from polymerge.engine.vllm.engine import VllmEngine, vllm_engine
from polymerge.engine.vllm.folder import NOTE, VllmNote, read_note
from polymerge.engine.vllm.form import GUIDANCE
from polymerge.engine.vllm.server import FORMS, VllmServer
from polymerge.errors import BundleError, EngineDownError, MissingExtraError, ModelError
from tests.engine.vllm.fake import Complete, fake_vllm
from tests.tiny import tiny_tokenizer

IDS = (5, 6, 7, 8)
ANSWERS = {"a": (-1.0, -2.0, -3.0), "b": (-4.0, -1.0, -1.5), "average": (-2.0, -2.5, -2.0)}
MODELS = list(ANSWERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder with all but the weights."""
    path = tmp_path_factory.mktemp("exported")
    tiny_tokenizer().save_pretrained(path)
    (path / "config.json").write_text('{"model_type": "llama", "vocab_size": 96}')
    costs = {"kl": 0.0, "kl_unfolded": 0.0, "kl_average": 1.0, "same_token": 1.0}
    experts = {
        name: ExportedExpert(
            adapter=f"adapters/{name}",
            probe=Probe(ids=IDS, expert=ANSWERS[name], average=ANSWERS["average"]),
            **costs,
        )
        for name in ("a", "b")
    }
    note = VllmNote(
        polymerge_version="0",
        bundle="0",
        dtype="float32",
        max_lora_rank=8,
        target_modules=("q_proj",),
        head_adapters=False,
        base_bytes=1,
        slot_bytes=1,
        calibration_tokens=3,
        experts=experts,
        lost=(),
    )
    (path / NOTE).write_text(note.to_json())
    return path


def scores(log_probabilities: Any, ids: Any) -> list[Any]:
    rows = zip(ids[1:], log_probabilities, strict=True)
    return [None, *({str(token): {"logprob": value, "rank": 1 + (value < -2)}} for token, value in rows)]


def faithful(body: dict[str, Any]) -> dict[str, Any]:
    """Every model answers its probe as the export says; a generation is the prompt again, doubled."""
    if "prompt_logprobs" in body:
        return {"prompt_logprobs": scores(ANSWERS[body["model"]], body["prompt"])}
    made = (body["prompt"] * 2)[: body["max_tokens"]]
    return {"token_ids": made, "text": "?", "finish_reason": "length" if len(made) == body["max_tokens"] else "stop"}


def test_answers_come_in_the_order_of_the_requests_and_from_the_right_expert(folder: Path) -> None:
    asked: list[dict[str, Any]] = []

    def listening(body: dict[str, Any]) -> dict[str, Any]:
        asked.append(body)
        time.sleep(0.05 if body["prompt"] == [5] else 0.0)
        return faithful(body)

    with fake_vllm(MODELS, listening) as url:
        engine = VllmEngine.connect(folder, url)
        asked.clear()
        requests = [
            GenerateRequest([5], "a", max_new_tokens=2),
            GenerateRequest("w6 w7", None, max_new_tokens=9, stop=("w7",)),
            GenerateRequest([8], "b", max_new_tokens=99, temperature=0.5, top_p=0.9, seed=3),
        ]
        answers = engine.generate(requests)
    assert [(g.text, g.prompt_tokens, g.tokens, g.finish) for g in answers] == [
        ("w5 w5", 1, 2, "length"),
        ("w6 ", 2, 2, "stop"),
        ("w8 w8", 1, 3, "stop"),  # with the end token, which vLLM did not tell
    ]
    by_model = {body["model"]: body for body in asked}
    assert by_model["b"]["max_tokens"] == 31 and by_model["b"]["temperature"] == 0.5 and by_model["b"]["seed"] == 3
    assert "stop" not in by_model["average"] and by_model["a"]["repetition_penalty"] == 1.0


def test_scores_are_the_continuations_own(folder: Path) -> None:
    with fake_vllm(MODELS, faithful) as url:
        engine = VllmEngine.connect(folder, url)
        one, two = engine.loglikelihood([ScoreRequest([5, 6], [7, 8], "a"), ScoreRequest("w5 w6 w7", " w8", "b")])
        assert (one.log_likelihood, one.is_greedy, one.tokens) == (-5.0, False, 2)
        assert (two.log_likelihood, two.is_greedy, two.tokens) == (-1.5, True, 1)


def test_beside_an_adapter_on_the_head_every_token_is_a_call_of_its_own(folder: Path, tmp_path: Path) -> None:
    """One call for a whole prompt would end the server."""
    note = read_note(folder).model_copy(update={"head_adapters": True})
    shutil.copytree(folder, tmp_path / "v")
    (tmp_path / "v" / NOTE).write_text(note.to_json())

    def by_token(body: dict[str, Any]) -> dict[str, Any]:
        assert "prompt_logprobs" not in body and body["max_tokens"] == 1
        (asked,) = body["logprob_token_ids"]
        value = ANSWERS[body["model"]][len(body["prompt"]) - 1]
        likeliest = asked if value >= -2 else 99
        return {"token_ids": [likeliest], "logprobs": {"top_logprobs": [{f"token_id:{asked}": value}]}}

    with fake_vllm(MODELS, by_token) as url:
        engine = VllmEngine.connect(tmp_path / "v", url)
        one, two = engine.loglikelihood([ScoreRequest([5, 6], [7, 8], "a"), ScoreRequest([5], [6], "b")])
    assert (one.log_likelihood, one.is_greedy, one.tokens) == (-5.0, False, 2)
    assert (two.log_likelihood, two.is_greedy, two.tokens) == (-4.0, False, 1)
    with (
        fake_vllm(MODELS, lambda body: {"token_ids": [5], "logprobs": None}) as url,
        pytest.raises(ModelError, match="does not tell a token's log-probability"),
    ):
        VllmEngine.connect(tmp_path / "v", url)


def swapped(body: dict[str, Any]) -> dict[str, Any]:
    return faithful({**body, "model": {"a": "b", "b": "a"}.get(body["model"], body["model"])})


def deaf(body: dict[str, Any]) -> dict[str, Any]:
    """Ignores the adapter of b, as vLLM does with a wrong prefix."""
    return faithful({**body, "model": "average" if body["model"] == "b" else body["model"]})


def spilling(body: dict[str, Any]) -> dict[str, Any]:
    """Answers for the average with the last adapter, as vLLM's CPU kernels do when every slot is taken."""
    return faithful({**body, "model": "b" if body["model"] == "average" else body["model"]})


@pytest.mark.parametrize(
    ("models", "complete", "message"),
    [
        (["a", "average"], faithful, "does not serve b"),
        (["average"], faithful, "does not serve a, b"),
        (MODELS, swapped, "nats a token from the exported one"),
        (MODELS, deaf, "expert 'b' answers like the average; vLLM ignores its adapter"),
        (MODELS, spilling, "the average is .* --max-loras 3 or more"),
        (MODELS, lambda body: {"text": ""}, "gives no prompt_logprobs"),
        (MODELS, lambda body: (500, "the engine\ndied"), "500: the engine died"),
    ],
)
def test_a_server_that_does_not_serve_this_export_is_refused(
    folder: Path, models: list[str], complete: Complete, message: str
) -> None:
    with fake_vllm(models, complete) as url, pytest.raises(ModelError, match=message) as raised:
        VllmEngine.connect(folder, url)
    assert len(str(raised.value).splitlines()) == 1


def test_requests_that_cannot_be_served_are_one_line(folder: Path) -> None:
    with fake_vllm(MODELS, faithful) as url:
        engine = VllmEngine.connect(folder, url + "/v1/")
        for call, message in (
            (lambda: engine.generate([GenerateRequest([5], "c")]), "no expert 'c'; it holds a, b"),
            (lambda: engine.generate([GenerateRequest([5], {"a": 0.5, "b": 0.5})]), "mixtures need the embedded"),
            (lambda: engine.generate([GenerateRequest([], "a")]), "the prompt is empty"),
            (lambda: engine.generate([GenerateRequest([5] * 32, "a")]), "32 tokens, the model's context 32"),
            (lambda: engine.loglikelihood([ScoreRequest([5], [], "a")]), "continuation is empty"),
            (lambda: engine.loglikelihood([ScoreRequest([5], [6] * 31, "a")]), "does not fit"),
            (lambda: engine.embed(["w5"]), "embedding server"),
        ):
            with pytest.raises(ModelError, match=message):
                call()
        assert engine.generate([]) == [] and engine.loglikelihood([]) == []
    with pytest.raises(EngineDownError, match="does not answer"):
        engine.generate([GenerateRequest([5], "a")])


def test_an_address_that_is_no_vllm_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="begins with http"):
        VllmApi("localhost:8000")
    with pytest.raises(EngineDownError, match="does not answer"):
        VllmEngine.connect(folder, "http://127.0.0.1:1")
    with pytest.raises(BundleError, match="export BUNDLE --to vllm"):
        VllmEngine.connect(tmp_path, "http://127.0.0.1:1")


# What stands for a python that has vLLM: it is called as `python -m MODULE --model FOLDER ... --port N ...`.
PROGRAM = """\
#!{python}
import http.server, os, signal, subprocess, sys, time
mode = {mode!r}
if mode == "fails":
    print("(pid=1) WARNING 11-27 [a.py:1] limits can cause `OSError: [Errno 24] Too many open files`")
    print("loading"); print("ValueError: no room for the KV cache"); print("bye"); sys.exit(1)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({notes!r}, "w").write("\\n".join([str(child.pid), *sys.argv[1:]]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
if mode == "hangs":
    time.sleep(600)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def program(folder: Path, mode: str) -> tuple[str, Path]:
    file, notes = folder / f"{mode}.py", folder / f"{mode}.txt"
    file.write_text(textwrap.dedent(PROGRAM).format(python=sys.executable, mode=mode, notes=str(notes)))
    file.chmod(0o755)
    return str(file), notes


def has_ended(pid: int) -> bool:
    """Within two seconds: a signal takes a moment."""
    stat, until = Path(f"/proc/{pid}/stat"), time.monotonic() + 2
    while time.monotonic() < until:
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("mode", ["serves", "stubborn"])
def test_a_server_is_started_with_our_arguments_and_ended_with_its_workers(
    folder: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polymerge.engine.vllm.server.STOP_SECONDS", 0.5)
    python, notes = program(tmp_path, mode)
    said: list[str] = []
    with VllmServer(folder, python=python, extra=["--enforce-eager"], say=said.append) as server:
        assert server.running and server.url.startswith("http://127.0.0.1:")
        child, *arguments = notes.read_text().splitlines()
    assert arguments[:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    assert arguments[-1] == "--enforce-eager" and "127.0.0.1" in arguments
    assert f"a={folder}/adapters/a" in arguments
    assert json.loads(arguments[arguments.index(FORMS) + 1]) == GUIDANCE and server.guided
    assert not server.running and has_ended(int(child))
    assert "is ready" in said[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_a_killed_program_leaves_no_vllm_behind(folder: Path, tmp_path: Path) -> None:
    python, notes = program(tmp_path, "serves")
    code = f"""
import os, signal
from polymerge.engine.vllm.server import VllmServer
with VllmServer({str(folder)!r}, python={python!r}) as server:
    print(server._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL
    assert has_ended(int(ended.stdout))
    os.kill(int(notes.read_text().split()[0]), signal.SIGKILL)  # the fake one's worker


def test_who_says_what_holds_forms_is_not_overruled(folder: Path) -> None:
    server = VllmServer(folder, python="x", extra=[FORMS + '={"backend": "xgrammar"}'])
    assert not server.guided and FORMS not in server.command(1)


def test_a_server_that_fails_shows_its_log_and_one_line(folder: Path, tmp_path: Path) -> None:
    python, _ = program(tmp_path, "fails")
    said: list[str] = []
    with (
        pytest.raises(ModelError, match=r"ended while starting: ValueError: no room for the KV cache; its log is"),
        VllmServer(folder, python=python, say=said.append),
    ):
        pass
    assert said[-3:] == ["loading", "ValueError: no room for the KV cache", "bye"]


def test_the_serve_command_hands_on_what_is_vllms(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fastapi")
    python, _ = program(tmp_path, "fails")
    for argument, message in (("--seed=1", "no room for the KV cache"), ("--port=1", "polymerge sets this argument")):
        options = ["--vllm", "--vllm-python", python, f"--vllm-arg={argument}", "--port", "0"]
        monkeypatch.setattr("sys.argv", ["polymerge", "serve", str(folder), *options])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2 and message in capsys.readouterr().err


def test_a_server_that_never_gets_ready_is_ended(folder: Path, tmp_path: Path) -> None:
    python, notes = program(tmp_path, "hangs")
    with (
        pytest.raises(ModelError, match="not ready after 1 s"),
        VllmServer(folder, python=python, start_seconds=1.0, say=lambda line: None),
    ):
        pass
    assert has_ended(int(notes.read_text().split()[0]))


def test_arguments_of_our_own_and_missing_programs_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(ModelError, match="--port=1: polymerge sets this"),
        vllm_engine(folder, extra=["--port=1"], python="x"),
    ):
        pass
    with pytest.raises(ModelError, match="cannot be run"), VllmServer(folder, python=str(tmp_path / "none")):
        pass
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match="no `vllm` command"):
        VllmServer(folder)
