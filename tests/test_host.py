"""Where this machine keeps what can be made again, and what it has."""

import os
from pathlib import Path

import pytest

from polymerge.host import available_memory, cache_folder, usable_cores


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLYMERGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "polymerge"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "polymerge"
    monkeypatch.setenv("POLYMERGE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_cores_are_counted_where_the_system_tells_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores() == 6


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux tells it there")
def test_free_memory_is_at_most_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_memory()
    assert free is not None and 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert available_memory() is None
