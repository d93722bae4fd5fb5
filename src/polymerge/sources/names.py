"""One name for one tensor: checkpoints of an architecture under its own names, whichever class saved them.

A checkpoint of the bare backbone leaves the model's prefix out, and old ones hold buffers (tables of frequencies,
causal masks) that a model computes for itself. Both are no difference between two experts. Knows the names of the
architecture from `polymerge.sources.layers`; what it doesn't recognise keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..errors import SourceError
from .checkpoint import Checkpoint, TensorInfo, in_natural_order
from .classes import class_for
from .layers import meta_model, stored_names

_FREQUENCIES = re.compile(r"(^|\.)(rotary_emb|rotary)\.inv_freq$")
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention|crossattention)\.(bias|masked_bias)$")
_POSITIONS = re.compile(r"(^|\.)position_ids$")


class RenamedCheckpoint(Checkpoint):
    """Another checkpoint under other names; tensors without a name there are left out."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        self.label, self.folder, self.config = checkpoint.label, checkpoint.folder, checkpoint.config
        self.origin, self.in_folder = checkpoint.origin, checkpoint.in_folder
        self._checkpoint, self._names = checkpoint, names
        self.tensors = {name: checkpoint.tensors[stored] for name, stored in names.items()}

    def read(self, name: str) -> Tensor:
        return self._checkpoint.read(self._names[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._checkpoint.read_rows(self._names[name], start, stop)

    def fingerprint(self) -> list[str]:
        return self._checkpoint.fingerprint()


def by_architecture(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the names of its architecture, without buffers that a model computes for itself.

    Raises:
        SourceError: two tensors have one name there.
    """
    if _begins_with_prefix(checkpoint) and not any(_is_buffer(n, i) for n, i in checkpoint.tensors.items()):
        return checkpoint
    model = meta_model(checkpoint.folder)
    if model is None:
        return checkpoint
    known = {*model.state_dict(), *stored_names(model)}
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    names: dict[str, str] = {}
    for stored, info in checkpoint.tensors.items():
        name = next((n for n in (stored, prefix + stored, stored.removeprefix(prefix)) if n in known), None)
        if name is None and _is_buffer(stored, info):
            continue
        other = names.setdefault(name or stored, stored)
        if other != stored:
            raise SourceError(f"{checkpoint.label}: tensors {other!r} and {stored!r} are one and the same {name!r}")
    names = in_natural_order(names)
    unchanged = len(names) == len(checkpoint.tensors) and all(name == stored for name, stored in names.items())
    return checkpoint if unchanged else RenamedCheckpoint(checkpoint, names)


def _begins_with_prefix(checkpoint: Checkpoint) -> bool:
    """Whether a name begins as the architecture's do, told from its class alone: a model takes a moment to build."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        prefix = class_for(config).base_model_prefix
    except Exception:  # an architecture that transformers does not know keeps its names
        return True
    names = checkpoint.tensors
    begun = any(name.startswith(f"{prefix}.") for name in names)
    return not prefix or (begun and not any(f"{prefix}.{name}" in names for name in names))


def _is_buffer(name: str, info: TensorInfo) -> bool:
    if _MASK.search(name):  # a true bias has one dimension
        return len(info.shape) != 1
    return bool(_FREQUENCIES.search(name) or _POSITIONS.search(name))
