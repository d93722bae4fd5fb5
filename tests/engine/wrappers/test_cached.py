"""What was asked once is not run again, and nothing else is taken for it."""

from pathlib import Path
from typing import Any

import pytest

from polymerge.engine import GenerateRequest, ScoreRequest
from polymerge.engine.wrappers.cached import CHUNK, CachedEngine
from polymerge.engine.wrappers.metered import MeteredEngine
from polymerge.errors import PolymergeError
from tests.scripted import ScriptedEngine


def echo(expert: Any, prompt: str) -> str:
    return f"{expert}: {prompt}"


def scripted(fingerprint: str = "one") -> ScriptedEngine:
    return ScriptedEngine(echo, ["a", "b"], fingerprint=fingerprint)


def test_answers_are_the_engines_and_a_second_run_asks_nothing(tmp_path: Path) -> None:
    requests = [GenerateRequest(text, expert) for text in ("x", "yy", "x") for expert in ("a", None)]
    scores = [ScoreRequest([65], continuation, "b") for continuation in ("p", "qq")]
    plain, first, second = scripted(), scripted(), scripted()
    for engine in (first, second):
        cached = CachedEngine(engine, tmp_path / "cache.sqlite")
        assert cached.generate(requests) == plain.generate(requests)
        assert cached.loglikelihood(scores) == plain.loglikelihood(scores)
    assert first.asked and not second.asked


def test_another_model_expert_dtype_or_budget_is_another_question(tmp_path: Path) -> None:
    file = tmp_path / "cache.sqlite"
    CachedEngine(scripted(), file).generate([GenerateRequest("x", "a")])
    for engine, salt, request in [
        (scripted("two"), None, GenerateRequest("x", "a")),
        (scripted(), {"dtype": "bfloat16"}, GenerateRequest("x", "a")),
        (scripted(), None, GenerateRequest("x", {"a": 0.5, "b": 0.5})),
        (scripted(), None, GenerateRequest("x", "a", max_new_tokens=3)),
        (scripted(), None, GenerateRequest("x\ud800", "a")),
    ]:
        CachedEngine(engine, file, salt=salt).generate([request])
        assert engine.asked == [request]


def test_sampled_answers_without_a_seed_are_never_remembered(tmp_path: Path) -> None:
    request = GenerateRequest("x", temperature=1.0)
    for _ in range(2):
        engine = scripted()
        CachedEngine(engine, tmp_path / "cache.sqlite").generate([request])
        assert engine.asked == [request]


def test_a_run_that_dies_keeps_the_chunks_that_were_done(tmp_path: Path) -> None:
    class Dies(ScriptedEngine):
        def generate(self, requests: Any) -> Any:
            if self.asked:
                raise KeyboardInterrupt
            return super().generate(requests)

    requests = [GenerateRequest(f"{n:05}") for n in range(CHUNK + 9)]
    steps: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        CachedEngine(Dies(echo), tmp_path / "c", progress=lambda *step: steps.append(step)).generate(requests)
    assert steps == [(CHUNK, CHUNK + 9)]
    after = ScriptedEngine(echo)
    assert len(CachedEngine(after, tmp_path / "c").generate(requests)) == CHUNK + 9
    assert len(after.asked) == 9


def test_a_damaged_cache_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"not a database, for sure not one" * 100)
    with pytest.raises(PolymergeError, match="delete the file"):
        CachedEngine(scripted(), tmp_path / "c")


def test_a_meter_counts_tokens_and_shared_contexts_once() -> None:
    meter = MeteredEngine(scripted())
    assert meter.tokens_per_second is None
    meter.generate([GenerateRequest("xyz", "a")])
    assert (meter.read, meter.written) == (3, len("a: xyz"))
    meter.reset()
    meter.loglikelihood([ScoreRequest("xyz", "p"), ScoreRequest("xyz", "qq"), ScoreRequest([1, 2], "r")])
    assert (meter.read, meter.written) == (3 + 2 + 1 + 2 + 1, 0)
    assert meter.tokens_per_second and meter.tokens_per_second > 0
