"""What the command line writes in a terminal of any width, and where it goes while a line moves."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from rich.cells import cell_len
from rich.console import Console

from polymerge.cli import console, progress
from polymerge.errors import SourceError
from polymerge.merging.plan import plan_merge
from polymerge.sources import opening, outline
from polymerge.sources.hub import download_begins


def terminal(monkeypatch: pytest.MonkeyPatch, **options: Any) -> io.StringIO:
    """What is written to a terminal that stands for standard error."""
    shown = io.StringIO()
    for module in (console, progress):
        monkeypatch.setattr(module, "err", Console(file=shown, highlight=False, force_terminal=True, **options))
    return shown


def told(text: str, *, force_terminal: bool, **options: Any) -> str:
    shown = io.StringIO()
    console.tell(text, to=Console(file=shown, highlight=False, force_terminal=force_terminal, **options))
    return shown.getvalue()


@pytest.mark.parametrize("text", ["a\nb", "", "a\n\nb", "a\n"])
def test_a_terminal_shows_the_lines_that_a_pipe_does(text: str) -> None:
    assert told(text, force_terminal=True, width=60) == told(text, force_terminal=False, width=60)


@pytest.mark.parametrize("columns", ["0", "1"])
def test_a_terminal_that_does_not_know_its_width_is_taken_to_have_80_columns(columns: str) -> None:
    script = "from polymerge.cli import console; console.tell('a word ' * 40); console.out.print('b word ' * 40)"
    told = {"COLUMNS": columns, "FORCE_COLOR": "1", "TERM": "xterm"}  # FORCE_COLOR: for rich, a terminal
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | told, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert not done.stderr and len(lines) == 8
    assert all(len(line) <= 80 for line in lines) and len(lines[0]) > 70 < len(lines[4])


def test_a_narrow_terminal_is_no_error() -> None:
    assert told("a word " * 3, force_terminal=True, width=1).split() == ["a", "word"] * 3


@pytest.mark.parametrize("width", [1, 2, 3, 10, 11])
def test_a_line_of_progress_counts_the_cells_of_wide_letters(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    shown = terminal(monkeypatch, width=width)
    console.over("数学の専門家: 3 of 7", last=False)
    assert cell_len(shown.getvalue().removesuffix("\r")) == max(width - 1, 1)


def test_a_moving_line_leaves_standard_output_where_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = terminal(monkeypatch)
    with progress.waiting("loading [b]"):
        print("an answer")
        print("a bar", end="\r", file=sys.stderr)
    out, errors = capsys.readouterr()
    assert (out, errors) == ("an answer\n", "a bar\r")
    assert "loading [b]" in shown.getvalue() and "a bar" not in shown.getvalue()


def bars_are(monkeypatch: pytest.MonkeyPatch, *, drawn: bool) -> None:
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "are_progress_bars_disabled", lambda: not drawn)


def bar() -> AbstractContextManager[Callable[[int, int], None]]:
    return progress.progress_bar("adding x", quiet=False)


@pytest.mark.parametrize("line", [lambda: progress.waiting("adding x"), bar])
@pytest.mark.parametrize("weights", [True, False])
def test_a_moving_line_has_gone_before_the_hubs_own_bars_come(
    monkeypatch: pytest.MonkeyPatch, line: Callable[[], AbstractContextManager[Any]], weights: bool
) -> None:
    shown = terminal(monkeypatch)
    while_loading: list[str] = []

    def download(*args: object, **options: object) -> str:
        while_loading.append(shown.getvalue())
        shown.truncate(0)
        raise LocalEntryNotFoundError("gone")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for module in (opening, outline):
        monkeypatch.setattr(module, "hub_answers", lambda: True)
    show_cursor, experts = "\x1b[?25h", {"a": "org/a", "b": "org/b"}
    bars_are(monkeypatch, drawn=True)
    with line(), pytest.raises(SourceError):
        plan_merge(experts, weights=weights)
    assert "adding x" in while_loading[0] and show_cursor in while_loading[0]
    assert "adding x" not in "".join(while_loading[1:]) + shown.getvalue()
    bars_are(monkeypatch, drawn=False)  # then no other word says what takes its time
    while_loading.clear()
    with line(), pytest.raises(SourceError):
        plan_merge(experts, weights=weights)
    assert show_cursor not in while_loading[0]


def test_a_bar_comes_back_after_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    bars_are(monkeypatch, drawn=True)
    with bar() as show:
        download_begins()
        assert shown.getvalue().endswith("\x1b[2K")  # it is wiped out
        show(1, 4)
    assert "25%" in shown.getvalue()
