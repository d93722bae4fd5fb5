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

import polymerge.merging.run
from polymerge.errors import DiskSpaceError
from polymerge.merging.proof import Proof
from tests.test_killed_verbs import DECOYS, VERBS, decoys, fresh, made, state

__all__ = ["made"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")


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
            if not set(kind) & set("wxa+") or not str(file).startswith(disk.folder):
                return real_open(file, mode, buffering, encoding, *rest, **more)
            raw = io.BufferedWriter(Raw(file, kind))
            return raw if "b" in mode else io.TextIOWrapper(raw, encoding or "utf-8", newline="\n", write_through=True)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(io, "open", opened)
            patched.setattr(builtins, "open", opened)
            yield


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof before a merge works in a folder of its own, and takes most of a tiny merge's time."""
    plain = Proof("LlamaForCausalLM", True, "layers")
    monkeypatch.setattr(polymerge.merging.run, "prove", lambda *_, **__: plain)


@pytest.fixture(scope="module")
def states(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[object, object, Disk]]:
    """The state before and after every verb, and what it writes."""
    known: dict[str, tuple[object, object, Disk]] = {}

    def get(verb: str) -> tuple[object, object, Disk]:
        if verb not in known:
            folder = tmp_path_factory.mktemp("measured") / "f"
            fresh(verb, made, folder)
            before, disk = state(verb, folder), Disk(folder)
            with disk.mounted():
                VERBS[verb].do(folder, made)
            known[verb] = before, state(verb, folder), disk
        return known[verb]

    return get


def assert_full(verb: str, made: Path, states: Any, folder: Path, calls: float, size: float) -> None:
    old, new, _ = states(verb)
    fresh(verb, made, folder)
    disk = Disk(folder)
    disk.most_calls, disk.most_bytes = calls, size
    refused = None
    with disk.mounted():
        try:
            VERBS[verb].do(folder, made)
        except DiskSpaceError as error:
            refused = str(error)
    if refused is None:  # the statistics of one that is out already
        assert verb == "remove" and disk.most_calls == 0 and state(verb, folder) == new
    else:
        assert "the disk is full" in refused and str(folder) in refused and "\n" not in refused
        assert state(verb, folder) == old
    left = {path.name for path in folder.iterdir()} - {*DECOYS, "out", ".out.polymerge.lock"}
    assert left <= {"merge": {"out.partial"}, "compete": {"out.partial"}}.get(verb, set())  # to be gone on with
    if verb in ("add", "remove", "router fit"):
        assert not [path for path in (folder / "out").rglob("*") if path.name.startswith(".")]
    assert decoys(folder) == dict.fromkeys(DECOYS, "years of work")
    VERBS[verb].again(folder, made)  # with room again
    assert state(verb, folder) == new
    assert {path.name for path in folder.iterdir()} <= {*DECOYS, "out", ".out.polymerge.lock"}
    shutil.rmtree(folder)


@pytest.mark.parametrize("verb", VERBS)
def test_a_few_moments_at_which_the_disk_is_full(verb: str, made: Path, states: Any, tmp_path: Path) -> None:
    disk = states(verb)[2]
    assert disk.calls >= 2 and disk.bytes > 1000
    for share in (0.0, 0.3, 0.6, 0.99):
        assert_full(verb, made, states, tmp_path / "x", int(disk.calls * share), float("inf"))
        assert_full(verb, made, states, tmp_path / "x", float("inf"), int(disk.bytes * share))


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_is_full_at_every_write(verb: str, made: Path, states: Any, tmp_path: Path) -> None:
    for call in range(states(verb)[2].calls):
        assert_full(verb, made, states, tmp_path / "x", call, float("inf"))


@pytest.mark.slow
def test_a_disk_that_is_full_after_any_of_200_bytes_of_a_merge(made: Path, states: Any, tmp_path: Path) -> None:
    draw, size = random.Random(0), states("merge")[2].bytes
    for _ in range(200):
        assert_full("merge", made, states, tmp_path / "x", float("inf"), draw.randrange(size))
