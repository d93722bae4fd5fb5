"""Where an export is written: beside its place. `polymerge.bundle.files.publish` moves it there when whole."""

from __future__ import annotations

from pathlib import Path

from ..bundle.files import check_name, restore
from ..bundle.manifest import MANIFEST
from ..bundle.write import clear
from ..errors import OutputExistsError


def fresh(output: Path, *, overwrite: bool) -> Path:
    """An empty folder beside the output, to be published when whole."""
    check_name(output)
    restore(output)
    if output.exists() and not overwrite:
        raise OutputExistsError(f"{output}: exists; give --overwrite to replace it, or another --output")
    if output.exists() and not (output.is_dir() and _is_export(output)):
        raise OutputExistsError(f"{output}: exists and is not an exported model; it is never overwritten")
    staged = output.with_name(output.name + ".partial")
    clear(staged)
    return staged


def _is_export(folder: Path) -> bool:
    known = ("config.json", "adapter_config.json")
    if (folder / MANIFEST).exists():  # a bundle, perhaps the very one that is exported
        return False
    return not any(folder.iterdir()) or any((folder / name).exists() for name in known)
