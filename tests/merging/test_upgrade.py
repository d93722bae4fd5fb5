"""Bundles of every version open and answer as they did; an upgrade changes what is old and no answer."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import polymerge
from polymerge import Bundle, load_model, upgrade, verify
from polymerge.bundle.place import begin_work, work_folder
from polymerge.errors import BundleError, OutputExistsError
from polymerge.merging.upgrade import KIND
from tests.killed import assert_nothing_beside, content, moves_until_death, started

pytestmark = pytest.mark.usefixtures("one_thread")
OLD = Path(__file__).parents[1] / "data" / "bundles"
VERSIONS = {"v1": 1, "v2": 2, "v3": 3}


def copied(version: str, folder: Path) -> Path:
    return Path(shutil.copytree(OLD / version / "bundle", folder / "b"))


def assert_answers(version: str, bundle: Path) -> None:
    expected = load_file(OLD / version / "expected.safetensors")
    ids = expected.pop("ids")
    model = load_model(bundle)
    with torch.no_grad():
        for name, logits in expected.items():
            answer = model(ids, experts=None if name == "average" else name).logits
            torch.testing.assert_close(answer, logits, atol=1e-5, rtol=0)


def change(bundle: Path, name: str, **values: Any) -> None:
    """Of a JSON file, as another version would have written it: the manifest lists its hash."""
    text = json.dumps({**json.loads((bundle / name).read_text()), **values}).encode()
    (bundle / name).write_bytes(text)
    manifest = json.loads((bundle / "polymerge.json").read_text())
    if name in manifest["files"]:
        manifest["files"][name] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        (bundle / "polymerge.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_bundle_is_whole_and_answers_as_it_did(version: str) -> None:
    bundle = Bundle.open(OLD / version / "bundle")
    assert bundle.manifest.format_version == VERSIONS[version]
    assert verify(bundle.path).ok
    assert_answers(version, bundle.path)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_upgraded_bundle_is_whole_and_answers_as_it_did(version: str, tmp_path: Path) -> None:
    old = copied(version, tmp_path)
    config = "experts/code/adapter_config.json"
    change(old, config, peft_type="SOMETHING_OLD")
    change(old, "polymerge.json", polymerge_version="0.0.1")
    (old / "router").mkdir()
    digest = Bundle.open(old).digest
    (old / "router" / "router.json").write_text(json.dumps({"bundle": digest, "threshold": 0.5}))
    (old / "README.md").write_text("a user's own")
    assert not verify(old).ok
    before = {name: (old / name).read_bytes() for name in Bundle.open(old).manifest.files}
    done = upgrade(old)
    assert done.bundle.path == old and (done.before, done.after) == (VERSIONS[version],) * 2
    assert done.files == (config, "router/router.json", "polymerge.json")
    assert {name for name in before if (old / name).read_bytes() != before[name]} == {config}
    assert verify(old).ok
    assert_answers(version, old)
    assert json.loads((old / "router" / "router.json").read_text()) == {"bundle": done.bundle.digest, "threshold": 0.5}
    assert (old / "README.md").read_text() == "a user's own"
    assert done.bundle.manifest.polymerge_version == polymerge.__version__
    assert_nothing_beside(old)
    assert upgrade(old).files == ()


def test_a_bundle_as_this_version_writes_it_is_left_alone(tmp_path: Path) -> None:
    bundle = copied("v3", tmp_path)
    upgrade(bundle)
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    assert upgrade(bundle).files == ()
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before


@pytest.mark.parametrize("version", [8, 99, "3", None])
def test_a_newer_bundle_is_refused_by_its_version(tmp_path: Path, version: object) -> None:
    bundle = copied("v1", tmp_path)
    change(bundle, "polymerge.json", format_version=version, something="new")
    before = content(bundle)
    for use in (Bundle.open, upgrade, verify, load_model):
        with pytest.raises(BundleError, match=r"format version .*this polymerge reads versions 1, 2, 3, 4, 5, 6 and 7"):
            use(bundle)
    assert content(bundle) == before


def test_a_damaged_bundle_is_not_upgraded(tmp_path: Path) -> None:
    bundle = copied("v1", tmp_path)
    change(bundle, "polymerge.json", polymerge_version="0.0.1")
    file = bundle / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    before = content(bundle)
    with pytest.raises(BundleError, match=r"model\.safetensors: its SHA-256 is not the manifest's"):
        upgrade(bundle)
    assert content(bundle) == before
    assert_nothing_beside(bundle)


def test_a_merges_half_done_work_is_not_thrown_away(tmp_path: Path) -> None:
    bundle = copied("v1", tmp_path)
    change(bundle, "polymerge.json", polymerge_version="0.0.1")
    work = begin_work(work_folder(bundle), "merge")
    (work / "journal.jsonl").write_text("hours of work")
    with pytest.raises(OutputExistsError, match="half-done work is in the way; end it with --resume, or delete it"):
        upgrade(bundle)
    assert (work / "journal.jsonl").read_text() == "hours of work"
    begin_work(work, KIND)
    (work / "bundle").mkdir()  # of an upgrade that was killed
    assert upgrade(bundle).files == ("polymerge.json",)
    assert_nothing_beside(bundle)


def do(bundle: str, call: int, after: bool) -> None:
    moves_until_death(lambda: upgrade(bundle), call, after, Path(bundle).with_name("calls"))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_around_any_move_leaves_the_old_bundle_or_the_new_one(tmp_path: Path, after: bool) -> None:
    states = []
    for folder in ("old", "new"):
        bundle = copied("v1", tmp_path / folder)
        change(bundle, "polymerge.json", polymerge_version="0.0.1")
        if folder == "new":
            upgrade(bundle)
        states.append(content(bundle))
    for call in range(1, 100):
        bundle = copied("v1", tmp_path / str(call))
        change(bundle, "polymerge.json", polymerge_version="0.0.1")
        process = started(do, str(bundle), call, after)
        process.join(60)
        if process.exitcode == 0:
            assert call > 5
            return
        assert process.exitcode == -signal.SIGKILL
        Bundle.open(bundle)  # heals what was killed between two renames
        assert content(bundle) in states
        upgrade(bundle)
        assert content(bundle) == states[1]
        assert_nothing_beside(bundle)
