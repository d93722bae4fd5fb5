"""A checkpoint that is not here: names, shapes and dtypes of its tensors from its configuration alone.

transformers builds the architecture on the meta device, which holds no weights, and its own rules say how a checkpoint
stores them. Good for sizes; there is nothing to read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import SourceError
from ..host import DTYPES
from ..paths import here
from .checkpoint import Checkpoint, TensorInfo, in_natural_order, read_json
from .hub import download_begins, hub_answers
from .layers import meta_model, stored_names
from .opening import HUB_ID

STORED_AS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class OutlineCheckpoint(Checkpoint):
    """The tensors that `folder/config.json` describes.

    Raises:
        SourceError: transformers does not know the architecture, or the file is missing.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self.label, self.folder = label, folder
        self.config = read_json(folder / "config.json")
        model = meta_model(folder)
        if model is None:
            kind = self.config.get("model_type", "unknown")
            raise SourceError(
                f"{folder}/config.json: transformers does not know model type {kind!r}, so its tensors are not known; "
                "say `config:`, a folder with the config.json of an architecture of the same sizes that it knows"
            )
        dtype = DTYPES.get(str(self.config.get("dtype") or self.config.get("torch_dtype")), torch.float32)
        tensors = {
            name: TensorInfo(shape, dtype, STORED_AS[dtype], folder / "config.json")
            for name, shape in stored_names(model).items()
        }
        self.tensors = in_natural_order(tensors)

    @property
    def bytes(self) -> int:
        """Of all weights, in the dtype of the configuration."""
        return sum(info.numel * (info.dtype or torch.float32).itemsize for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        raise SourceError(f"{self.label}: only its configuration is here; {name!r} cannot be read")

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)


def outline(source: str, config: str | None, *, revision: str | None = None) -> OutlineCheckpoint | None:
    """The outline of a hub id: from `config`, a folder with its config.json, where given, otherwise from the hub, which
    is asked for that one file. None for a source that is no hub id, or whose configuration cannot be had."""
    repo, _, tag = source.partition("@")
    if source.startswith("package:") or here(source) or not HUB_ID.fullmatch(repo):
        return None
    if config is not None:
        return OutlineCheckpoint(Path(config), label=source)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        offline = not hub_answers()
        if not offline:
            download_begins()
        file = hf_hub_download(repo, "config.json", revision=revision or tag or None, local_files_only=offline)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return None
    return OutlineCheckpoint(Path(file).parent, label=source)
