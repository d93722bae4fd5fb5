"""Which skills a demo is of; the training is no part of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from polymerge.demo.run import DemoSettings, load_skills
from polymerge.errors import DataError


def test_the_named_skills_in_their_order() -> None:
    assert [skill.name for skill in load_skills(DemoSettings(Path("out"), skills=["shell", "json"]))] == [
        "shell",
        "json",
    ]


@pytest.mark.parametrize(
    ("skills", "said"),
    [
        (["cooking", "json"], "no skill 'cooking'; the demo has json, math, shell"),
        (["json"], "at least two of json"),
        ([], "two"),
    ],
)
def test_a_skill_that_there_is_not_is_one_line_before_the_work(skills: list[str], said: str) -> None:
    """It was told after the measuring, and of experts that nobody had named."""
    with pytest.raises(DataError, match=said):
        load_skills(DemoSettings(Path("out"), skills=skills))
