"""Who joins the running batch: by table, and by what must hold whatever is asked."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymerge.engine.admission import HEADROOM, PATIENCE, Demand, Limits, admit, surplus
from polymerge.engine.answer import taken
from polymerge.errors import PolymergeError

LIMITS = Limits(max_rows=4, cache_tokens=100, prompt_tokens=30)
SMALL = Demand(unread=5, longest=10)
SCORED = replace(SMALL, scores_prompt=True)
POISON = replace(SMALL, failures=2)


@pytest.mark.parametrize(
    ("waiting", "running", "joining"),
    [
        ([], [], 0),
        ([SMALL] * 9, [], 4),  # no more rows than max_rows
        ([SMALL] * 9, [SMALL] * 3, 1),
        ([SMALL] * 9, [SMALL] * 4, 0),
        ([SMALL, SMALL], [SMALL] * 5, 0),  # after max_rows was halved more may run than are let in
        ([Demand(5, 50)] * 3, [], 2),  # 2 x 50 in the caches, and not 3 x 50
        ([Demand(5, 50)] * 3, [SMALL], 1),  # short rows are padded to the longest
        ([SMALL] * 3, [Demand(5, 50)], 1),
        ([Demand(5, 51), SMALL], [], 1),
        ([Demand(500, 900), SMALL], [], 1),  # one request always fits
        ([Demand(500, 900)], [SMALL], 0),  # ... into an empty batch
        ([SMALL], [Demand(500, 900)], 0),
        ([Demand(15, 20)] * 4, [], 2),  # 2 x 15 are read at once, and not 3 x 15
        ([Demand(31, 40), SMALL], [SMALL], 1),  # one prompt always fits beside the running answers
        ([SMALL, Demand(16, 20), SMALL], [], 1),  # the short one behind waits for the next pass as well
        ([SMALL, SMALL, SCORED, SMALL], [], 2),  # those that score their prompts are read apart
        ([SCORED, SCORED, SMALL], [], 2),
        ([SCORED], [SMALL], 1),  # ... but run with the others
        ([POISON, SMALL], [], 1),  # what was there twice when a step broke runs alone
        ([SMALL, POISON], [], 1),
        ([POISON], [SMALL], 0),
        ([SMALL], [POISON], 0),
        ([replace(SMALL, failures=1)] * 3, [SMALL], 3),
    ],
)
def test_so_many_join(waiting: list[Demand], running: list[Demand], joining: int) -> None:
    assert admit(waiting, running, LIMITS) == list(range(joining))


LARGE = Demand(unread=5, longest=80)


@pytest.mark.parametrize(
    ("waiting", "running", "places"),
    [
        ([LARGE, SMALL, SMALL], [SMALL, SMALL], [1, 2]),  # small ones pass one that has no room beside the running
        ([SMALL, LARGE, SMALL], [SMALL], [0, 2]),
        ([POISON, SMALL], [SMALL], [1]),
        ([replace(LARGE, passed=PATIENCE), SMALL], [SMALL], []),  # ... until it has waited long enough
        ([SMALL, replace(LARGE, passed=PATIENCE), SMALL], [SMALL], [0]),
        ([replace(LARGE, passed=PATIENCE), SMALL], [], [0]),
        ([SMALL, Demand(26, 30), SMALL], [], [0]),  # one that is read in the next pass is not passed
        ([LARGE] * 3 + [SMALL] * 9, [SMALL] * 4, []),  # a full batch is no reason to read on
    ],
)
def test_small_ones_pass_and_nothing_starves(waiting: list[Demand], running: list[Demand], places: list[int]) -> None:
    assert admit(waiting, running, LIMITS) == places


def test_whoever_was_passed_is_counted() -> None:
    queue = deque(Passed(number) for number in range(5))
    assert [one.number for one in taken(queue, [1, 3])] == [1, 3]  # type: ignore[arg-type, attr-defined]
    assert [(one.number, one.passed) for one in queue] == [(0, 2), (2, 1), (4, 0)]


@dataclass
class Passed:
    number: int
    passed: int = 0


def test_the_queue_is_read_no_further_than_who_has_waited_long_enough() -> None:
    def queue() -> Iterator[Demand]:
        yield from [SMALL, SMALL, POISON]
        yield replace(SMALL, failures=2, passed=PATIENCE)
        raise AssertionError("read on")

    assert admit(queue(), [], LIMITS) == [0, 1]


def test_a_limit_under_one_is_refused_by_name() -> None:
    for name in ("max_rows", "max_waiting", "cache_tokens", "prompt_tokens", "chunk_tokens"):
        with pytest.raises(PolymergeError, match=f"^{name}: must be at least 1, not 0$"):
            Limits(**{name: 0})
    assert Limits(prefix_tokens=0).prefix_tokens == 0  # nothing is remembered
    with pytest.raises(PolymergeError, match=r"^prefix_tokens: must be at least 0, not -1$"):
        Limits(prefix_tokens=-1)


def test_room_is_taken_for_what_is_used_soon_and_not_for_all_that_may_be() -> None:
    bounds = Limits(max_rows=9, cache_tokens=4 * (10 + HEADROOM))
    assert admit([Demand(10, 2058)] * 9, [], bounds) == [0, 1, 2, 3]
    assert admit([Demand(10, 20)] * 9, [Demand(10, 2058)], bounds) == [0, 1, 2]
    assert admit([Demand(10, 2058)], [Demand(11, 2058)] * 3, bounds) == []


@pytest.mark.parametrize(
    ("tokens", "youngest"),
    [([], None), ([500], None), ([25] * 4, None), ([26] * 4, 2), ([10, 90], 1), ([51, 5], 1), ([50, 50], None)],
)
def test_the_youngest_makes_room_for_what_the_others_have_become(tokens: list[int], youngest: int | None) -> None:
    numbers = [3, 7, 9, 1]
    running = [Demand(unread, 2048, number=number) for unread, number in zip(tokens, numbers, strict=False)]
    assert surplus(running, LIMITS) == youngest


demands = st.builds(
    lambda unread, answer, failures, scored: Demand(unread, unread + answer, failures, scored),
    st.integers(1, 40), st.integers(0, 40), st.sampled_from([0, 0, 0, 0, 1, 2]), st.booleans(),
)  # fmt: skip
limits = st.builds(
    Limits,
    max_rows=st.integers(1, 6),
    max_waiting=st.just(1),
    cache_tokens=st.integers(1, 300),
    prompt_tokens=st.integers(1, 90),
)


@given(st.lists(demands, max_size=8), st.lists(demands, max_size=4), limits)
def test_no_limit_is_broken_and_nobody_waits_for_nothing(
    waiting: list[Demand], running: list[Demand], bounds: Limits
) -> None:
    places = admit(waiting, running, bounds)
    newcomers = [waiting[place] for place in places]
    batch = [*running, *newcomers]
    if newcomers and len(batch) > 1:
        assert len(batch) <= bounds.max_rows
        assert len(batch) * max(row.longest for row in batch) <= bounds.cache_tokens
        assert all(row.failures < 2 for row in batch)
    if len(newcomers) > 1:
        assert len(newcomers) * max(row.unread for row in newcomers) <= bounds.prompt_tokens
        assert all(row.scores_prompt == newcomers[0].scores_prompt for row in newcomers)
    if waiting and not running:
        assert places[0] == 0
    left = next((place for place in range(len(waiting)) if place not in places), None)
    if left is not None:  # the first that is left has no place: beside those that went before it, it breaks a limit
        assert breaks([waiting[place] for place in places if place < left] + [waiting[left]], running, bounds)


def breaks(newcomers: Sequence[Demand], running: Sequence[Demand], bounds: Limits) -> bool:
    batch = [*running, *newcomers]
    return (
        len(batch) > bounds.max_rows
        or len(batch) * max(row.longest for row in batch) > bounds.cache_tokens
        or any(row.failures > 1 for row in batch)
        or (len(newcomers) > 1 and len(newcomers) * max(row.unread for row in newcomers) > bounds.prompt_tokens)
        or len({row.scores_prompt for row in newcomers}) > 1
    )
