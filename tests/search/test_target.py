"""Targets as people write them."""

from __future__ import annotations

import pytest

from polymerge.errors import TargetError
from polymerge.search.agreement import Agreement
from polymerge.search.sweep import Point
from polymerge.search.target import read_target


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("kl=0.001", "kl", 0.001),
        ("kl = 1e-4", "kl", 1e-4),
        ("accuracy=99%", "accuracy", 0.99),
        ("accuracy=0.5", "accuracy", 0.5),
        ("accuracy=100%", "accuracy", 1.0),
        ("size=600MB", "size", 600e6),
        ("size=1.5 GB", "size", 1.5e9),
        ("size=1000", "size", 1000),
        ("size=1.2x", "times", 1.2),
    ],
)
def test_what_can_be_aimed_at(text: str, kind: str, value: float) -> None:
    target = read_target(text)
    assert (target.kind, target.value, target.text) == (kind, value, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speed=3", "write kl=0.001, accuracy=99%, size=600MB"),
        ("0.001", "write kl=0.001"),
        ("", "write kl=0.001"),
        ("kl=0", "only compress_rate 0 has a KL of 0"),
        ("kl=-0.1", "a KL is a number over 0"),
        ("kl=nan", "a KL is a number over 0"),
        ("kl=inf", "a KL is a number over 0"),
        ("kl=", "a KL is a number over 0"),
        ("kl=1%", "a KL is a number over 0"),
        ("accuracy=150%", "over 0% and at most 100%"),
        ("accuracy=99", "over 0% and at most 100%"),
        ("accuracy=-1%", "over 0% and at most 100%"),
        ("accuracy=nan", "over 0% and at most 100%"),
        ("accuracy=0%", "over 0% and at most 100%"),
        ("size=0MB", "a size is written as"),
        ("size=-1GB", "a size is written as"),
        ("size=big", "a size is written as"),
        ("size=nanx", "a size is written as"),
        ("size=1e300x", "a size is written as"),
        (f"size={'9' * 400}MB", "a size is written as"),
        ("size=x", "a size is written as"),
    ],
)
def test_what_is_none_is_one_line(text: str, said: str) -> None:
    with pytest.raises(TargetError, match=said) as stopped:
        read_target(text)
    assert "\n" not in str(stopped.value)


def test_the_worst_expert_decides() -> None:
    good = Agreement(0.001, 1.0, 10, accuracy=0.8, original_accuracy=0.8)
    bad = Agreement(0.009, 1.0, 10, accuracy=0.6, original_accuracy=0.8)
    point = Point("int4", 0.9, 1, 1, 1.0, 1.0, {"a": good, "b": bad})
    assert not read_target("kl=0.008").is_reached(point)
    assert read_target("kl=0.009").is_reached(point)
    assert not read_target("accuracy=76%").is_reached(point)
    assert read_target("accuracy=75%").is_reached(point)
    assert read_target("kl=1").words(point) == "worst KL 0.009 (b)"
    assert read_target("accuracy=1%").words(point) == "least kept 75.0% (b)"


def test_a_kl_that_is_no_number_reaches_nothing() -> None:
    point = Point("int4", 0.9, 1, 1, 1.0, 1.0, {"a": Agreement(float("nan"), 1.0, 10)})
    assert not read_target("kl=1").is_reached(point)
