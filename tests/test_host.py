"""Where this machine keeps what can be made again."""

from pathlib import Path

import pytest

from polymerge.host import cache_folder


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLYMERGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "polymerge"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "polymerge"
    monkeypatch.setenv("POLYMERGE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
