"""Where an export is written: beside its place, and moved there when whole."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..bundle.manifest import MANIFEST
from ..bundle.write import clear
from ..errors import OutputExistsError


def fresh(output: Path, *, overwrite: bool) -> Path:
    """An empty folder beside the output, to be renamed to it when whole."""
    if output.exists() and not overwrite:
        raise OutputExistsError(f"{output}: exists; give --overwrite to replace it, or another --output")
    if output.exists() and not (output.is_dir() and _is_export(output)):
        raise OutputExistsError(f"{output}: exists and is not an exported model; it is never overwritten")
    staged = output.with_name(output.name + ".partial")
    clear(staged)
    return staged


def publish(staged: Path, output: Path) -> Path:
    """Moves what is whole to its place."""
    if output.exists():
        shutil.rmtree(output)
    staged.rename(output)
    return output


def _is_export(folder: Path) -> bool:
    known = ("config.json", "adapter_config.json")
    if (folder / MANIFEST).exists():  # a bundle, perhaps the very one that is exported
        return False
    return not any(folder.iterdir()) or any((folder / name).exists() for name in known)
