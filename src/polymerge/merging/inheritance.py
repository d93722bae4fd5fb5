"""What an expert leaves when it is taken out of a bundle: factors and tables that are another's too.

They are copied to a file of the heir's own beside its others, which are not touched; the manifest says when it counts.
Knows the manifest's lines and an expert's files; nothing of the arithmetic.
"""

from __future__ import annotations

from safetensors import safe_open

from ..bundle.bundle import Bundle
from ..bundle.files import FileEntry, check_free_space, entry_of, raw_bytes, write_safetensors
from ..bundle.kept import ROW_NUMBERS
from ..bundle.layer import BundleLayer
from ..bundle.manifest import INHERITED_FILE
from ..bundle.peft import PEFT_PREFIX, adapter_name


def hand_over(bundle: Bundle, expert: str) -> dict[str, FileEntry]:
    """Writes the factors of an expert that others have too to files of theirs. Returns their paths and entries.

    Raises:
        DiskSpaceError: before anything is written.
    """
    heirs: dict[str, list[str]] = {}
    for layer in bundle.manifest.layers:
        for heir, lent in layer.borrowed.items():
            if lent.of == expert:
                heirs.setdefault(heir, []).extend(_keys(bundle, layer, heir))
    return {f"experts/{heir}/{INHERITED_FILE}": _copy(bundle, expert, heir, keys) for heir, keys in heirs.items()}


def discard_unlisted(bundle: Bundle) -> None:
    """Deletes what a killed change had copied for an heir."""
    for heir in bundle.experts:
        if f"experts/{heir}/{INHERITED_FILE}" not in bundle.manifest.files:
            (bundle.expert_folder(heir) / INHERITED_FILE).unlink(missing_ok=True)


def _keys(bundle: Bundle, layer: BundleLayer, heir: str) -> list[str]:
    """Of what is stored for an heir in the other's file, without PEFT's prefix."""
    if not layer.lends_whole(heir):
        return [f"{layer.module}.{suffix}" for suffix in bundle.code_of(heir, layer).suffixes]
    key = f"{layer.module}.{layer.parameter}"
    return [key, key + ROW_NUMBERS] if heir in layer.rows else [key]


def _copy(bundle: Bundle, expert: str, heir: str, keys: list[str]) -> FileEntry:
    with safe_open(bundle.expert_file(expert), framework="pt") as handle:
        stored = {adapter_name(key): key for key in handle.keys()}  # noqa: SIM118
        slices = {key: handle.get_slice(stored[key]) for key in keys}
        entries = [entry_of(PEFT_PREFIX + key, part[:]) for key, part in slices.items()]
        folder = bundle.expert_folder(heir)
        check_free_space(folder, sum(entry.bytes for entry in entries))
        return write_safetensors(folder / INHERITED_FILE, entries, (raw_bytes(part[:]) for part in slices.values()))
