"""A merge that is killed, or whose disk is full, at any moment: nothing half-written or lost, the same bytes after."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

import polymerge
from polymerge import Bundle, merge, verify
from polymerge.bundle.place import begin_work, work_folder
from polymerge.cli.main import main
from polymerge.errors import OutputExistsError, PolymergeError
from polymerge.merging.journal import JOURNAL, Staging
from tests.killed import assert_nothing_beside, content, die, moves_until_death, started
from tests.tiny import COMMON, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
SOURCE = str(Path(polymerge.__file__).parents[1])
TINY = {**COMMON, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
# Enough work for some seconds.
LONG = {**COMMON, "num_hidden_layers": 8, "hidden_size": 384, "intermediate_size": 1024}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = make_experts("llama", tmp_path_factory.mktemp("tiny"), count=2, config=LlamaConfig(**TINY))
    return {name: str(path) for name, path in made.items()}


@pytest.fixture(scope="module")
def old(experts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A previous bundle, another than what the merges of this module make."""
    recipe = {"experts": experts, "code": "factors", "compress_rate": 0.9, "seed": 1}
    return merge(recipe, tmp_path_factory.mktemp("old") / "b").path


def recipe_of(experts: dict[str, str]) -> dict[str, Any]:
    return {"experts": experts, "code": "factors", "compress_rate": 0.6}


@pytest.fixture(scope="module")
def undisturbed(experts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return content(merge(recipe_of(experts), tmp_path_factory.mktemp("undisturbed") / "b").path)


def work(recipe: dict[str, Any], out: str, options: dict[str, Any]) -> None:
    """In the process that will be killed."""
    torch.set_num_threads(1)
    merge(recipe, out, **options)


def work_and_die(recipe: dict[str, Any], out: str, options: dict[str, Any], call: int, after: bool) -> None:
    """Is killed just before or just after the given rename or deletion of the whole run."""
    moves_until_death(lambda: work(recipe, out, options), call, after, Path(out).with_name("calls"))


def moves_of(recipe: dict[str, Any], out: Path, options: dict[str, Any]) -> int:
    """How many renames and deletions a merge makes."""
    process = started(work_and_die, recipe, str(out), options, -1, False)
    process.join(60)
    assert process.exitcode == 0
    return int(out.with_name("calls").read_text())


def work_on(recipe: dict[str, Any], out: str, tensors: int) -> None:
    """Is killed when so many tensors are whole, with another begun."""
    finish = Staging.finish

    def deadly(self: Staging, *rest: Any) -> Any:
        if len(self.notes) == tensors:
            with self.files["model.safetensors"].path.open("ab") as handle:
                handle.write(b"half of a tensor")
            die()
        return finish(self, *rest)

    Staging.finish = deadly  # type: ignore[method-assign]
    work(recipe, out, {})


def killed_at(recipe: dict[str, Any], out: Path, tensors: int) -> None:
    process = started(work_on, recipe, str(out), tensors)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert finished_in(out) == tensors


@pytest.fixture(scope="module")
def calls(experts: dict[str, str], old: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Of one over a previous bundle."""
    out = tmp_path_factory.mktemp("calls") / "out"
    shutil.copytree(old, out)
    return moves_of(recipe_of(experts), out, {"overwrite": True})


@pytest.fixture(scope="module")
def first_calls(experts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> int:
    """Of one to a place where nothing is."""
    return moves_of(recipe_of(experts), tmp_path_factory.mktemp("first") / "out", {})


# Counted from the end: the moves into place are the last calls of a run.
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("from_end", range(16))
def test_a_kill_around_any_move_loses_neither_the_old_bundle_nor_the_work(
    experts: dict[str, str],
    old: Path,
    undisturbed: dict[str, bytes],
    calls: int,
    tmp_path: Path,
    from_end: int,
    after: bool,
) -> None:
    assert calls == 16
    out = tmp_path / "out"
    shutil.copytree(old, out)
    process = started(work_and_die, recipe_of(experts), str(out), {"overwrite": True}, calls - from_end, after)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    if out.exists():  # the old one or the new one, whole
        assert content(out) in (content(old), undisturbed)
        assert verify(out).ok
    else:  # between the two renames, the old one is beside its place
        assert content(tmp_path / "out.partial" / "previous") == content(old)
    bundle = merge(recipe_of(experts), out, resume=True, overwrite=True)
    assert content(bundle.path) == undisturbed
    assert_nothing_beside(out)


@pytest.mark.parametrize("from_end", range(5))
def test_a_kill_near_the_end_of_a_first_merge_can_be_resumed_without_overwriting(
    experts: dict[str, str], undisturbed: dict[str, bytes], first_calls: int, tmp_path: Path, from_end: int
) -> None:
    out = tmp_path / "out"
    process = started(work_and_die, recipe_of(experts), str(out), {}, first_calls - from_end, True)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with contextlib.suppress(OutputExistsError):  # it had been whole
        merge(recipe_of(experts), out, resume=True)
    assert content(out) == undisturbed
    assert verify(out).ok
    assert_nothing_beside(out)


def test_a_kill_between_the_two_renames_is_healed_by_the_next_run_whatever_it_is(
    experts: dict[str, str], old: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(old, begin_work(work_folder(out), "merge") / "previous")
    with pytest.raises(OutputExistsError):
        merge(recipe_of(experts), out)
    assert content(out) == content(old)
    assert_nothing_beside(out)


def test_a_failing_second_rename_leaves_the_old_bundle_to_be_found(
    experts: dict[str, str],
    old: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(old, out)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if Path(target) == out and self.name == "bundle":
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        with pytest.raises(Exception, match="Input/output error"):
            merge(recipe_of(experts), out, overwrite=True)
    kept = out if out.exists() else tmp_path / "out.partial" / "previous"
    assert content(kept) == content(old)
    assert content(merge(recipe_of(experts), out, resume=True, overwrite=True).path) == undisturbed
    assert_nothing_beside(out)


@pytest.fixture(scope="module")
def long_experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = make_experts("llama", tmp_path_factory.mktemp("long"), count=2, config=LlamaConfig(**LONG))
    return {name: str(path) for name, path in made.items()}


@pytest.fixture(scope="module")
def long_undisturbed(long_experts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Made in another process, as the killed ones are."""
    out = tmp_path_factory.mktemp("long-undisturbed") / "b"
    process = started(work, recipe_of(long_experts), str(out), {})
    process.join(120)
    assert process.exitcode == 0
    return content(out)


def kill_when(process: BaseProcess, ready: Callable[[], bool]) -> None:
    until = time.monotonic() + 100
    while not ready():
        assert process.is_alive(), "the merge ended before its kill"
        assert time.monotonic() < until
        time.sleep(0.002)
    time.sleep(random.Random().uniform(0, 0.03))  # any moment after it
    process.kill()
    process.join(60)


def finished_in(out: Path) -> int:
    """How many tensors are whole."""
    journal = out.with_name(out.name + ".partial") / JOURNAL
    return len(journal.read_bytes().splitlines()) if journal.exists() else 0


def test_kills_at_random_moments_and_resumes_give_the_same_bytes(
    long_experts: dict[str, str], long_undisturbed: dict[str, bytes], old: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(old, out)
    kept, seen = content(old), 0
    for finished in (1, 5, 23, 47, 60):
        options = {"overwrite": True, "resume": True}
        process = started(work, recipe_of(long_experts), str(out), options)
        kill_when(process, lambda finished=finished: finished_in(out) >= finished)
        assert finished_in(out) >= max(finished, seen)  # what was done is gone on with, not done again
        seen = finished_in(out)
        assert content(out) == kept
        assert Bundle.open(out).experts == ["e0", "e1"]
    process = started(work, recipe_of(long_experts), str(out), {"overwrite": True, "resume": True})
    kill_when(process, (tmp_path / "out.partial" / "bundle" / "config.json").exists)
    assert content(out) in (kept, long_undisturbed)
    merge(recipe_of(long_experts), out, overwrite=True, resume=True)
    assert content(out) == long_undisturbed
    assert_nothing_beside(out)


@pytest.mark.parametrize("damage", ["note cut off", "note of another kind", "changed", "cut off", "lost"])
@pytest.mark.parametrize("file", ["model.safetensors", "experts/e1/adapter_model.safetensors"])
def test_a_resume_does_again_what_is_no_longer_whole(
    experts: dict[str, str], undisturbed: dict[str, bytes], tmp_path: Path, damage: str, file: str
) -> None:
    out = tmp_path / "out"
    killed_at(recipe_of(experts), out, 9)
    journal, growing = tmp_path / "out.partial" / JOURNAL, tmp_path / "out.partial" / "bundle" / file
    data = bytearray(growing.read_bytes())
    if damage == "note cut off":
        journal.write_bytes(journal.read_bytes()[:-9])
    elif damage == "note of another kind":
        journal.write_bytes(journal.read_bytes() + b"[]\n")
    elif damage == "changed":
        data[len(data) * 3 // 4] ^= 1
        growing.write_bytes(data)
    elif damage == "cut off":
        growing.write_bytes(data[: len(data) * 3 // 4])
    else:
        growing.unlink()
    assert content(merge(recipe_of(experts), out, resume=True).path) == undisturbed


@pytest.mark.parametrize("change", [{"compress_rate": 0.7}, {"seed": 5}, {"norms": "average"}, {"dtype": "bfloat16"}])
def test_another_recipes_work_is_never_gone_on_with(
    experts: dict[str, str], tmp_path: Path, change: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    killed_at(recipe_of(experts), out, 5)
    with pytest.raises(OutputExistsError, match="half-done work of another recipe"):
        merge({**recipe_of(experts), **change}, out, resume=True)
    expected = merge({**recipe_of(experts), **change}, tmp_path / "fresh").path
    assert content(merge({**recipe_of(experts), **change}, out).path) == content(expected)


def test_a_configuration_that_changed_between_kill_and_resume_is_noticed(
    experts: dict[str, str], tmp_path: Path
) -> None:
    """The roles of tensors and the heads come from it."""
    folders = {name: str(shutil.copytree(path, tmp_path / name)) for name, path in experts.items()}
    out = tmp_path / "out"
    killed_at(recipe_of(folders), out, 5)
    for path in folders.values():
        config = Path(path) / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.5}))
    with pytest.raises(OutputExistsError, match="other sources"):
        merge(recipe_of(folders), out, resume=True)


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Any, str]:
    capsys.readouterr()
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(sys, "argv", ["polymerge", *arguments])
        main()
    return stopped.value.code, capsys.readouterr().err


class FullDisk:
    """The n-th write of one kind fails with ENOSPC, after half of its data where it has any."""

    def __init__(self, kind: str, number: int) -> None:
        self.kind, self.number, self.hit = kind, number, False

    def install(self, patched: pytest.MonkeyPatch) -> None:
        owner: Any = os if self.kind == "fsync" else Path
        real = getattr(owner, self.kind)

        def failing(target: Any, *args: Any, **kwargs: Any) -> Any:
            self.number -= 1
            if self.number >= 0:
                return real(target, *args, **kwargs)
            self.hit = True
            if args and self.kind != "mkdir":
                real(target, args[0][: len(args[0]) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(owner, self.kind, failing)


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("write_text", 0),  # the work's own note; tensors and all others are tests/test_full_disk.py's
        *(("fsync", number) for number in (0, 2, 4, 6, 8)),  # the bundle's files
        ("mkdir", 0),
        ("mkdir", 4),
    ],
)
def test_a_full_disk_is_one_line_and_keeps_the_old_bundle(
    experts: dict[str, str],
    old: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    number: int,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(old, out)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_of(experts)))
    arguments = ["merge", str(tmp_path / "recipe.yaml"), "-o", str(out), "--overwrite", "--quiet"]
    disk = FullDisk(kind, number)
    with monkeypatch.context() as patched:
        disk.install(patched)
        code, error = command(capsys, monkeypatch, *arguments)
    assert disk.hit
    assert code == 2
    assert len(error.splitlines()) == 1 and "Traceback" not in error
    assert "the disk is full" in error and str(out) in error and "--resume" in error
    assert content(out) == content(old)
    assert command(capsys, monkeypatch, *arguments, "--resume") == (0, "")
    assert content(out) == undisturbed
    assert_nothing_beside(out)


def test_a_file_larger_than_the_file_system_takes_is_one_line(
    experts: dict[str, str], old: Path, tmp_path: Path
) -> None:
    """As on FAT32, or under `ulimit -f`."""
    out = tmp_path / "out"
    shutil.copytree(old, out)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_of(experts)))
    limit = 20_000
    assert max(file.stat().st_size for file in old.rglob("*.safetensors")) > limit
    done = subprocess.run(
        [sys.executable, "-m", "polymerge", "merge", "recipe.yaml", "-o", "out", "--overwrite", "--quiet"],
        env={**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert content(out) == content(old)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "out" in done.stderr and "arge" in done.stderr


def test_the_command_goes_on_where_a_killed_command_stopped(
    long_experts: dict[str, str], long_undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """The whole way with real processes, nothing shared."""
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_of(long_experts)))
    command = [sys.executable, "-m", "polymerge", "merge", "recipe.yaml", "-o", "out"]
    options: dict[str, Any] = {
        "env": {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"},
        "cwd": tmp_path,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen(command, **options) as killed:
        until = time.monotonic() + 100
        while finished_in(tmp_path / "out") < 30:
            assert killed.poll() is None and time.monotonic() < until
            time.sleep(0.002)
        killed.kill()
    assert not (tmp_path / "out").exists()
    assert 30 <= finished_in(tmp_path / "out") < 75
    done = subprocess.run([*command, "--resume"], timeout=120, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == long_undisturbed
    assert_nothing_beside(tmp_path / "out")


def measured(recipe: dict[str, Any], out: str) -> None:
    work(recipe, out, {})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    Path(out).with_suffix(".peak").write_text(str(peak))


def counted(recipe: dict[str, Any], out: str) -> None:
    def written() -> int:
        return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["wchar"])

    before = written()
    work(recipe, out, {})
    Path(out).with_suffix(".written").write_text(str(written() - before))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts a process's bytes")
@pytest.mark.parametrize("workers", [1, 3])
def test_a_merge_writes_its_bundle_once(long_experts: dict[str, str], tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    process = started(counted, {**recipe_of(long_experts), "workers": workers}, str(out))
    process.join(120)
    assert process.exitcode == 0
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert size > 30e6
    assert int(out.with_suffix(".written").read_text()) <= 1.02 * size


def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for layers in (4, 12):
        config = LlamaConfig(**{**COMMON, "num_hidden_layers": layers, "hidden_size": 512, "intermediate_size": 1280})
        made = make_experts("llama", tmp_path / str(layers), count=2, config=config)
        sizes.append((made["e0"] / "model.safetensors").stat().st_size)
        out = tmp_path / f"out-{layers}"
        recipe = {"experts": {name: str(path) for name, path in made.items()}, "code": "factors"}
        process = started(measured, recipe, str(out))
        process.join(120)
        assert process.exitcode == 0
        peaks.append(int(out.with_suffix(".peak").read_text()))
        assert len(load_file(out / "model.safetensors")) == 9 * layers + 3
        shutil.rmtree(tmp_path / str(layers))
        shutil.rmtree(out)
    grown = sizes[1] - sizes[0]
    assert grown > 75e6  # what holding even one of the models would show
    assert peaks[1] - peaks[0] < 0.4 * grown, (peaks, sizes)


def test_a_killed_merge_with_a_code_resumes_to_the_same_bytes(experts: dict[str, str], tmp_path: Path) -> None:
    recipe, out = {**recipe_of(experts), "code": "int4"}, tmp_path / "out"
    killed_at(recipe, out, 5)
    expected = merge(recipe, tmp_path / "fresh").path
    assert content(merge(recipe, out, resume=True).path) == content(expected)


@pytest.mark.parametrize("text", ["", "{", "[]\x00", '{"polymerge": '])
def test_a_damaged_note_of_the_whole_merge_starts_it_anew_with_a_line(
    experts: dict[str, str], undisturbed: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    out = tmp_path / "out"
    killed_at(recipe_of(experts), out, 5)
    (tmp_path / "out.partial" / "merge.json").write_text(text)
    assert content(merge(recipe_of(experts), out, resume=True).path) == undisturbed
    assert "merge.json: cannot be read, so what was half done is done anew" in caplog.text
    assert_nothing_beside(out)


def test_half_done_work_is_gone_on_with_on_another_device(
    experts: dict[str, str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed_at({**recipe_of(experts), "device": "auto"}, out, 5)
    resumed: list[int] = []
    recipe = {**recipe_of(experts), "device": "cpu"}
    merge(recipe, out, resume=True, progress=lambda progress: resumed.append(progress.resumed))
    assert resumed[0] > 0
    assert content(out) == undisturbed


def test_sources_that_were_copied_or_touched_are_the_same_and_others_of_equal_times_are_not(
    experts: dict[str, str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    copies = {name: shutil.copytree(path, tmp_path / name) for name, path in experts.items()}
    recipe, out = recipe_of({name: str(path) for name, path in copies.items()}), tmp_path / "out"
    killed_at(recipe, out, 5)
    weights = copies["e0"] / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    shutil.copytree(tmp_path / "out.partial", tmp_path / "other.partial")
    merge(recipe, out, resume=True)
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    os.utime(weights, ns=(1, 1))
    with pytest.raises(OutputExistsError, match="other sources"):
        merge(recipe, tmp_path / "other", resume=True)


def test_a_tensor_that_changes_after_it_was_written_is_noticed_at_the_end(
    experts: dict[str, str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """As by a second process, or a disk that lies."""
    out, hit = tmp_path / "out", []

    def damage(progress: Any) -> None:
        if progress.done == progress.total:
            file = tmp_path / "out.partial" / "bundle" / "model.safetensors"
            data = bytearray(file.read_bytes())
            data[-5] ^= 1
            file.write_bytes(data)
            hit.append(file)

    with pytest.raises(PolymergeError, match=r"is no longer what was written; run again with --resume"):
        merge(recipe_of(experts), out, progress=damage)
    assert hit and not out.exists()
    assert content(merge(recipe_of(experts), out, resume=True).path) == undisturbed


def test_an_output_that_is_a_link_stays_one_however_often_it_is_overwritten(
    experts: dict[str, str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "bundle")
    for _ in range(3):
        merge(recipe_of(experts), tmp_path / "out", overwrite=True)
        assert (tmp_path / "out").is_symlink() and content(tmp_path / "disk" / "bundle") == undisturbed
    assert_nothing_beside(tmp_path / "disk" / "bundle")
    assert not (tmp_path / "out.partial").exists()
