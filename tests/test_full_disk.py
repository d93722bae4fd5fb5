"""A disk that is full at any write, or after any byte: the old state stays, and the user reads one line."""

from __future__ import annotations

import builtins
import errno
import io
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from polymerge import Bundle, add_expert, export_dense, merge, verify
from polymerge.errors import DiskSpaceError
from tests.killed import content
from tests.tiny import COMMON, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**COMMON, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}


class Disk:
    """Counts what is written under a folder, and is full after so many calls or bytes. Half of what does not fit is
    written, as a disk does it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.bytes = str(folder), 0, 0
        self.most_calls: float = float("inf")
        self.most_bytes: float = float("inf")

    def write(self, real: Callable[[Any], int], data: Any) -> int:
        size = memoryview(data).nbytes
        room = self.most_bytes - self.bytes
        if self.calls >= self.most_calls or size > room:
            real(memoryview(data).cast("B")[: min(size // 2, int(min(room, size)))])
            self.bytes = int(min(self.most_bytes, 10**12))  # and stays full
            self.most_calls = 0
            raise OSError(errno.ENOSPC, "No space left on device")
        self.calls += 1
        self.bytes += size
        return real(data)

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Every file that Python opens for writing in the folder lies on it."""
        real_open, disk = io.open, self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                return disk.write(super().write, data)

        def opened(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *rest: Any, **more: Any
        ) -> Any:
            kind = mode.replace("b", "").replace("t", "")
            if kind[0] not in "wxa" or not str(file).startswith(disk.folder):
                return real_open(file, mode, buffering, encoding, *rest, **more)
            raw = io.BufferedWriter(Raw(file, kind))
            return raw if "b" in mode else io.TextIOWrapper(raw, encoding or "utf-8", newline="\n", write_through=True)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(io, "open", opened)
            patched.setattr(builtins, "open", opened)
            yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = make_experts("llama", tmp_path_factory.mktemp("tiny"), config=LlamaConfig(**TINY))
    return {name: str(path) for name, path in made.items()}


@pytest.fixture(scope="module")
def old(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge({"experts": two(sources), "compress_rate": 0.9}, tmp_path_factory.mktemp("old") / "b").path


def two(sources: dict[str, str]) -> dict[str, str]:
    return {name: sources[name] for name in ("e0", "e1")}


def do_merge(out: Path, sources: dict[str, str], old: Path) -> None:
    merge({"experts": two(sources), "compress_rate": 0.6}, out, overwrite=True, resume=True)


def do_add(out: Path, sources: dict[str, str], old: Path) -> None:
    add_expert(out, "e2", sources["e2"])


def do_export(out: Path, sources: dict[str, str], old: Path) -> None:
    export_dense(old, "e1", out, overwrite=True)


VERBS = {"merge": do_merge, "add": do_add, "export": do_export}


def prepared(verb: str, folder: Path, old: Path) -> Path:
    out = folder / "out"
    if verb == "export":
        export_dense(old, "e0", out)
    else:
        shutil.copytree(old, out)
    return out


def assert_full(verb: str, sources: dict[str, str], old: Path, folder: Path, calls: float, size: float) -> None:
    out = prepared(verb, folder, old)
    before, disk = content(out), Disk(folder)
    disk.most_calls, disk.most_bytes = calls, size
    with disk.mounted(), pytest.raises(DiskSpaceError, match=r"out.*the disk is full") as refused:
        VERBS[verb](out, sources, old)
    assert "\n" not in str(refused.value)
    assert content(out) == before
    if verb != "export":
        assert verify(out).ok and Bundle.open(out).experts == ["e0", "e1"]
    VERBS[verb](out, sources, old)  # with room again
    after = content(out)
    shutil.rmtree(folder)
    VERBS[verb](prepared(verb, folder, old), sources, old)
    assert after == content(out)
    shutil.rmtree(folder)


def measured(verb: str, sources: dict[str, str], old: Path, folder: Path) -> Disk:
    """What the whole work writes."""
    out, disk = prepared(verb, folder, old), Disk(folder)
    with disk.mounted():
        VERBS[verb](out, sources, old)
    shutil.rmtree(folder)
    return disk


@pytest.mark.parametrize("verb", VERBS)
def test_a_few_moments_at_which_the_disk_is_full(verb: str, sources: dict[str, str], old: Path, tmp_path: Path) -> None:
    disk = measured(verb, sources, old, tmp_path / "x")
    assert disk.calls > 10 and disk.bytes > 20_000
    for share in (0.0, 0.3, 0.8, 0.99):
        assert_full(verb, sources, old, tmp_path / "x", int(disk.calls * share), float("inf"))
        assert_full(verb, sources, old, tmp_path / "x", float("inf"), int(disk.bytes * share))


@pytest.mark.slow
def test_a_disk_that_is_full_at_every_write_of_a_merge(sources: dict[str, str], old: Path, tmp_path: Path) -> None:
    for call in range(measured("merge", sources, old, tmp_path / "x").calls):
        assert_full("merge", sources, old, tmp_path / "x", call, float("inf"))


@pytest.mark.slow
def test_a_disk_that_is_full_after_any_of_200_bytes_of_a_merge(
    sources: dict[str, str], old: Path, tmp_path: Path
) -> None:
    draw, size = random.Random(0), measured("merge", sources, old, tmp_path / "x").bytes
    for _ in range(200):
        assert_full("merge", sources, old, tmp_path / "x", float("inf"), draw.randrange(size))
