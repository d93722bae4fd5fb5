"""What the layers of a batch share: made once, and not carried over to the next batch."""

from __future__ import annotations

import torch

from polymerge.model.assignment import Assignment


def test_a_value_is_made_once_for_a_batch_and_anew_for_the_next() -> None:
    state = Assignment(["a", "b"], torch.device("cpu"))
    made: list[int] = []

    def make() -> list[int]:
        made.append(len(made))
        return list(made)

    assert state.once("key", make) is state.once("key", make)
    assert state.once("other", make) == [0, 1]
    state.set("b", 1)
    assert state.once("key", make) == [0, 1, 2]


def test_none_is_a_value_too() -> None:
    state = Assignment(["a"], torch.device("cpu"))
    made: list[int] = []
    assert [state.once("key", lambda: made.append(1)) for _ in range(3)] == [None] * 3
    assert made == [1]
