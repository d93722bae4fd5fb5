"""The weights of a bundle's average as an ordinary checkpoint's: what adapters of an export are added to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..bundle.files import Rows, entry_of, raw_bytes
from ..bundle.layer import stored_layers, stored_shape
from ..bundle.write import write_weights
from ..sources.checkpoint import read_json


def is_stored(bundle: Bundle) -> bool:
    """Whether the bundle's own files are the average's weights, and not those of the model under adapters."""
    return all(layer.base == "average" for layer in bundle.manifest.layers)


def average_config(bundle: Bundle) -> dict[str, Any]:
    """config.json beside what `write_average` writes."""
    config = read_json(bundle.path / "config.json")
    return config if is_stored(bundle) else {k: v for k, v in config.items() if k != "quantization_config"}


def write_average(bundle: Bundle, folder: Path, *, plain: bool = False) -> None:
    """The weights of the average: the bundle's own files, or made where these are not.

    Args:
        plain: in the bundle's dtype, where its files hold them in fewer bits.
    """
    if is_stored(bundle) and not (plain and bundle.manifest.base_code):
        for file in (name for name in bundle.manifest.files if "/" not in name and ".safetensors" in name):
            shutil.copyfile(bundle.path / file, folder / file)
        return
    stored = stored_layers(bundle.manifest.layers)
    infos = {name: bundle.base.tensors[layers[0].tensor] for name, layers in stored.items()}
    entries = [
        entry_of(name, Rows(info.dtype or bundle.base_tensor(name).dtype, stored_shape(stored[name]), ()))
        for name, info in infos.items()
    ]

    def content(index: int) -> Iterator[bytes]:
        for layer in stored[entries[index].key]:
            tensor = bundle.average_tensor(layer.tensor)
            yield bytes(raw_bytes(tensor.to(bundle.base.tensors[layer.tensor].dtype or tensor.dtype)))

    write_weights(folder, entries, content)
