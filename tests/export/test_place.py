"""An export that is killed around any move: the old folder or the new one, whole, and the next run heals the rest."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from polymerge import export_dense, export_peft, merge
from polymerge.bundle.place import begin_work, settled, work_folder
from polymerge.errors import OutputExistsError
from tests.killed import assert_nothing_beside, content, moves_until_death, started
from tests.tiny import COMMON, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
EXPORTS: dict[str, Callable[..., object]] = {"dense": export_dense, "peft": export_peft}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    config = LlamaConfig(**{**COMMON, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48})
    experts = make_experts("llama", folder, count=2, config=config)
    return merge({"experts": {n: str(p) for n, p in experts.items()}, "compress_rate": 0.6}, folder / "b").path


def export_and_die(form: str, bundle: str, out: str, call: int, after: bool) -> None:
    """In the process that will be killed: e1 over an export of e0."""
    counted = Path(out).with_name("calls")
    moves_until_death(lambda: EXPORTS[form](bundle, "e1", out, overwrite=True), call, after, counted)


@pytest.mark.parametrize("form", EXPORTS)
def test_a_kill_around_any_move_leaves_the_old_export_or_the_new_one(form: str, bundle: Path, tmp_path: Path) -> None:
    EXPORTS[form](bundle, "e0", tmp_path / "old")
    EXPORTS[form](bundle, "e1", tmp_path / "new")
    old, new = content(tmp_path / "old"), content(tmp_path / "new")
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "old", out)
    process = started(export_and_die, form, str(bundle), str(out), -1, False)
    process.join(60)
    assert process.exitcode == 0 and content(out) == new
    calls = int((tmp_path / "calls").read_text())
    states = set()
    for call in (1, 2, *range(calls - 4, calls + 1)):  # the moves into place are the last ones
        for after in (False, True):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(tmp_path / "old", out)
            process = started(export_and_die, form, str(bundle), str(out), call, after)
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
            if out.exists():
                assert content(out) in (old, new), (call, after)
                states.add("old" if content(out) == old else "new")
            else:
                assert content(tmp_path / "out.partial" / "previous") == old, (call, after)
                states.add("beside")
            EXPORTS[form](bundle, "e1", out, overwrite=True)
            assert content(out) == new
            assert_nothing_beside(out)
    assert states == {"old", "beside", "new"}


def test_what_a_kill_left_beside_its_place_is_brought_back_by_the_next_run_whatever_it_is(
    bundle: Path, tmp_path: Path
) -> None:
    export_dense(bundle, "e0", tmp_path / "out")
    old = content(tmp_path / "out")
    begin_work(work_folder(tmp_path / "out"), "export")
    (tmp_path / "out").rename(tmp_path / "out.partial" / "previous")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        export_dense(bundle, "e1", tmp_path / "out")
    assert content(tmp_path / "out") == old


def test_a_bundle_is_never_the_place_of_an_export(bundle: Path) -> None:
    before = content(bundle)
    with pytest.raises(OutputExistsError, match="not an exported model"):
        export_dense(bundle, "e0", bundle, overwrite=True)
    assert content(bundle) == before


@pytest.mark.parametrize("name", [".", "/", "file/out"])
def test_what_cannot_be_a_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(OutputExistsError, match=r"not the name of a folder|is a file"):
        settled(name)


def test_neither_the_bundle_nor_what_it_is_made_of_is_overwritten(tmp_path: Path) -> None:
    config = LlamaConfig(**{**COMMON, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48})
    sources = make_experts("llama", tmp_path, count=3, config=config)
    made = merge({name: str(sources[name]) for name in ("e0", "e1")}, sources["e2"] / "bundle", compress_rate=0.6)
    for folder, lost in ((sources["e0"], sources["e0"]), (sources["e2"], made.path)):
        before = content(folder)
        with pytest.raises(OutputExistsError, match=f"holds {lost}, .* never overwritten"):
            export_dense(made, "e1", folder, overwrite=True)
        assert content(folder) == before
    export_dense(made, "e1", tmp_path / "out")
    export_dense(made, "e0", tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("inside", ["dense", "experts/e0/dense"])
def test_nothing_is_put_into_a_bundle(bundle: Path, inside: str) -> None:
    before = content(bundle)
    with pytest.raises(OutputExistsError, match="lies in the bundle"):
        export_dense(bundle, "e0", bundle / inside)
    with pytest.raises(OutputExistsError, match="lies in the bundle"):
        merge({"a": str(bundle), "b": str(bundle)}, bundle / inside)
    assert content(bundle) == before
