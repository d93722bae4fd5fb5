"""polymerge.json: what is written is what is read, experts come and go, and what it cannot be is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polymerge.bundle.files import FileEntry
from polymerge.bundle.manifest import ExpertRecord, Manifest, read_manifest
from polymerge.errors import BundleError
from tests.conftest import Merged


@pytest.fixture
def manifest(merged: Merged) -> Manifest:
    return merged("llama", compress_rate=0.6)[0].manifest


def test_what_is_written_is_what_is_read(merged: Merged, tmp_path: Path) -> None:
    for code in ("factors", "int4"):
        manifest = merged("llama", compress_rate=0.6, code=code)[0].manifest
        (tmp_path / "polymerge.json").write_text(manifest.to_json())
        assert read_manifest(tmp_path) == manifest


def test_an_expert_comes_and_goes(manifest: Manifest) -> None:
    record = ExpertRecord(source="x", sha256="y", dtype="float32")
    files = {"experts/a/one": FileEntry(bytes=1, sha256="z"), "experts/a/two": FileEntry(bytes=2, sha256="z")}
    low, high = manifest.scale_ratio_range
    grown = manifest.with_expert("a", record, files=files, ratios=[low / 2, high * 2], notes=["heard"])
    assert grown.experts == {**manifest.experts, "a": record}
    assert list(grown.experts)[-1] == "a"
    assert grown.files == {**manifest.files, **files} and list(grown.files) == sorted(grown.files)
    assert grown.scale_ratio_range == (low / 2, high * 2)
    assert grown.notes == (*manifest.notes, "heard")
    assert Manifest.model_validate(json.loads(grown.to_json())) == grown
    left = grown.without_expert("a")
    assert left.experts == manifest.experts and left.files == manifest.files
    assert manifest.with_expert("a", record, files={}, ratios=[]).scale_ratio_range == (low, high)


def test_an_experts_files_are_not_those_of_one_whose_name_begins_alike(manifest: Manifest) -> None:
    record = ExpertRecord(source="x", sha256="y", dtype="float32")
    grown = manifest
    for name in ("a", "ab"):
        grown = grown.with_expert(name, record, files={f"experts/{name}/f": FileEntry(bytes=1, sha256="")}, ratios=[])
    left = grown.without_expert("a")
    assert "experts/ab/f" in left.files and "experts/a/f" not in left.files


def without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda data: {key: value for key, value in data.items() if key not in keys}


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda data: [data], "format version None"),
    "another version": (
        lambda data: data | {"format_version": 8},
        "format version 8; .* reads versions 1, 2, 3, 4, 5, 6 and 7",
    ),
    "no version": (without("format_version"), "format version None"),
    "another format": (lambda data: data | {"format": "zip"}, "format: "),
    "a key more": (lambda data: data | {"evil": 1}, "evil: "),
    "a key less": (without("layers"), "layers: "),
    "a version that is not the code's": (lambda data: data | {"format_version": 2}, "does not fit code 'factors'"),
    "an unknown code": (lambda data: data | {"method": data["method"] | {"code": "int3"}}, r"method\.code: "),
    "a role": (lambda data: data | {"layers": [data["layers"][0] | {"role": "x"}]}, r"layers\.0\.role: "),
    "a size in words": (lambda data: data | {"files": {"x": {"bytes": "many", "sha256": ""}}}, r"files\.x\.bytes: "),
}


@pytest.mark.parametrize("row", BAD)
def test_what_is_no_manifest_is_one_line_that_names_the_place(merged: Merged, tmp_path: Path, row: str) -> None:
    change, said = BAD[row]
    shutil.copy(merged("llama", compress_rate=0.6)[0].path / "polymerge.json", tmp_path)
    file = tmp_path / "polymerge.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(BundleError, match=said) as raised:
        read_manifest(tmp_path)
    assert str(raised.value).startswith(str(file)) and "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_cannot_be_read_is_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "polymerge.json").write_bytes(data)
    with pytest.raises(BundleError, match="cannot be read"):
        read_manifest(tmp_path)


def test_no_folder_and_no_bundle_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder; make one with `polymerge merge"):
        read_manifest(tmp_path / "x")
    with pytest.raises(BundleError, match=r"has no polymerge\.json"):
        read_manifest(tmp_path)
