"""The tensors of one file of an expert, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BundleError
from .peft import adapter_name


class StoredTensors:
    """The tensors of an expert's file, under the model's names."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with opened(file) as handle:
            self.keys = {adapter_name(key): key for key in handle.keys()}  # noqa: SIM118

    def get(self, key: str) -> Tensor | None:
        return self.those([key]).get(key)

    def those(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Those of the keys that are stored."""
        stored = {key: self.keys[key] for key in keys if key in self.keys}
        if not stored:
            return {}
        with opened(self.file) as handle:  # clone: the mapped pages go with the handle
            return {key: handle.get_tensor(name).clone() for key, name in stored.items()}


def opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file}: not a whole safetensors file ({error}); copy the bundle again") from None
