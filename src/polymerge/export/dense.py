"""One expert as a dense checkpoint. Streams: one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ..bundle.bundle import Bundle
from ..bundle.files import DTYPE_NAMES, Entry, raw_bytes
from ..bundle.place import settled
from ..bundle.reading import steady
from ..bundle.write import bundle_config, copy_model_files, write_weights
from ..host import dtype_of
from ..sources.checkpoint import read_json
from .place import placed


def export_dense(
    bundle: Bundle | str | Path, expert: str, output: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> Path:
    """Writes an expert as an ordinary checkpoint that transformers (and llama.cpp's converter) opens.

    Args:
        dtype: "float32", "bfloat16" or "float16"; by default the bundle's.

    Raises:
        BundleError: unknown expert. OutputExistsError, LockedError, DiskSpaceError: before anything is written.
    """
    bundle, output = Bundle.open(bundle), settled(output)
    bundle.expert_folder(expert)
    target = dtype_of(dtype or bundle.manifest.dtype)
    entries = [_entry(bundle, tensor, target) for tensor in bundle.layers]
    needed = sum(entry[3] for entry in entries)
    with placed(output, overwrite=overwrite, needed=needed) as staged, steady(bundle):
        tied = bool(read_json(bundle.path / "config.json").get("tie_word_embeddings"))
        config = bundle_config(
            read_json(bundle.path / "config.json"), dtype=dtype or bundle.manifest.dtype, tied=tied, code=True
        )
        copy_model_files(bundle.path, staged, config, code=True)
        reader = bundle.expert_reader(expert)

        def content(index: int) -> Iterator[bytes]:
            tensor = reader.read(entries[index][0])
            tensor = tensor.to(target) if tensor.is_floating_point() else tensor
            yield bytes(raw_bytes(tensor))

        write_weights(staged, entries, content)
    return output


def _entry(bundle: Bundle, tensor: str, dtype: torch.dtype) -> Entry:
    info = bundle.base.tensors[tensor]
    if info.dtype is None:  # integers and the like keep their own type
        width = bundle.base_tensor(tensor).element_size()
        return tensor, info.stored_as, info.shape, info.numel * width
    return tensor, DTYPE_NAMES[dtype], info.shape, info.numel * dtype.itemsize
