"""Room for headers is kept before sizes are known, and it is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polymerge.bundle import write
from polymerge.bundle.bundle import Bundle
from polymerge.merging.layout import layout_of
from polymerge.merging.plan import plan_merge
from tests.conftest import Merged
from tests.tiny import ARCHITECTURES


def header_size(file: Path) -> int:
    with file.open("rb") as handle:
        return 8 + int.from_bytes(handle.read(8), "little")


def rooms(bundle: Bundle, experts: dict[str, Path], **settings: Any) -> dict[str, int]:
    plan = plan_merge({"experts": {name: str(path) for name, path in experts.items()}, "code": "factors", **settings})
    return dict(layout_of(plan).rooms)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("settings", [{"compress_rate": 0.0}, {"compress_rate": 0.7, "scale": "shared"}])
def test_every_files_header_is_as_long_as_its_room(merged: Merged, architecture: str, settings: dict[str, Any]) -> None:
    bundle, experts = merged(architecture, **settings)
    planned = rooms(bundle, experts, **settings)
    assert planned == {file: header_size(bundle.path / file) for file in planned}
    assert len(planned) == 1 + len(bundle.experts)


def test_shards_have_rooms_of_their_own(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, experts = merged("llama", compress_rate=0.9)
    monkeypatch.setattr(write, "SHARD_BYTES", 20_000)
    plan = plan_merge({"experts": {name: str(path) for name, path in experts.items()}})
    layout = layout_of(plan)
    shards = sorted(set(layout.base.values()))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert list(layout.base) == [task.name for task in plan.tasks]
    assert [layout.file_of(None, task.name) for task in plan.tasks] == sorted(layout.base.values())
    assert all(layout.owner_of(file) is None for file in shards)
    assert layout.owner_of(layout.file_of("e1", "anything")) == "e1"
    assert bundle.base.tensors.keys() == layout.base.keys()
