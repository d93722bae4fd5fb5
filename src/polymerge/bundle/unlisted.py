"""Files in a bundle's folder that its manifest does not list, and links that lead out of it.

Knows which names readers of checkpoints look for, and which belong to polymerge or to nobody's harm. Reads no content.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import BundleError
from ..sources.checkpoint import SAFETENSORS_INDEX
from .manifest import MANIFEST, STATS, Manifest

# With any of these, transformers would load other weights than the manifest's, or put an adapter upon them.
SHADOWS = ("model.safetensors", SAFETENSORS_INDEX, "adapter_config.json")
# Polymerge's own beside the manifest's, and what belongs to a repository. Names that begin with a dot, no reader loads.
KNOWN = re.compile(
    rf"{re.escape(MANIFEST)}|{re.escape(STATS)}|staged\.json|README\.md|(LICENSE|NOTICE)[^/]*"
    r"|router/(router|fit|assessment|evaluation)\.json|router/(weights|samples|held)-[0-9a-f]{16}\.(safetensors|jsonl)"
)


def check_shadows(folder: Path, manifest: Manifest) -> None:
    """Raises BundleError where a file that the manifest does not list would be loaded in the place of one it lists."""
    for name in SHADOWS:
        if name not in manifest.files and os.path.lexists(folder / name):
            raise BundleError(
                f"{folder / name}: is not in the manifest, but would be loaded as if it were; delete it, or copy the "
                "bundle again"
            )


def unlisted_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Names of files, in their order, that neither the manifest lists nor polymerge or a repository put there."""
    for parent, folders, files in os.walk(folder):
        linked = [name for name in folders if Path(parent, name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in linked)
        for file in sorted([*files, *linked]):
            name = Path(parent, file).relative_to(folder).as_posix()
            if name not in manifest.files and not KNOWN.fullmatch(name) and not file.startswith("."):
                yield name


def leads_outside(file: Path, folder: Path) -> bool:
    """Whether a file of a bundle is another's by a link.

    Snapshots in the hub's cache are folders of links to `blobs` beside them: those are the bundle's own. A folder that
    is a link leads outside wherever its files lie.
    """
    root, real = folder.resolve(), file.resolve()
    if real.is_relative_to(root):
        return False
    snapshots = next((place for place in (root, *root.parents) if place.name == "snapshots"), None)
    is_blob = snapshots is not None and real.parent == snapshots.parent / "blobs"
    return not (is_blob and file.parent.resolve().is_relative_to(root))
