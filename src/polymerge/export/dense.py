"""One expert as a dense checkpoint. Streams: one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..bundle.bundle import Bundle, ExpertReader
from ..bundle.files import DTYPE_NAMES, Entry, raw_bytes
from ..bundle.personas import write_model_files
from ..bundle.place import settled
from ..bundle.reading import steady
from ..bundle.write import bundle_config, copy_model_files, write_weights
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
    entries = [_entry(bundle, reader, tensor, target or reader.dtype(tensor)) for tensor in bundle.layers]
    needed = sum(entry[3] for entry in entries)
    with placed(output, overwrite=overwrite, needed=needed) as staged, steady(bundle):
        persona = bundle.persona(expert)
        tied = bool(bundle.persona().config.get("tie_word_embeddings"))
        chosen, rows = dtype or bundle.manifest.dtype, bundle.vocabulary(expert)
        config = bundle_config(persona.config, dtype=chosen, tied=tied, code=True, vocabulary=rows)
        if bundle.manifest.experts[expert].persona:
            write_model_files(bundle.path, staged, persona, config)
        else:
            copy_model_files(bundle.path, staged, config, code=True)

        def content(index: int) -> Iterator[bytes]:
            name = entries[index][0]
            tensor = reader.read(name)
            if tensor.is_floating_point():
                tensor = tensor.to(target or reader.dtype(name))
            yield bytes(raw_bytes(tensor))

        write_weights(staged, entries, content)
    return output


def _entry(bundle: Bundle, reader: ExpertReader, tensor: str, dtype: torch.dtype | None) -> Entry:
    info = replace(bundle.base.tensors[tensor], shape=reader.shape(tensor))
    if info.dtype is None or dtype is None:  # integers and the like keep their own type
        width = bundle.base_tensor(tensor).element_size()
        return tensor, info.stored_as, info.shape, info.numel * width
    return tensor, DTYPE_NAMES[dtype], info.shape, info.numel * dtype.itemsize
