"""What lies in a bundle's folder beside what its manifest lists, and what is somewhere else by a link."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from polymerge import Bundle, add_expert, export_dense, load_model, remove_expert, verify
from polymerge.errors import BundleError, LockedError
from tests.conftest import Merged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bundle(merged: Merged, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged("llama", compress_rate=0.6)[0].path, tmp_path / "bundle"))


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize(
    "name",
    [
        "model-00007-of-00007.safetensors", "pytorch_model.bin", "chat_template.jinja", "modeling_x.py",
        "experts/e0/adapter_model.bin", "experts/stranger/adapter_config.json",
        "experts/stranger/adapter_model.safetensors",
        "router/weights-mine.safetensors", "merge_stats.jsonl.bak", "notes.txt",
    ],
)  # fmt: skip
def test_verify_reports_a_file_that_no_manifest_lists(bundle: Path, name: str) -> None:
    assert verify(bundle).ok
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("{}")
    assert verify(bundle).problems == [f"{name}: is not in the manifest, so not this bundle's; delete it"]


def test_verify_knows_a_repositorys_files_and_its_own(bundle: Path) -> None:
    for name in (
        "README.md", "LICENSE", "LICENSE.txt", ".gitattributes", ".git/config", ".cache/huggingface/x.metadata",
        "router/router.json", "router/fit.json", f"router/weights-{'0' * 16}.safetensors", "staged.json",
    ):  # fmt: skip
        (bundle / name).parent.mkdir(exist_ok=True, parents=True)
        (bundle / name).write_text("{}")
    assert verify(bundle).ok


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "adapter_config.json"])
def test_a_file_that_would_be_loaded_in_anothers_place_is_refused_at_once(bundle: Path, name: str) -> None:
    (bundle / name).write_text("{}")
    for use in (Bundle.open, load_model, verify):
        with pytest.raises(BundleError, match=f"{name}: is not in the manifest, but would be loaded"):
            use(bundle)


def test_a_stale_file_before_an_index_is_refused(bundle: Path) -> None:
    """As if the bundle had been written over a smaller one: transformers takes the one file before the index."""
    manifest = json.loads((bundle / "polymerge.json").read_text())
    entry = manifest["files"].pop("model.safetensors")
    manifest["files"]["model-00001-of-00001.safetensors"] = entry
    (bundle / "polymerge.json").write_text(json.dumps(manifest))
    shutil.copyfile(bundle / "model.safetensors", bundle / "model-00001-of-00001.safetensors")
    with pytest.raises(BundleError, match=r"model\.safetensors: is not in the manifest, but would be loaded"):
        Bundle.open(bundle)


def as_in_the_hubs_cache(bundle: Path, cache: Path) -> Path:
    """A snapshot: real folders, and links to blobs in them."""
    snapshot = cache / "models--org--name" / "snapshots" / "0f3c"
    blobs = cache / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(f for f in bundle.rglob("*") if f.is_file())):
        shutil.copyfile(file, blobs / str(number))
        place = snapshot / file.relative_to(bundle)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(blobs / str(number))
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_a_bundle_that_is_only_read(
    merged: Merged, bundle: Path, tmp_path: Path
) -> None:
    snapshot = as_in_the_hubs_cache(bundle, tmp_path)
    before = everything(snapshot.parents[1])
    assert verify(snapshot).ok
    export_dense(snapshot, "e0", tmp_path / "dense")
    with pytest.raises(LockedError, match="is the hub's cache, which is only read; `polymerge pull"):
        remove_expert(snapshot, "e2")
    with pytest.raises(LockedError, match="is the hub's cache"):
        add_expert(snapshot, "more", merged("llama", compress_rate=0.6)[1]["e2"])
    assert verify(snapshot).ok
    assert everything(snapshot.parents[1]) == before


@pytest.mark.parametrize("name", ["config.json", "experts/e1", "experts", "experts/e1/adapter_model.safetensors"])
def test_what_is_elsewhere_by_a_link_is_refused_and_stays(bundle: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (bundle / name).rename(outside)
    (bundle / name).symlink_to(outside)
    kept = everything(outside) if outside.is_dir() else outside.read_bytes()
    for use in (Bundle.open, lambda b: remove_expert(b, "e1"), lambda b: export_dense(b, "e1", tmp_path / "x")):
        with pytest.raises(BundleError, match="outside the bundle's folder; refused"):
            use(bundle)
    assert kept == (everything(outside) if outside.is_dir() else outside.read_bytes())


def test_an_experts_folder_that_is_a_link_inside_the_bundle_is_not_removed(bundle: Path) -> None:
    (bundle / "experts" / "e1").rename(bundle / ".e1")
    (bundle / "experts" / "e1").symlink_to(bundle / ".e1")
    before = everything(bundle)
    with pytest.raises(BundleError, match="is a link; experts come and go"):
        remove_expert(bundle, "e1")
    assert everything(bundle) == before


@pytest.mark.parametrize("name", ["../../outside", "../e1", "/tmp/x", "e0/../../..", "E0", "average", "a\\b"])
def test_a_manifest_that_names_a_folder_outside_is_refused_whole(bundle: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine").write_text("years of work")
    manifest = json.loads((bundle / "polymerge.json").read_text())
    manifest["experts"][name] = manifest["experts"]["e1"]
    (bundle / "polymerge.json").write_text(json.dumps(manifest))
    for use in (
        Bundle.open,
        verify,
        load_model,
        lambda b: remove_expert(b, name),
        lambda b: export_dense(b, name, tmp_path / "x"),
    ):
        with pytest.raises(BundleError, match=r"polymerge\.json: experts: .*expert"):
            use(bundle)
    assert (tmp_path / "outside" / "mine").read_text() == "years of work"
