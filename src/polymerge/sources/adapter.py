"""A PEFT LoRA adapter over its base, read as a full checkpoint: W = W_base + scaling * B A, tensor by tensor.

Knows PEFT's LoRA files: rank_pattern, alpha_pattern, rsLoRA, fan_in_fan_out, modules_to_save and embedding factors.
What it does not know (DoRA, other PEFT methods, fused expert parameters) it refuses by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import SourceError
from .checkpoint import Checkpoint, read_json
from .fingerprint import digest_of

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings under which an adapter is more than a low-rank update of its base's linear layers.
UNREAD = (
    "use_dora",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
)
# Initialisations that take the start of the factors out of the base, which is then not the base that a user names.
CHANGES_ITS_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_KEY = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")


@dataclass
class _Factors:
    """The keys of one module's factors in the adapter's file."""

    a: str = ""
    b: str = ""
    embedding: bool = False


class AdapterCheckpoint(Checkpoint):
    """The base with the adapter's update added when a tensor is read (in float32, returned in the base's dtype)."""

    def __init__(self, folder: Path, label: str, base: Checkpoint, settings: dict[str, Any]) -> None:
        self.label, self.folder, self.config = label, base.folder, base.config
        self._base, self._settings = base, settings
        self._factors: dict[str, tuple[Tensor, Tensor, float, bool]] = {}
        self._whole: dict[str, Tensor] = {}
        self._file = folder / ADAPTER_WEIGHTS
        self._load()
        self.tensors = dict(base.tensors)

    @property
    def changed(self) -> list[str]:
        """The tensors that are not the base's."""
        return sorted({*self._factors, *self._whole})

    def read(self, name: str) -> Tensor:
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        whole = self._whole.get(name)
        base = self._base.read_rows(name, start, stop) if whole is None else whole[start:stop]
        base = base.to(self.tensors[name].dtype)
        if name not in self._factors:
            return base
        a, b, scaling, transposed = self._factors[name]
        rows = (a.T[start:stop] @ b.T) if transposed else (b[start:stop] @ a)
        return (base.float() + scaling * rows).to(base.dtype)

    def fingerprint(self) -> list[str]:
        files = (self._file, self._file.with_name(ADAPTER_CONFIG))
        return [*self._base.fingerprint(), *(digest_of(file) for file in files)]

    def _load(self) -> None:
        loaded = _load_adapter_file(self._file)
        pairs: dict[str, _Factors] = {}
        for key in loaded:
            # PEFT puts the layer that it wraps, with a bias or table that was trained too, under `base_layer`
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            match = _KEY.fullmatch(name)
            if match:
                pair = pairs.setdefault(match["module"], _Factors())
                pair.embedding = "lora_embedding_" in name
                setattr(pair, match["side"].lower(), key)
            elif "lora_" in name:
                raise SourceError(f"{self._file}: {key!r} is a kind of LoRA tensor that a merge does not read")
            else:
                target = self._base_name(name, key)
                self._same_shape(target, tuple(loaded[key].shape), key)
                self._whole[target] = loaded[key]
        for module, pair in pairs.items():
            self._add_factors(module, pair, loaded)

    def _add_factors(self, module: str, pair: _Factors, loaded: dict[str, Tensor]) -> None:
        if not pair.a or not pair.b:
            raise SourceError(f"{self._file}: {module!r} has one LoRA factor of two")
        target = self._base_name(f"{module}.weight", pair.a)
        a, b = loaded[pair.a].float(), loaded[pair.b].float()
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise SourceError(
                f"{self._file}: the factors of {module!r} are {list(a.shape)} and {list(b.shape)}, "
                "expected [r, in] and [out, r]"
            )
        rank = a.shape[0]
        # PEFT keeps an embedding's factors the other way round: rows of the table are columns of A.
        transposed = pair.embedding or bool(self._settings.get("fan_in_fan_out"))
        shape = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        self._same_shape(target, shape, pair.b)
        self._factors[target] = (a, b, self._scaling(module, rank), transposed)

    def _scaling(self, module: str, rank: int) -> float:
        alpha = _by_pattern(self._settings.get("alpha_pattern"), module, self._settings.get("lora_alpha", 8))
        return float(alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank))

    def _base_name(self, name: str, key: str) -> str:
        """The base checkpoint's name of a model's parameter: the same, or with the model's prefix more or less."""
        if name in self._base.tensors:
            return name
        near = [known for known in self._base.tensors if known.endswith(f".{name}") or name.endswith(f".{known}")]
        if len(near) != 1:
            raise SourceError(
                f"{self._file}: {key!r} fits no tensor of the base {self._base.label}; is it the adapter's base?"
            )
        return near[0]

    def _same_shape(self, target: str, shape: tuple[int, ...], key: str) -> None:
        expected = self._base.tensors[target].shape
        if shape != expected:
            raise SourceError(
                f"{self._file}: {key!r} makes {list(shape)}, but {target!r} of {self._base.label} is {list(expected)}"
            )


def check_adapter(folder: Path, label: str) -> dict[str, Any]:
    """The adapter's settings. Raises SourceError where it is more than a low-rank update of its base."""
    settings = read_json(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA":
        raise SourceError(f"{label}: a {settings.get('peft_type')} adapter; only LORA can be merged")
    used = [flag for flag in UNREAD if settings.get(flag)]
    init = str(settings.get("init_lora_weights")).lower()
    used += [f"init_lora_weights={init}"] if init.startswith(CHANGES_ITS_BASE) else []
    if used:
        raise SourceError(
            f"{label}: the adapter uses {used[0]}, which a merge does not read; merge it into its base first"
        )
    _check_scaling(settings, folder / ADAPTER_CONFIG)
    return settings


def open_adapter(folder: Path, label: str, base: Checkpoint) -> AdapterCheckpoint:
    """A LoRA adapter's folder as a checkpoint, over its base."""
    return AdapterCheckpoint(folder, label, base, check_adapter(folder, label))


def _check_scaling(settings: Mapping[str, Any], file: Path) -> None:
    pattern = settings.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise SourceError(f"{file}: alpha_pattern must map names to numbers")
    for name, alpha in {"lora_alpha": settings.get("lora_alpha", 8), **pattern}.items():
        try:
            re.compile(name)
        except re.error as error:
            raise SourceError(f"{file}: alpha_pattern: {name!r} is not a pattern ({error})") from None
        if not isinstance(alpha, int | float):
            raise SourceError(f"{file}: the alpha of {name!r} must be a number, found {alpha!r}")


def _by_pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: `re.match` of `(.*\\.)?(key)$`, the first hit wins."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _load_adapter_file(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded: dict[str, Tensor] = load_file(file)
        return loaded
    except FileNotFoundError:
        raise SourceError(f"{file}: missing; only adapters in safetensors are read") from None
    except SafetensorError as error:
        raise SourceError(
            f"{file}: not a whole safetensors file (truncated or corrupt: {error}); copy it again"
        ) from None
