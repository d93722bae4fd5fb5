"""Tests leave nothing of theirs in the cache of whoever runs them."""

from __future__ import annotations

from pathlib import Path

from polymerge.host import cache_folder


def test_adapters_are_cached_where_tests_are_gone_after(own_cache: Path) -> None:
    assert cache_folder() == own_cache
    assert {file.name for file in own_cache.iterdir() if file.is_symlink()} == {"gguf", "demo", "tests"}
    assert not (own_cache / "adapters").is_symlink()
