"""What a user's text is on this disk: an answer for every text."""

from pathlib import Path
from typing import Any

import pytest

import polymerge
from polymerge.errors import PolymergeError
from polymerge.paths import expanded, here, path_of

STRANGE = ("~nobodyhere/model", "x" * 300, "a\0b", "./" + "y" * 300)


@pytest.mark.parametrize("text", STRANGE)
def test_what_no_file_system_takes_for_a_path_is_not_here(text: str) -> None:
    assert here(text) is None and expanded(text) == Path(text)


def test_what_is_here_is_given_with_its_home_spelled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert here("~/model") == tmp_path / "model" and here("~/other") is None


@pytest.mark.parametrize("given", [None, 3, "", b"bundle", "a\0b", ["bundle"]])
def test_what_is_no_path_is_refused_with_what_it_was_for(given: Any) -> None:
    with pytest.raises(PolymergeError, match=r"^output: give the path of a folder or file; .* is none$"):
        path_of(given, "output")
    for read in (polymerge.load_model, polymerge.inspect_bundle, polymerge.verify):
        with pytest.raises(PolymergeError, match=r"^bundle: give the path"):
            read(given)
    with pytest.raises(PolymergeError, match=r"^output: give the path"):
        polymerge.merge({"a": "./a", "b": "./b"}, given)


def test_a_path_of_nobody_here_is_a_path() -> None:
    assert path_of("~nobodyhere/model", "output") == Path("~nobodyhere/model")
