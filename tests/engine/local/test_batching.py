"""Continuous batching against the offline engine: whoever comes when, everybody's answer is the one they get alone."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polymerge import load_model, merge
from polymerge.engine import GenerateRequest, ScoreRequest
from polymerge.engine.admission import Limits
from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.local.running import RunningBatch
from polymerge.engine.streaming import Piece, StreamRequest
from polymerge.errors import DeadlineError, EngineBusyError, EngineDownError, ModelError
from tests.conftest import Merged
from tests.sweep.experts import make_experts
from tests.tiny import tiny_tokenizer

EXPERTS = ["e0", "e1", None, "e2", {"e0": 0.5, "e1": 0.5}]
Offline = tuple[HFEngine, BatchingEngine]


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.error: Exception | None = None
        self.done = threading.Event()
        self.first = threading.Event()

    def __call__(self, heard: Piece | Exception) -> None:
        if isinstance(heard, Exception):
            self.error = heard
            self.done.set()
        else:
            self.pieces.append(heard)
            self.first.set()
            if heard.finish:
                self.done.set()

    @property
    def text(self) -> str:
        assert self.done.wait(30)
        return "".join(piece.text for piece in self.pieces)


@pytest.fixture
def engines(merged: Merged, request: pytest.FixtureRequest) -> Iterator[Offline]:
    bundle, _ = merged(getattr(request, "param", "llama"))
    # two models: the running one belongs to its thread
    offline, running = (HFEngine(load_model(bundle), tiny_tokenizer(), fingerprint=bundle.digest) for _ in range(2))
    batching = BatchingEngine(running, Limits(max_rows=5))
    yield offline, batching
    batching.close(0)


def start(batching: BatchingEngine, *requests: StreamRequest) -> list[Heard]:
    heard = [Heard() for _ in requests]
    batching.submit(requests, heard)
    return heard


def endless(expert: Any = "e0", tokens: int = 100) -> StreamRequest:
    return StreamRequest(GenerateRequest([5, 6], expert, max_new_tokens=tokens))


def without_end(engine: BatchingEngine) -> None:
    voices = engine._engine.voices
    voices.average = replace(voices.average, defaults=replace(voices.average.defaults, ends=frozenset()))


@pytest.mark.parametrize("engines", ["llama", "gemma3", "gpt2", "mixtral"], indirect=True)
def test_answers_of_requests_that_come_at_any_time_are_the_offline_ones(
    engines: Offline, caplog: pytest.LogCaptureFixture
) -> None:
    """More requests than rows, random moments, lengths, experts and budgets."""
    offline, batching = engines
    draw = random.Random(0)
    requests = [
        GenerateRequest(
            [draw.randrange(3, 96) for _ in range(draw.randrange(1, 70))],
            draw.choice(EXPERTS),
            max_new_tokens=draw.randrange(1, 40),
        )
        for _ in range(16)
    ]
    expected = [offline.generate([request])[0] for request in requests]
    streams: list[Heard] = []
    for request in requests:
        streams += start(batching, StreamRequest(request))
        time.sleep(draw.random() * 0.01)
    for answer, heard in zip(expected, streams, strict=True):
        assert heard.text == answer.text
        assert (heard.pieces[-1].tokens, heard.pieces[-1].finish) == (answer.tokens, answer.finish)
        assert all(piece.finish is None for piece in heard.pieces[:-1])
    assert not caplog.records  # no step broke and was made good


def test_generate_is_the_offline_engines_with_stop_texts(engines: Offline) -> None:
    offline, batching = engines
    requests = [GenerateRequest([5, 6, 7 + n], EXPERTS[n % 5], max_new_tokens=20, stop=("w1",)) for n in range(12)]
    for answer, other in zip(offline.generate(requests), batching.generate(requests), strict=True):
        assert (answer.text, answer.finish) == (other.text, other.finish)


def test_answers_and_other_work_share_the_time(engines: Offline, monkeypatch: pytest.MonkeyPatch) -> None:
    offline, batching = engines
    steps, slices, step, embed = [0], [0], RunningBatch.step, HFEngine.embed

    def counted(batch: RunningBatch) -> None:
        steps[0] += 1
        step(batch)

    def slow(engine: HFEngine, prompts: Any, **options: Any) -> Any:
        slices[0] += 1
        time.sleep(0.1)
        return embed(engine, prompts, **options)

    heard, request = Heard(), GenerateRequest([5, 6, 7], "e1", max_new_tokens=40)
    expected = offline.generate([request])[0].text
    monkeypatch.setattr(RunningBatch, "step", counted)
    monkeypatch.setattr(HFEngine, "embed", slow)
    texts = threading.Thread(target=lambda: batching.embed([[5] * 60] * 400))  # eight texts a slice
    batching.submit([StreamRequest(request)], [heard])
    texts.start()
    assert heard.text == expected
    assert slices[0] < steps[0] / 2  # not one before every step
    texts.join()


def test_scores_and_embeddings_run_between_steps(engines: Offline) -> None:
    offline, batching = engines
    without_end(batching)
    heard = start(batching, endless())[0]
    scores = [ScoreRequest([5, 6], [7, 8], "e1"), ScoreRequest([9], [3])]
    assert batching.loglikelihood(scores) == offline.loglikelihood(scores)
    assert batching.embed([[5, 6]]).tolist() == pytest.approx(offline.embed([[5, 6]]))
    assert batching.embed([]).shape == (0, 1, 48)
    assert heard.text and heard.pieces[-1].tokens == 100


def test_a_seeded_answer_is_the_same_whatever_else_runs(engines: Offline) -> None:
    _, batching = engines
    seeded = StreamRequest(GenerateRequest([5, 6], "e1", 30, temperature=3.0, top_p=0.95, seed=11))
    alone = start(batching, seeded)[0].text
    others = [StreamRequest(GenerateRequest([n], "e0", 40, temperature=2.0)) for n in range(3, 12)]
    start(batching, *others[:4])
    crowded = start(batching, seeded)[0]
    start(batching, *others[4:])
    assert crowded.text == alone
    other = StreamRequest(replace(seeded.generate, seed=12))
    assert start(batching, other)[0].text != alone


def test_log_probabilities_are_those_of_the_offline_engine(engines: Offline) -> None:
    offline, batching = engines
    request = StreamRequest(GenerateRequest([5, 6, 7], "e0", 6), logprobs=3, score_prompt=True)
    plain, scored = start(batching, endless("e1", 20), request)
    assert plain.text and scored.text
    prompt = scored.pieces[0].prompt_scores
    made = [score for piece in scored.pieces for score in piece.scores]
    assert [score.text for score in prompt] == ["w5", "w6", "w7"] and prompt[0].logprob is None
    for place in (1, 2):
        alone = offline.loglikelihood([ScoreRequest([5, 6, 7][:place], [[5, 6, 7][place]], "e0")])[0]
        assert prompt[place].logprob == pytest.approx(alone.log_likelihood, abs=1e-3)
    assert " ".join(score.text for score in made) == scored.text
    assert all(score.logprob == score.top[0][1] and len(score.top) == 3 for score in made)


def test_a_prompt_can_be_scored_without_an_answer(engines: Offline) -> None:
    _, batching = engines
    heard = start(batching, StreamRequest(GenerateRequest([5, 6], "e0", 0), logprobs=1, score_prompt=True))[0]
    assert heard.text == "" and heard.pieces[-1].finish == "length"
    assert len(heard.pieces[-1].prompt_scores) == 2


def test_a_cancelled_answer_makes_room_and_is_not_heard_again(engines: Offline) -> None:
    _, batching = engines
    without_end(batching)
    heard = Heard()
    stream = batching.submit([endless()], [heard])[0]
    assert heard.first.wait(30)
    stream.cancel()
    count = len(heard.pieces)
    for _ in range(500):
        if batching.state.running == 0:
            break
        time.sleep(0.01)
    assert batching.state.running == 0
    assert len(heard.pieces) <= count + 1 < 50 and not heard.done.is_set()


def test_a_late_answer_is_an_error_and_the_others_go_on(engines: Offline) -> None:
    _, batching = engines
    late, other = start(batching, replace(endless(), seconds=0.0), endless("e1", 5))
    assert other.text and late.done.wait(30)
    assert isinstance(late.error, DeadlineError)


def test_a_full_queue_refuses_all_or_none(merged: Merged) -> None:
    bundle, _ = merged("llama")
    offline = HFEngine(load_model(bundle), tiny_tokenizer(), fingerprint="")
    batching = BatchingEngine(offline, Limits(max_rows=1, max_waiting=2))
    without_end(batching)
    first = start(batching, endless())[0]
    assert first.first.wait(30)
    waiting = start(batching, endless(tokens=2), endless(tokens=2))
    with pytest.raises(EngineBusyError, match="3 requests are under way"):
        start(batching, endless())
    assert batching.generate([endless(tokens=2).generate])  # callers inside the process wait
    assert all(heard.text for heard in (first, *waiting))
    batching.close()
    with pytest.raises(EngineDownError):
        start(batching, endless())


def test_closing_finishes_what_was_taken(engines: Offline) -> None:
    _, batching = engines
    without_end(batching)
    heard = start(batching, *[endless(EXPERTS[n % 5], 60) for n in range(8)])
    batching.close()
    assert all(one.text and one.pieces[-1].tokens == 60 for one in heard)
    assert batching.state.status == "stopped"


def test_a_step_that_breaks_once_loses_nothing(engines: Offline, monkeypatch: pytest.MonkeyPatch) -> None:
    offline, batching = engines
    requests = [GenerateRequest([5, 6, n], EXPERTS[n % 5], 30) for n in range(3, 9)]
    expected = [answer.text for answer in offline.generate(requests)]
    break_at(batching, monkeypatch, lambda calls, answers: calls in (2, 9))
    heard = start(batching, *map(StreamRequest, requests))
    assert [one.text for one in heard] == expected
    assert batching.state.status == "ready"


def test_only_the_request_that_breaks_the_model_fails(engines: Offline, monkeypatch: pytest.MonkeyPatch) -> None:
    offline, batching = engines
    requests = [GenerateRequest([5, 6, n], EXPERTS[n % 5], 30) for n in range(3, 9)]
    expected = [answer.text for answer in offline.generate(requests)]
    break_at(batching, monkeypatch, lambda calls, answers: any(a.prompt[-1] == 6 for a in answers))
    heard = start(batching, *map(StreamRequest, requests))
    for request, one, text in zip(requests, heard, expected, strict=True):
        assert one.done.wait(30)
        if request.prompt[-1] == 6:
            assert isinstance(one.error, ZeroDivisionError)
        else:
            assert one.text == text


def test_a_model_that_is_beyond_use_stops_the_engine(engines: Offline, monkeypatch: pytest.MonkeyPatch) -> None:
    _, batching = engines
    monkeypatch.setattr("polymerge.engine.local.batching.RESTART_PAUSES", (0.0, 0.0))

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(batching._engine.hf.base_model, "forward", broken)
    heard = start(batching, endless(), endless("e1"))
    for one in heard:
        assert one.done.wait(30) and isinstance(one.error, EngineDownError)
    assert batching.state.status == "stopped"
    with pytest.raises(EngineDownError):
        batching.loglikelihood([ScoreRequest([5], [6])])


def test_a_recovery_that_breaks_leaves_nobody_waiting(engines: Offline, monkeypatch: pytest.MonkeyPatch) -> None:
    _, batching = engines
    break_at(batching, monkeypatch, lambda calls, answers: calls == 2)

    def broken(pause: float) -> bool:
        raise OSError("the device is gone")

    monkeypatch.setattr(batching, "_works", broken)
    heard = start(batching, endless(), endless("e1"))
    for one in heard:
        assert one.done.wait(30) and isinstance(one.error, EngineDownError)
    assert batching.state.status == "stopped"


def test_memory_that_ran_out_once_holds_rows_back_for_a_time(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymerge.engine.local.batching.CALM_TURNS", 3)
    bundle, _ = merged("llama")
    batching = BatchingEngine(HFEngine(load_model(bundle), tiny_tokenizer(), fingerprint=""), Limits(max_rows=4))
    calls: list[int] = []
    step = batching._batch.step

    def once() -> None:
        calls.append(len(batching._batch))
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        step()

    monkeypatch.setattr(batching._batch, "step", once)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    heard = start(batching, *[StreamRequest(GenerateRequest([5, 6, n], "e0", 40)) for n in range(4)])
    assert all(one.text for one in heard)
    assert min(calls[2:]) <= 2 and batching._limits.max_rows == 4
    batching.close()


def test_memory_that_runs_out_before_a_prompt_is_read_leaves_nobody_waiting(
    engines: Offline, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline, batching = engines
    requests = [GenerateRequest([5, 6, n], EXPERTS[n % 5], 10) for n in range(3, 7)]
    expected = [answer.text for answer in offline.generate(requests)]
    padded, calls = batching._engine.padded, [0]

    def once(rows: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            raise torch.OutOfMemoryError
        return padded(rows)

    monkeypatch.setattr(batching._engine, "padded", once)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    heard = start(batching, *map(StreamRequest, requests))
    assert [one.text for one in heard] == expected and calls[0] > 1


def test_answers_that_make_room_but_cannot_be_dropped_go_on(engines: Offline, monkeypatch: pytest.MonkeyPatch) -> None:
    offline, batching = engines
    requests = [GenerateRequest([5, 6, n], EXPERTS[n % 5], 30, ignore_eos=True) for n in range(3, 7)]
    expected = [answer.text for answer in offline.generate(requests)]
    relieve, failed = RunningBatch.relieve, list[int]()

    def broken(batch: RunningBatch, going: Any, tokens: int) -> None:
        if going and not failed:
            failed.append(len(going))
            raise ZeroDivisionError
        relieve(batch, going, tokens)

    monkeypatch.setattr("polymerge.engine.admission.HEADROOM", 1)
    monkeypatch.setattr(RunningBatch, "relieve", broken)
    batching._limits = replace(batching._limits, cache_tokens=60)
    heard = start(batching, *map(StreamRequest, requests))
    assert [one.text for one in heard] == expected and failed
    assert not batching._waiting


def test_who_waits_again_stands_where_its_number_says(engines: Offline) -> None:
    _, batching = engines
    batching.close()
    first, second, third, gone = (batching._answer(endless(), Heard()) for _ in range(4))
    gone.cancel()
    batching._waiting.extend([first, third])
    batching._wait_again([third, second, gone])
    assert list(batching._waiting) == [first, second, third]
    batching._waiting.clear()


def test_closing_keeps_its_promise(engines: Offline, monkeypatch: pytest.MonkeyPatch) -> None:
    _, batching = engines
    gate = threading.Event()
    step = batching._batch.step
    monkeypatch.setattr(batching._batch, "step", lambda: (gate.wait(30), step()))
    [one] = start(batching, endless())
    began = time.monotonic()
    batching.close(0.1)
    assert time.monotonic() - began < 5 and isinstance(one.error, EngineDownError)
    gate.set()


def test_a_cache_budget_holds_rows_back_but_one_always_runs(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = merged("llama")
    batching = BatchingEngine(HFEngine(load_model(bundle), tiny_tokenizer(), fingerprint=""), Limits(cache_tokens=50))
    most: list[int] = []
    step = batching._batch.step
    monkeypatch.setattr(batching._batch, "step", lambda: (most.append(len(batching._batch)), step()))
    heard = start(batching, *[StreamRequest(GenerateRequest([5, 6], "e0", 20)) for _ in range(5)], endless())
    assert all(one.text for one in heard)
    assert max(most) == 2
    batching.close()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerateRequest([5], "e9"), "no expert 'e9'"),
        (GenerateRequest([], "e0"), "empty"),
        (GenerateRequest([5] * 128, "e0"), "context 128"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(engines: Offline, request_: GenerateRequest, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        start(engines[1], StreamRequest(request_))


def break_at(batching: BatchingEngine, monkeypatch: pytest.MonkeyPatch, when: Callable[[int, Any], bool]) -> None:
    step, calls = batching._batch.step, [0]

    def broken() -> None:
        calls[0] += 1
        if when(calls[0], batching._batch.answers):
            raise ZeroDivisionError
        step()

    monkeypatch.setattr(batching._batch, "step", broken)


def test_long_prompts_are_read_in_pieces(engines: Offline, monkeypatch: pytest.MonkeyPatch) -> None:
    offline, batching = engines
    monkeypatch.setattr("polymerge.engine.local.running.COLUMNS", 7)
    requests = [GenerateRequest(list(range(5, 5 + n)), "e0", 10) for n in (50, 3, 20)]
    heard = start(batching, *[StreamRequest(r, logprobs=1, score_prompt=True) for r in requests])
    for request, one in zip(requests, heard, strict=True):
        assert one.text == offline.generate([request])[0].text
        prompt = one.pieces[0].prompt_scores
        assert len(prompt) == len(request.prompt)
        scores = ScoreRequest(request.prompt[:1], request.prompt[1:], "e0")
        total = offline.loglikelihood([scores])[0].log_likelihood
        assert sum(score.logprob or 0 for score in prompt) == pytest.approx(total, abs=1e-2)


def test_a_model_that_runs_in_groups_keeps_its_rows_apart_in_the_running_batch(tmp_path: Path) -> None:
    experts = make_experts("gpt_oss", tmp_path)
    bundle = merge({"experts": {n: str(p) for n, p in experts.items()}, "compress_rate": 0.0}, tmp_path / "bundle")
    offline, running = (HFEngine(load_model(bundle), tiny_tokenizer(), fingerprint=bundle.digest) for _ in range(2))
    assert running.model.strategy == "groups"
    batching = BatchingEngine(running, Limits(max_rows=4))
    requests = [
        GenerateRequest(f"w{5 + number} w{9 + number}" + " w7" * number, expert=expert, max_new_tokens=6)
        for number, expert in enumerate([*EXPERTS, "e1", "e0"])
    ]
    try:
        together = batching.generate(requests)
    finally:
        batching.close(0)
    assert [g.text for g in together] == [offline.generate([request])[0].text for request in requests]
