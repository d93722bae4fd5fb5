"""How people name what answers."""

from typing import Any

import pytest

from polymerge.engine.mixture import expert_of
from polymerge.errors import ModelError


@pytest.mark.parametrize(
    ("text", "expert"),
    [
        ("math", "math"),
        ("average", None),
        ("math:0.7+code:0.3", {"math": 0.7, "code": 0.3}),
        ("math+code:3", {"math": 1.0, "code": 3.0}),
        ("math:1 + average:1e-1", {"math": 1.0, "average": 0.1}),
    ],
)
def test_names_and_mixtures(text: str, expert: Any) -> None:
    assert expert_of(text) == expert


@pytest.mark.parametrize(
    "text", ["math:", "math:0", "math:-1+code:2", "math:nan", "math:inf", "math+", "+", "a+a:2", ":1"]
)
def test_what_is_no_mixture_is_said_in_a_line(text: str) -> None:
    with pytest.raises(ModelError, match=r"^[^\n]+$"):
        expert_of(text)
