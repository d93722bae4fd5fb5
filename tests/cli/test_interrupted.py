"""Ctrl-C in a merge says what is done and how to go on, and a second run says what lies there."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from polymerge.bundle.place import begin_work
from polymerge.cli.interrupted import STOPPED, whole_or_not
from polymerge.cli.main import main
from polymerge.merging import journal
from tests.conftest import Merged
from tests.tiny import make_experts


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr("sys.argv", ["polymerge", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_ctrl_c_names_the_command_that_goes_on_and_that_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = [f"{name}={path}" for name, path in make_experts("llama", tmp_path).items()]
    words = ["merge", *experts, "-o", str(tmp_path / "b")]
    finish = journal.Staging.finish

    def stopped(self: journal.Staging, work: object) -> object:
        if len(self.notes) == 3 and self.bundle.is_relative_to(tmp_path):
            raise KeyboardInterrupt
        return finish(self, work)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(journal.Staging, "finish", stopped)
        assert run(words, patched) == STOPPED
    said = capsys.readouterr().err
    assert f"of the tensors are done and lie in {tmp_path / 'b.partial'}" in said and not (tmp_path / "b").exists()
    go_on = said.split("go on: polymerge ")[1]
    assert run([*words, "--limit", "1"], monkeypatch) == 2  # refused, and the work stays
    assert f"note: {tmp_path / 'b.partial'} holds" in capsys.readouterr().err
    assert run(shlex.split(go_on), monkeypatch) == 0
    assert "holds" not in capsys.readouterr().err
    assert run([*words[:-1], str(tmp_path / "whole")], monkeypatch) == 0
    for file in ("model.safetensors", "polymerge.json"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_what_another_command_has_left_is_called_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = [f"{name}={path}" for name, path in make_experts("llama", tmp_path).items()]
    begin_work(tmp_path / "b.partial", "pull", repo="org/name")
    assert run(["merge", *experts, "-o", str(tmp_path / "b")], monkeypatch) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"b\.partial holds \d+ B of an interrupted pull, which is deleted", said)


def test_ctrl_c_before_a_verb_has_begun_is_a_word_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("polymerge.cli.main.app", stopped)
    assert run(["plan", "a=./a", "b=./b"], monkeypatch) == STOPPED
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_before_the_first_tensor_says_that_nothing_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("polymerge.search.merge.merge", stopped)
    assert run(["merge", "a=./a", "b=./b", "-o", str(tmp_path / "b")], monkeypatch) == STOPPED
    assert "before the first tensor" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_ctrl_c_before_the_first_tensor_is_told_says_what_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = [f"{name}={path}" for name, path in make_experts("llama", tmp_path).items()]
    words = ["merge", *experts, "-o", str(tmp_path / "b")]

    def stopped(self: journal.Staging, work: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(journal.Staging, "finish", stopped)
        assert run(words, patched) == STOPPED
    said = capsys.readouterr().err
    assert f" lie in {tmp_path / 'b.partial'}" in said and "nothing was written" not in said
    assert run(shlex.split(said.split("go on: polymerge ")[1]), monkeypatch) == 0


def test_ctrl_c_while_the_bundle_is_measured_says_that_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_experts("llama", tmp_path, count=2)
    (tmp_path / "p.jsonl").write_text('{"prompt": "w3 w4"}\n')
    words = [f"{name}={path}" for name, path in made.items()]
    words += [f"--prompts={name}={tmp_path / 'p.jsonl'}" for name in made]

    def stopped(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("polymerge.search.merge.agreements", stopped)
    monkeypatch.setattr("polymerge.search.merge.run_originals", lambda *args: None)
    monkeypatch.setattr("polymerge.search.merge.check_examples", lambda *args: None)
    assert run(["merge", *words, "-o", str(tmp_path / "b")], monkeypatch) == STOPPED
    said = capsys.readouterr().err
    assert f"{tmp_path / 'b'} is whole" in said and "--resume" not in said
    assert run(["verify", str(tmp_path / "b")], monkeypatch) == 0


def test_a_bundle_that_is_replaced_takes_its_router_with_it_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_experts("llama", tmp_path, count=2)
    words = ["merge", *(f"{name}={path}" for name, path in made.items()), "-o", str(tmp_path / "b")]
    assert run(words, monkeypatch) == 0
    (tmp_path / "b" / "router").mkdir()
    capsys.readouterr()
    assert run([*words, "--overwrite"], monkeypatch) == 0
    assert f"afterwards: polymerge router fit {tmp_path / 'b'} --data DIR" in capsys.readouterr().err
    assert not (tmp_path / "b" / "router").exists()


@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_while_an_expert_is_added_says_whether_it_is_in(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = [f"{name}={path}" for name, path in make_experts("llama", tmp_path).items()]
    assert run(["merge", *experts[:2], "-o", str(tmp_path / "b"), "-q"], monkeypatch) == 0

    def stopped(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    before = (tmp_path / "b" / "polymerge.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(f"polymerge.merging.grow.{'_assess' if late else '_finish'}", stopped)
        assert run(["add", str(tmp_path / "b"), f"more={tmp_path / 'llama-0-1'}"], patched) == STOPPED
    said = capsys.readouterr().err
    if late:
        assert "more was added before that" in said
    else:
        assert "it is as it was; the same command begins anew" in said
        assert (tmp_path / "b" / "polymerge.json").read_bytes() == before
        assert run(["add", str(tmp_path / "b"), f"more={tmp_path / 'llama-0-1'}"], monkeypatch) == 0
    assert run(["verify", str(tmp_path / "b")], monkeypatch) == 0
    with monkeypatch.context() as patched:
        patched.setattr("polymerge.merging.grow.hand_over", stopped)
        assert run(["remove", str(tmp_path / "b"), "more"], patched) == STOPPED
    assert "it is as it was" in capsys.readouterr().err


@pytest.mark.parametrize(("adding", "before"), [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("moved", [True, False])
def test_what_was_so_before_a_command_is_not_said_to_be_its_work(
    adding: bool, before: bool, moved: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    after = adding if moved else before
    holds = iter([before, after])
    monkeypatch.setattr("polymerge.cli.interrupted._holds", lambda bundle, name: next(holds))
    with pytest.raises(SystemExit) as ended, whole_or_not(Path("b"), "x", adding=adding):
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert ended.value.code == STOPPED
    assert (f"x was {'added' if adding else 'removed'} before that" in said) is (after is not before)
    assert ("it is as it was" in said) is (after is before)


def test_ctrl_c_where_the_bundle_cannot_be_opened_is_a_line_and_the_same_code(
    tmp_path: Path, merged: Merged, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "b"
    shutil.copytree(merged("llama")[0].path, broken)
    with pytest.raises(SystemExit) as ended, whole_or_not(broken, "x", adding=True):
        (broken / "polymerge.json").write_text("{")
        raise KeyboardInterrupt
    assert ended.value.code == STOPPED
    assert "`polymerge inspect` says whether x is in it" in " ".join(capsys.readouterr().err.split())


def test_a_demo_that_is_stopped_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("polymerge.demo.start.run_demo", stopped)
    monkeypatch.setattr("sys.argv", ["polymerge", "demo"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted: experts that are trained lie in the cache")
