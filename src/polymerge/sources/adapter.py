"""A PEFT LoRA adapter over its base, read as a full checkpoint: every tensor as PEFT computes with it.

Knows how a change is made while a tensor is read, and what the adapter's model is called and how large it is. Which
changes an adapter makes is in `adapter_changes.py`, their arithmetic in `lora.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import SourceError
from .adapter_base import AdapterBase
from .adapter_changes import ChangesReader
from .adapter_config import ADAPTER_CONFIG, check_adapter
from .adapter_ends import part_the_ends
from .adapter_folder import adapter_folder
from .checkpoint import Checkpoint, OverBase, TensorInfo, natural_key, read_rows, tensors_of_file
from .fingerprint import digest_of
from .lora import LowRank

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class AdapterCheckpoint(Checkpoint):
    """The base with the adapter's changes made when a tensor is read (in float32, returned in the base's dtype)."""

    def __init__(self, folder: Path, label: str, base: Checkpoint, settings: dict[str, Any]) -> None:
        self.label = label
        self._base, self._settings = AdapterBase(base), settings
        self._file = folder / ADAPTER_WEIGHTS
        self._stored = _stored(self._file)
        self._changes = ChangesReader(self._base, settings, self._file, self._stored).read()
        apart = part_the_ends(self._base, self._changes, self._file)
        self.tensors = self._infos(apart)
        self._check_vocabulary()
        self.config = self._config(apart)
        self.folder = adapter_folder(folder, base.folder, self.config, changed=self.config != base.config)

    @property
    def changed(self) -> list[str]:
        """The tensors that are not the base's."""
        return sorted({*self._changes.changed, *self._changes.whole})

    def read(self, name: str) -> Tensor:
        shape = self.tensors[name].shape
        return self.read_rows(name, 0, shape[0]) if shape else self._base.checkpoint.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        info = self.tensors[name]
        change = self._changes.changed.get(name)
        if change is None:
            return self._before(name, start, stop).to(info.dtype)
        rows = change.rows(lambda a, b: self._before(name, a, b).float(), start, stop, info.shape[0])
        return rows.to(info.dtype)

    def over_base(self, name: str) -> OverBase | None:
        change, base = self._changes.changed.get(name), self._base.checkpoint
        if name in self._changes.whole or name not in base.tensors:
            return None
        if change is None:
            return OverBase(base)
        if not isinstance(change, LowRank) or change.magnitude is not None:
            return None

        def factors() -> tuple[Tensor, Tensor]:
            return change.factors(lambda start, stop: base.read_rows(name, start, stop).float())

        return OverBase(base, change.rank, change.dtype, factors)

    def fingerprint(self) -> list[str]:
        files = (self._file, self._file.with_name(ADAPTER_CONFIG))
        return [*self._base.checkpoint.fingerprint(), *(digest_of(file) for file in files)]

    def _before(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the tensor that a change starts from: the adapter's own, or the base's."""
        key = self._changes.whole.get(name)
        return read_rows(self._file, key, start, stop) if key else self._base.rows(name, start, stop)

    def _infos(self, apart: bool) -> dict[str, TensorInfo]:
        names = [*self._base.checkpoint.tensors, *([str(self._base.head)] if apart else [])]
        infos = {}
        for name in sorted(set(names), key=natural_key):
            key, info = self._changes.whole.get(name), self._base.info(name)
            infos[name] = replace(info, shape=self._stored[key].shape) if key else info
        return infos

    def _check_vocabulary(self) -> None:
        """Tables of another size must come together."""
        table, head = self._base.embedding, self._base.head
        ends = (table, head, f"{(head or '').removesuffix('.weight')}.bias")
        sizes = {end: self.tensors[end].shape[0] for end in ends if end is not None and end in self.tensors}
        if len(set(sizes.values())) > 1 and any(end in self._changes.whole for end in sizes):
            shown = ", ".join(f"{end!r} {size}" for end, size in sizes.items())
            raise SourceError(
                f"{self._file}: the adapter has another vocabulary than its base, but not for all of its tables "
                f"({shown}); save it with save_embedding_layers=True"
            )

    def _config(self, apart: bool) -> dict[str, Any]:
        """The base's, with the ends parted and the size of the vocabulary that the adapter's own tables have."""
        changes: dict[str, Any] = {"tie_word_embeddings": False} if apart else {}
        table = self._base.embedding
        if (
            table is not None
            and table in self._changes.whole
            and self.tensors[table].shape != self._base.info(table).shape
        ):
            changes["vocab_size"] = self.tensors[table].shape[0]
        config = dict(self._base.checkpoint.config)
        text = config.get("text_config")
        if changes and isinstance(text, dict):
            config["text_config"] = {**text, **changes}
            changes = {key: value for key, value in changes.items() if key in config or key == "tie_word_embeddings"}
        return {**config, **changes}


def _stored(file: Path) -> dict[str, TensorInfo]:
    if not file.is_file():
        raise SourceError(f"{file}: missing; only adapters in safetensors are read")
    return tensors_of_file(file)


def open_adapter(folder: Path, label: str, base: Checkpoint) -> AdapterCheckpoint:
    """A LoRA adapter's folder as a checkpoint, over its base."""
    return AdapterCheckpoint(folder, label, base, check_adapter(folder, label))
