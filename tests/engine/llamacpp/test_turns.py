"""Whose turn it is, and that work gets it: requests of one expert together, nobody waits for ever."""

import threading
import time

from polymerge.engine.llamacpp.scheduling import Scheduler, Work
from polymerge.engine.llamacpp.turns import Decision, Turn, decide


def test_the_turn_goes_to_whoever_has_waited_longest() -> None:
    assert decide(None, 0, {}, 5.0) == Decision(None)
    assert decide(None, 0, {"a": 3.0, "b": 2.0}, 5.0) == Decision(Turn("b", 5.0), admit=True)
    # over with its last answer, whoever has more to ask
    assert decide(Turn("b", 5.0), 0, {"a": 3.0, "b": 5.5}, 6.0) == Decision(Turn("a", 6.0), admit=True)


def test_a_turn_takes_newcomers_while_it_is_young_or_nobody_else_waits() -> None:
    turn = Turn("a", 10.0)
    assert decide(turn, 2, {"a": 10.5, "b": 10.1}, 11.0, seconds=2) == Decision(turn, admit=True)
    assert decide(turn, 2, {"a": 10.5}, 99.0, seconds=2) == Decision(turn, admit=True)
    assert decide(turn, 2, {"a": 10.5, "b": 10.1}, 12.0, seconds=2) == Decision(turn)
    assert decide(turn, 2, {"b": 10.1}, 14.0, seconds=2) == Decision(turn, set_aside=True)


class Recorder:
    """Work that notes when it ran beside whom."""

    def __init__(self) -> None:
        self.lock, self.now = threading.Lock(), list[str]()
        self.order: list[str] = []
        self.mixed = False

    def work(self, name: str, seconds: float = 0.02, *, patient: bool = True) -> Work:
        left = [seconds]

        def run(work: Work) -> bool:
            with self.lock:
                self.now.append(name)
                self.order.append(name)
                self.mixed |= len(set(self.now)) > 1
            began = time.monotonic()
            while time.monotonic() - began < left[0] and not (patient and work.aside.is_set()):
                time.sleep(0.002)
            left[0] -= time.monotonic() - began
            with self.lock:
                self.now.remove(name)
            return left[0] <= 0

        return Work(name, 10, run)


def test_experts_never_run_beside_each_other_and_each_ones_requests_run_together() -> None:
    recorder, scheduler = Recorder(), Scheduler(8, 1000)
    scheduler.add([recorder.work(name) for name in "abcabcabcabc"])
    scheduler.drain(20)
    scheduler.close()
    assert not recorder.mixed
    assert recorder.order == sorted(recorder.order) and len(recorder.order) == 12


def test_a_long_answer_makes_room_and_goes_on_later() -> None:
    recorder, scheduler = Recorder(), Scheduler(8, 1000, seconds=0.1)
    scheduler.add([recorder.work("long", 1.5)])
    time.sleep(0.05)
    began = time.monotonic()
    short = recorder.work("short", 0.01)
    done = threading.Event()
    inner = short.run

    def run(work: Work) -> bool:
        over = inner(work)
        done.set()
        return over

    short.run = run
    scheduler.add([short])
    assert done.wait(20) and time.monotonic() - began < 1.3
    scheduler.drain(20)
    scheduler.close()
    assert recorder.order == ["long", "short", "long"] and not recorder.mixed


def test_rows_and_caches_bound_what_runs_and_one_always_fits() -> None:
    recorder, scheduler = Recorder(), Scheduler(2, 15)
    most, lock = [0], threading.Lock()

    def watched(work: Work) -> Work:
        inner = work.run

        def run(work: Work) -> bool:
            with lock:
                most[0] = max(most[0], scheduler.counts[0])
            return inner(work)

        work.run = run
        return work

    scheduler.add([watched(recorder.work("a")) for _ in range(4)])  # of 10 tokens each
    huge = watched(recorder.work("a"))
    huge.tokens = 100
    scheduler.add([huge])
    scheduler.drain(20)
    scheduler.close()
    assert most == [1] and len(recorder.order) == 5
