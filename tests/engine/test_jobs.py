"""Lists of work are done in turns, and what nobody waits for is not done."""

from collections.abc import Sequence

import pytest

from polymerge.engine.jobs import Jobs
from polymerge.engine.ticket import Ticket, asking, current_ticket
from polymerge.errors import DeadlineError


class Recorder:
    """Doubles numbers, and remembers what came together."""

    def __init__(self) -> None:
        self.slices: list[list[int]] = []

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.slices.append(list(items))
        return [2 * item for item in items]


def test_a_long_list_does_not_hold_up_a_short_one() -> None:
    jobs, work = Jobs(), Recorder()
    long, short = jobs.put("a", range(10), work), jobs.put("a", [70], work)
    jobs.run(4)
    jobs.run(4)
    assert short.result(0) == [140] and not long.done()
    while len(jobs):
        jobs.run(4)
    assert long.result(0) == [2 * n for n in range(10)]
    assert work.slices == [[0, 1, 2, 3], [70, 4, 5, 6], [7, 8, 9]]


def test_a_slice_holds_one_kind_of_work_and_its_budget_counts_padding() -> None:
    jobs, work, other = Jobs(), Recorder(), Recorder()
    one = jobs.put("a", [1, 2, 3], work, [2, 2, 5])
    two = jobs.put("b", [4], other, [100])
    jobs.run(6)
    jobs.run(6)
    jobs.run(6)
    assert (work.slices, other.slices) == ([[1, 2], [3]], [[4]])
    assert (one.result(0), two.result(0)) == ([2, 4, 6], [8])


def test_an_error_is_told_to_those_who_caused_it() -> None:
    jobs = Jobs()

    def work(items: Sequence[int]) -> list[float]:
        return [1 / item for item in items]

    wrong, right = jobs.put("a", [0], work), jobs.put("a", [4], work)
    jobs.run(9)
    assert right.result(0) == [0.25]
    with pytest.raises(ZeroDivisionError):
        wrong.result(0)


def test_what_nobody_waits_for_is_not_done() -> None:
    jobs, work = Jobs(), Recorder()
    left = jobs.put("a", [1], work)
    left.cancel()
    with asking(Ticket(due=0.0)):
        late = jobs.put("a", [2], work)
    stays = jobs.put("a", [3], work)
    while len(jobs):
        jobs.run(9)
    assert work.slices == [[3]] and stays.result(0) == [6]
    with pytest.raises(DeadlineError):
        late.result(0)


def test_what_is_left_of_a_list_is_dropped_when_its_client_goes() -> None:
    jobs, work = Jobs(), Recorder()
    future = jobs.put("a", range(100), work)
    jobs.run(3)
    future.cancel()
    jobs.run(3)
    assert len(work.slices) == 1 and not len(jobs)


def test_work_is_wanted_while_one_of_those_it_is_for_waits() -> None:
    jobs = Jobs()
    seen: list[bool] = []

    def work(items: Sequence[int]) -> Sequence[int]:
        for future in futures:
            seen.append(current_ticket().over)
            future.cancel()
        seen.append(current_ticket().over)
        return items

    futures = [jobs.put("a", [n], work) for n in range(2)]
    jobs.run(9)
    assert seen == [False, False, True]
    assert not current_ticket().over


def test_failing_tells_also_those_whose_slice_is_being_done() -> None:
    jobs = Jobs()

    def work(items: Sequence[int]) -> Sequence[int]:
        jobs.fail(OSError("gone"))
        return items

    future = jobs.put("a", [1, 2], work)
    jobs.run(1)
    with pytest.raises(OSError, match="gone"):
        future.result(0)
    assert not len(jobs)
