"""One expert as a dense checkpoint. Streams: one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ..bundle import write as assemble
from ..bundle.bundle import Bundle
from ..sources.checkpoint import read_json
from ..errors import ModelError
from ..merging.plan import DTYPES
from ..merging.journal import DTYPE_NAMES, Entry, check_free_space, raw_bytes
from .place import fresh, publish


def export_dense(
    bundle: Bundle | str | Path, expert: str, output: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> Path:
    """Writes an expert as an ordinary checkpoint that transformers (and llama.cpp's converter) opens.

    Args:
        dtype: "float32", "bfloat16" or "float16"; by default the bundle's.

    Raises:
        BundleError: unknown expert. OutputExistsError, DiskSpaceError: before anything is written.
    """
    bundle, output = Bundle.open(bundle), Path(output).expanduser()
    bundle.expert_folder(expert)
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    target = DTYPES[dtype or bundle.manifest.dtype]
    entries = [_entry(bundle, tensor, target) for tensor in bundle.layers]
    check_free_space(output.parent, sum(entry[3] for entry in entries))
    staged = fresh(output, overwrite=overwrite)
    tied = bool(read_json(bundle.path / "config.json").get("tie_word_embeddings"))
    config = assemble.bundle_config(
        read_json(bundle.path / "config.json"), dtype=dtype or bundle.manifest.dtype, tied=tied, code=True
    )
    assemble.copy_model_files(bundle.path, staged, config, code=True)
    reader = bundle.expert_reader(expert)

    def content(index: int) -> Iterator[bytes]:
        tensor = reader.read(entries[index][0])
        tensor = tensor.to(target) if tensor.is_floating_point() else tensor
        yield bytes(raw_bytes(tensor))

    assemble.write_weights(staged, entries, content)
    return publish(staged, output)


def _entry(bundle: Bundle, tensor: str, dtype: torch.dtype) -> Entry:
    info = bundle.base.tensors[tensor]
    if info.dtype is None:  # integers and the like keep their own type
        width = bundle.base_tensor(tensor).element_size()
        return tensor, info.stored_as, info.shape, info.numel * width
    return tensor, DTYPE_NAMES[dtype], info.shape, info.numel * dtype.itemsize
