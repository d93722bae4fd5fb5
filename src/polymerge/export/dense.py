"""One expert as a dense checkpoint. Streams: one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..bundle.bundle import Bundle
from ..bundle.expert import ExpertReader
from ..bundle.files import DTYPE_NAMES, Entry, raw_bytes
from ..bundle.layer import BundleLayer, stored_layers
from ..bundle.personas import write_model_files
from ..bundle.place import settled
from ..bundle.reading import steady
from ..bundle.write import bundle_config, copy_model_files, ties, write_weights
from ..host import dtype_of
from .place import placed


def export_dense(
    bundle: Bundle | str | Path, expert: str, output: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> Path:
    """Writes an expert as an ordinary checkpoint that transformers (and llama.cpp's converter) opens, with its own
    vocabulary, tokenizer, chat template, generation settings and configuration.

    Args:
        dtype: "float32", "bfloat16" or "float16"; by default every tensor's own.

    Raises:
        BundleError: unknown expert. OutputExistsError, LockedError, DiskSpaceError: before anything is written.
    """
    bundle, output = Bundle.open(bundle), settled(output)
    bundle.expert_folder(expert)
    reader, target = bundle.expert_reader(expert), dtype_of(dtype) if dtype else None
    stored = stored_layers(bundle.manifest.layers)
    entries = [
        _entry(reader, bundle, name, layers, target or _dtype(reader, layers)) for name, layers in stored.items()
    ]
    needed = sum(entry.bytes for entry in entries)
    with placed(output, bundle, overwrite=overwrite, needed=needed) as staged, steady(bundle):
        persona = bundle.persona(expert)
        tied = ties(bundle.persona().config)
        chosen, rows = dtype or bundle.manifest.dtype, bundle.vocabulary(expert)
        config = bundle_config(persona.config, dtype=chosen, tied=tied, code=True, vocabulary=rows)
        if bundle.manifest.experts[expert].persona:
            write_model_files(bundle.path, staged, persona, config)
        else:
            copy_model_files(bundle.path, staged, config, code=True)

        def content(index: int) -> Iterator[bytes]:
            layers = stored[entries[index].key]
            for layer in layers:
                tensor = reader.read(layer.tensor)
                if tensor.is_floating_point():
                    tensor = tensor.to(target or _dtype(reader, layers))
                yield bytes(raw_bytes(tensor))

        write_weights(staged, entries, content)
    return output


def _dtype(reader: ExpertReader, layers: Sequence[BundleLayer]) -> torch.dtype | None:
    """Of a stored tensor: all matrices in it have one."""
    return reader.dtype(layers[0].tensor)


def _entry(
    reader: ExpertReader, bundle: Bundle, name: str, layers: Sequence[BundleLayer], dtype: torch.dtype | None
) -> Entry:
    first = layers[0]
    info, shape = bundle.base.tensors[first.tensor], first.slice.shape if first.slice else reader.shape(name)
    if info.dtype is None or dtype is None:  # integers and the like keep their own type
        return Entry(name, info.stored_as, shape, info.numel * bundle.base_tensor(first.tensor).element_size())
    return Entry(name, DTYPE_NAMES[dtype], shape, math.prod(shape) * dtype.itemsize)
