"""An old bundle, written anew as this version would write it; what it answers stays the same.

Every version's bundle can be read. What may be old is the manifest's text and what follows from the tensors: settings
of adapters, and the digest that a router was fitted for. Tensors are linked, or copied where the file system cannot,
and the whole folder takes the old one's place at once. Knows a bundle's files; what is written in them is decided where
merges decide it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..bundle.files import SCRATCH, FileEntry, write_bytes, write_json
from ..bundle.manifest import MANIFEST, Manifest, version_of
from ..bundle.named import ROUTER
from ..bundle.place import begin_work, check_own, discard_work, mark_of, publish, restore, settled, work_folder
from ..bundle.verify import CHECKED_SETTINGS, expected_config
from ..bundle.write import write_manifest
from ..errors import BundleError, OutputExistsError
from ..sources.checkpoint import read_json
from ..version import __version__
from .change import CHANGE, alone_with

KIND = "upgrade"


@dataclass(frozen=True)
class Upgraded:
    """What an upgrade did.

    Attributes:
        bundle: the bundle as it is now.
        before, after: format versions.
        files: what was written anew; nothing where all was as this version writes it.
    """

    bundle: Bundle
    before: int
    after: int
    files: tuple[str, ...]


def upgrade(bundle: Bundle | str | Path) -> Upgraded:
    """Writes a bundle of an older version as this one would; killed anywhere, it leaves the old one or the new one.

    Raises:
        BundleError: not a bundle, one of a newer version, or a file is damaged.
        LockedError: another process is writing to it. OutputExistsError: half-done work of a merge is beside it.
    """
    path = settled(Bundle.open(bundle).path)
    with alone_with(path) as old:
        _check(old)
        settings = {f"experts/{expert}/adapter_config.json": _settings(old, expert) for expert in old.experts}
        texts = {name: text for name, text in settings.items() if text}
        manifest = _manifest(old)
        if not texts and manifest.to_json() == (path / MANIFEST).read_text(encoding="utf-8"):
            return Upgraded(old, old.manifest.format_version, old.manifest.format_version, ())
        work = begin_work(work_folder(path), KIND)
        try:
            written = _write(old, work / "bundle", manifest, texts)
        except BaseException:
            discard_work(work)
            raise
        publish(work / "bundle", path)
        new = Bundle.open(path)
        return Upgraded(new, old.manifest.format_version, new.manifest.format_version, written)


def _check(bundle: Bundle) -> None:
    work = work_folder(bundle.path)
    restore(bundle.path)
    check_own(work)
    mark = mark_of(work)
    if mark is not None and mark["polymerge"] != KIND:
        raise OutputExistsError(f"{work}: half-done work is in the way; end it with --resume, or delete it")
    if mark is not None:  # an upgrade that was killed is not gone on with
        discard_work(work)
    for name, what in bundle.damaged_files():
        raise BundleError(f"{bundle.path / name}: {what}; copy it again, then upgrade")


def _settings(bundle: Bundle, expert: str) -> dict[str, Any] | None:
    """adapter_config.json as it follows from the expert's tensors; None where it says the same already."""
    stored = read_json(bundle.expert_folder(expert) / "adapter_config.json")
    said = expected_config(bundle, expert)
    return said if any(stored.get(key) != said.get(key) for key in CHECKED_SETTINGS) else None


def _manifest(bundle: Bundle) -> Manifest:
    manifest = bundle.manifest
    version = version_of(
        manifest.method,
        bundle.code,
        manifest.experts.values(),
        manifest.layers,
        manifest.vocabulary,
        manifest.base_code,
    )
    return manifest.model_copy(update={"format_version": version, "polymerge_version": __version__})


def _write(old: Bundle, folder: Path, manifest: Manifest, settings: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    for name in _files(old.path):
        if name not in settings and name != MANIFEST:
            _carry(old.path / name, folder / name)
    files: dict[str, FileEntry] = {**manifest.files}
    for name, said in settings.items():
        files[name] = write_json(folder / name, said)
    new = Bundle(folder, manifest.model_copy(update={"files": files}))
    followed = follow_router(folder, old.digest, new.digest)
    write_manifest(folder, new.manifest.checked().to_json())
    return (*settings, *followed, MANIFEST)


def _files(path: Path) -> Iterator[str]:
    """All files of the folder, strangers' too, but what polymerge had half-written."""
    for parent, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name != CHANGE and not SCRATCH.fullmatch(name)]
        for name in names:
            if not SCRATCH.fullmatch(name):
                yield str(Path(parent, name).relative_to(path))


def _carry(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def follow_router(folder: Path, before: str, after: str) -> list[str]:
    """The bundle answers as it did, so the router that was fitted for it is still its router."""
    record = folder / ROUTER
    if before == after or not record.exists():
        return []
    said = read_json(record)
    if said.get("bundle") != before:
        return []
    write_bytes(record, (json.dumps({**said, "bundle": after}, indent=1, ensure_ascii=False) + "\n").encode())
    return [ROUTER]
