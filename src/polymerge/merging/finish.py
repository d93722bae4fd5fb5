"""Ends a bundle's files when all their tensors are there: headers, what PEFT wants beside an expert's tensors, its
configuration and its ratios.

For a merge's experts and for one that is added alike. Knows files and names; how tensors come to them is
`polymerge.merging.journal`'s, what PEFT wants `polymerge.bundle.peft`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from ..bundle.files import Entry, FileEntry, Rows, chunks_of, entry_of, slabs, write_json
from ..bundle.growing import GrowingFile, Piece
from ..bundle.kept import ROW_NUMBERS
from ..bundle.layer import BundleLayer, stored_layers, stored_shape
from ..bundle.manifest import SCALES_FILE
from ..bundle.peft import (
    PEFT_PREFIX,
    adapter_config,
    borrowed_config,
    coded_config,
    missing_siblings,
    missing_zeros,
    stored_name,
)
from ..bundle.write import write_index, write_scales
from ..errors import PolymergeError
from ..method.code import Code
from ..sources.checkpoint import Checkpoint
from .journal import Staging


def finish_base(staging: Staging, files: Sequence[str], layers: Sequence[BundleLayer]) -> dict[str, FileEntry]:
    """The average's shards and their index; matrices that lie in one tensor become it."""
    stored = stored_layers(layers)
    entries = {file: _joined(staging.files[file].pieces, stored) for file in files}
    written = {file: staging.files[file].finish(entries[file]) for file in files}
    return written | write_index(staging.bundle, entries)


def _joined(pieces: Sequence[Piece], stored: Mapping[str, Sequence[BundleLayer]]) -> list[Entry]:
    """What a shard's header says of its pieces.

    Raises:
        PolymergeError: the matrices of a tensor do not lie side by side.
    """
    places = {layer.tensor: name for name, layers in stored.items() for layer in layers}
    entries = []
    for name, group in groupby(pieces, lambda piece: places[piece.key]):
        parts = list(group)
        if [piece.key for piece in parts] != [layer.tensor for layer in stored[name]]:
            raise PolymergeError(f"the matrices of {name!r} do not lie side by side; merge again, without --resume")
        entries.append(Entry(name, parts[0].dtype, stored_shape(stored[name]), sum(piece.bytes for piece in parts)))
    return entries


def finish_expert(
    staging: Staging,
    expert: str,
    base: Checkpoint,
    layers: Sequence[BundleLayer],
    scales: Mapping[str, float],
    *,
    code: Code,
    tied_embedding: str | None,
    rows: Sequence[int] = (),
) -> dict[str, FileEntry]:
    """One expert as a PEFT adapter, with its ratios beside it. Returns paths relative to the bundle.

    With a code that PEFT does not know, or factors that lie in another expert's file, it is a folder that PEFT, and
    whatever reads its adapters, refuses.

    Args:
        base: the average; what of it PEFT wants to have in the adapter is copied.
        rows: the expert's own of the bundle's tables.
    """
    home = f"experts/{expert}"
    file = staging.file_of(expert)
    for layer in missing_siblings((piece.key for piece in file.pieces), layers):
        _append_copy(file, layer, base)
    borrows = any(expert in layer.borrowed for layer in layers)
    if code.peft_readable and not borrows:
        for zeros in missing_zeros({piece.key: piece.shape for piece in file.pieces}, layers):
            file.append(zeros, [bytes(zeros.bytes)])
        shapes = [(piece.key, piece.shape) for piece in file.pieces if not piece.key.endswith(ROW_NUMBERS)]
        kept = {
            piece.key.removesuffix(f".weight{ROW_NUMBERS}"): file.read_numbers(piece)
            for piece in file.pieces
            if piece.key.endswith(ROW_NUMBERS)
        }
        config = adapter_config(
            shapes,
            layers,
            tied_embedding=tied_embedding,
            rows=rows,
            kept=kept,
            model_type=base.config.get("model_type"),
        )
        by_rows = set(config["trainable_token_indices"] or ())
        entry = file.finish(_named(file.pieces, lambda key: stored_name(key, by_rows)))
    else:
        config = borrowed_config() if code.peft_readable else coded_config(code)
        entry = file.finish(_named(file.pieces, lambda key: PEFT_PREFIX + key))
    folder = staging.bundle / home
    written = {
        f"{home}/adapter_config.json": write_json(folder / "adapter_config.json", config),
        f"{home}/{code.file_name}": entry,
    }
    if scales:
        written[f"{home}/{SCALES_FILE}"] = write_scales(folder / SCALES_FILE, scales)
    return written


def _named(pieces: Sequence[Piece], name: Callable[[str], str]) -> list[Entry]:
    return [piece.entry._replace(key=name(piece.key)) for piece in pieces]


def _append_copy(file: GrowingFile, layer: BundleLayer, base: Checkpoint) -> None:
    name, shape = layer.tensor, layer.shape
    first = base.read_rows(name, 0, 1) if shape else base.read(name)
    parts = (base.read_rows(name, start, stop) for start, stop in slabs(shape)) if shape else (first,)
    rows = Rows(first.dtype, shape, parts)
    file.append(entry_of(f"{layer.module}.{layer.parameter}", rows), chunks_of(rows))
