"""What `merge --prompts` says of every expert, and the command that it prints."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from polymerge.cli.main import main
from polymerge.cli.verdicts import print_measured
from polymerge.search.agreement import Agreement
from tests.tiny import recipe_folder


@pytest.mark.parametrize(
    ("measured", "said", "target"),
    [
        (Agreement(0.1, 0.99, 50, 0.5, 1.0), "math: less than 99% of the accuracy is kept", "accuracy=99%"),
        (Agreement(0.1, 0.97, 50, 1.0, 1.0), "math: less than 98% of the likeliest tokens are the same", "kl=0.005"),
        (Agreement(0.1, 0.97, 50), "math: less than 98% of the likeliest tokens are the same", "kl=0.005"),
        (Agreement(0.0, 0.98, 50, 0.99, 1.0), None, None),
    ],
)
def test_what_is_short_is_named_with_the_target_that_asks_for_it(
    measured: Agreement, said: str | None, target: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    print_measured({"math": measured, "code": Agreement(0.0, 1.0, 50, 1.0, 1.0)}, "polymerge merge r.yaml -o b")
    printed = " ".join(capsys.readouterr().out.split())
    if said is None:
        assert "less than" not in printed and "--target" not in printed
    else:
        assert said in printed and printed.count("less than") == 1
        assert printed.endswith(f"polymerge merge r.yaml -o b --target {target} --overwrite")


def test_the_command_that_is_printed_runs_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recipe_folder(tmp_path / "my own recipes", [{"prompt": "w3 w4 w5"}, {"prompt": "w6 w2"}])
    words = ["polymerge", "merge", str(folder / "recipe.yaml"), "-o", str(folder / "b")]
    words += [f"--prompts={name}={folder / 'prompts.jsonl'}" for name in ("e0", "e1")]

    def run(words: list[str]) -> str:
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as raised:
            main()
        said = capsys.readouterr()
        assert not raised.value.code, said.err
        return said.out

    printed = run([*words, "--compress-rate=1"])
    command = next(line for line in printed.splitlines() if "--target" in line)
    found = run(shlex.split(command.replace("kl=0.005", "kl=100")))  # random models are too far apart for any rate
    again = next(line for line in found.splitlines() if line.startswith("repeat: ")).removeprefix("repeat: ")
    assert "repeat:" not in run([*shlex.split(again), "--overwrite"])


def test_accuracy_is_no_target_where_an_original_is_never_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_measured(
        {"a": Agreement(0.1, 1.0, 50, 0.5, 1.0), "b": Agreement(0.0, 1.0, 50, 0.0, 0.0)}, "polymerge merge r"
    )
    assert "--target kl=0.005" in capsys.readouterr().out
