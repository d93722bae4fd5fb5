"""What a user's text is on this disk: an answer for every text."""

from pathlib import Path

import pytest

from polymerge.paths import expanded, here

STRANGE = ("~nobodyhere/model", "x" * 300, "a\0b", "./" + "y" * 300)


@pytest.mark.parametrize("text", STRANGE)
def test_what_no_file_system_takes_for_a_path_is_not_here(text: str) -> None:
    assert here(text) is None and expanded(text) == Path(text)


def test_what_is_here_is_given_with_its_home_spelled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert here("~/model") == tmp_path / "model" and here("~/other") is None
