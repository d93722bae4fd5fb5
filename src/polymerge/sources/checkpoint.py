"""Lazy tensors of a checkpoint: a Hugging Face folder, a hub id, a GGUF file, or a PEFT adapter over its base.

Knows how to find, check and read tensors one at a time (or a few rows of one), and never holds a model. Does not
know which tensors are linear weights (`polymerge.sources.layers`) nor what is done with them
(`polymerge.merging.compress`).

Nothing here runs code from a checkpoint: safetensors are read by the safetensors library, `.bin` files by
`torch.load(weights_only=True)`, and a file named in an index must lie in the checkpoint's own folder.
"""

from __future__ import annotations

import json
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import SourceError
from ..host import dtype_name
from ..naming import is_plain
from .fingerprint import digest_of

T = TypeVar("T")

log = logging.getLogger(__name__)

SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
# Where several are there, transformers loads the first of these.
WEIGHT_FILES = ("model.safetensors", SAFETENSORS_INDEX, "pytorch_model.bin", BIN_INDEX)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's place and form. `dtype` is None for a type that a merge cannot use (integers, float8)."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    stored_as: str
    file: Path

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint came from: all that it takes to open it again.

    Attributes:
        revision: of a hub id; the commit, where the hub's cache tells it.
        base, base_revision: of the model under an adapter.
    """

    source: str
    revision: str | None = None
    base: str | None = None
    base_revision: str | None = None


@dataclass(frozen=True)
class OverBase:
    """A matrix as its base's of the same name plus a product B A, to the last bit of the adapter.

    Attributes:
        base: the model under an adapter; what is no adapter is its own base.
        rank: of the product; 0 where the matrix is the base's.
        dtype: what the adapter stores its factors in.
        factors: makes B [out, r], with the adapter's scaling in it, and A [r, in], both in `dtype`.
    """

    base: Checkpoint
    rank: int = 0
    dtype: torch.dtype = torch.float32
    factors: Callable[[], tuple[Tensor, Tensor]] | None = None


class Checkpoint(ABC):
    """Tensors by name, read when asked for.

    What `read` and `read_rows` return is memory of the caller's own: it may be overwritten, and reading again gives
    the same bytes.

    Attributes:
        label: the source as the user wrote it, for messages.
        folder: where configuration and tokenizer lie.
        config: the parsed config.json.
        tensors: checkpoint name -> TensorInfo, in the checkpoint's natural order.
        origin: set by `polymerge.sources.opening`.
        in_folder: transformers reads the same tensors from the folder.
    """

    origin: Origin | None = None
    in_folder = False
    label: str
    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def whence(self) -> Origin:
        """Where it came from, as far as it is known."""
        return self.origin or Origin(self.label)

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The whole tensor, in its stored dtype, on the CPU."""

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the first dimension, in the stored dtype, on the CPU."""

    def over_base(self, name: str) -> OverBase | None:
        """A matrix as a sum over its base; None where there is no such sum of few numbers (DoRA, a whole module)."""
        return OverBase(self)

    def fingerprint(self) -> list[str]:
        """A digest of every weight file (`polymerge.sources.fingerprint`): tells that the weights are the same."""
        return sorted(digest_of(file) for file in {info.file for info in self.tensors.values()})


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face folder with one safetensors file or several; `weights` is the file, or the index of many."""

    in_folder = True

    def __init__(self, folder: Path, label: str, weights: Path | None = None) -> None:
        self.label, self.folder = label, folder
        self.config = read_json(folder / "config.json")
        weights = weights or _weights_of(folder, label, self.config)
        tensors = _tensors_of_index(weights) if weights.suffix == ".json" else tensors_of_file(weights)
        self.tensors = in_natural_order(tensors)

    def read(self, name: str) -> Tensor:
        return read_tensor(self.tensors[name].file, name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return read_rows(self.tensors[name].file, name, start, stop)


class BinCheckpoint(Checkpoint):
    """A Hugging Face folder with `.bin` files, read with `weights_only` and mapped, never unpickled as objects."""

    in_folder = True

    def __init__(self, folder: Path, label: str, weights: Path | None = None) -> None:
        self.label, self.folder = label, folder
        self.config = read_json(folder / "config.json")
        weights = weights or _weights_of(folder, label, self.config)
        files = sorted(set(read_weight_map(weights).values())) if weights.suffix == ".json" else [weights.name]
        self._mapped: dict[str, Tensor] = {}
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, tensor in _load_bin(folder / file).items():
                self._mapped[name] = tensor
                known = tensor.dtype if tensor.dtype in _DTYPES.values() else None
                stored_as = dtype_name(tensor.dtype)
                tensors[name] = TensorInfo(tuple(tensor.shape), known, stored_as, folder / file)
        self.tensors = in_natural_order(tensors)

    def read(self, name: str) -> Tensor:
        return self._mapped[name].clone()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._mapped[name][start:stop].clone()


def open_folder(folder: Path, label: str) -> Checkpoint:
    """A Hugging Face folder: of its weights the ones that transformers would load."""
    if not (folder / "config.json").exists():
        raise SourceError(f"{label}: no config.json in the folder; is it a Hugging Face checkpoint?")
    weights = _weights_of(folder, label, read_json(folder / "config.json"))
    kind = BinCheckpoint if weights.name in ("pytorch_model.bin", BIN_INDEX) else SafetensorsCheckpoint
    return kind(folder, label, weights)


def _weights_of(folder: Path, label: str, config: Mapping[str, Any]) -> Path:
    """The file of the weights, or the index of many, in transformers' own order of preference."""
    named = config.get("transformers_weights")  # with which a configuration goes before that order
    if named is not None:
        return _named_weights(folder, named)
    there = sorted((folder / name for name in WEIGHT_FILES if (folder / name).exists()), key=lambda file: file.is_dir())
    if there:
        return there[0]
    shards = sorted(file.name for file in folder.glob("model-*-of-*.safetensors"))
    if shards:
        raise SourceError(f"{label}: has {shards[0]} but no {SAFETENSORS_INDEX}; copy the index next to the shards")
    variants = sorted(file.name for file in folder.glob("model.*.safetensors"))
    if variants:
        raise SourceError(f"{label}: holds a variant only, {variants[0]}; rename it to model.safetensors")
    raise SourceError(f"{label}: no weights found (model.safetensors, {SAFETENSORS_INDEX} or pytorch_model.bin)")


def _named_weights(folder: Path, named: Any) -> Path:
    file = folder / "config.json"
    endings = (".safetensors", ".safetensors.index.json")
    if not isinstance(named, str) or not named.endswith(endings) or not _is_plain(named):
        raise SourceError(f"{file}: transformers_weights is {named!r}, expected a safetensors file of the folder")
    if not (folder / named).is_file():
        raise SourceError(f"{file}: transformers_weights says {named!r}, which is not there; download it again")
    return folder / named


def _is_plain(name: str) -> bool:
    """Whether a name stays inside its folder."""
    return bool(name) and Path(name).name == name and "\\" not in name and name not in (".", "..")


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that a configuration names, or "unknown"."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "unknown"


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts layers.2 before layers.10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def in_natural_order(by_name: Mapping[str, T]) -> dict[str, T]:
    """The same entries, sorted by `natural_key`."""
    return {name: by_name[name] for name in sorted(by_name, key=natural_key)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises SourceError where the file is missing or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def read_weight_map(index: Path) -> dict[str, str]:
    """The index's tensor -> file map, every file a plain name inside the index's folder.

    transformers joins these names to the folder unchecked (as of 5.23), so this runs before it sees them.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index}: has no 'weight_map' object; the index is not a checkpoint's")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not is_plain(file):
            raise SourceError(
                f"{index}: tensor {tensor!r} points to {file!r}, outside the checkpoint's folder; refused"
            )
    missing = sorted({file for file in weight_map.values() if not (index.parent / file).is_file()})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(f"{index}: shard {missing[0]}{more} is missing; download the checkpoint again")
    return weight_map


def _tensors_of_index(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_weight_map(index)
    files = {file: tensors_of_file(index.parent / file) for file in sorted(set(weight_map.values()))}
    for tensor, file in weight_map.items():
        if tensor not in files[file]:
            raise SourceError(
                f"{index}: says that {file} holds tensor {tensor!r}, but it does not; index and shards differ"
            )
    for file, tensors in files.items():
        for tensor in tensors:
            if weight_map.get(tensor) != file:
                raise SourceError(
                    f"{index.parent / file}: tensor {tensor!r} is not in {index.name}; index and shards differ"
                )
    return {tensor: files[file][tensor] for tensor, file in weight_map.items()}


def tensors_of_file(file: Path) -> dict[str, TensorInfo]:
    """The header of one safetensors file."""
    tensors = {}
    with _opened(file) as handle:
        for name in handle.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
            part = handle.get_slice(name)
            stored_as = part.get_dtype()
            tensors[name] = TensorInfo(tuple(part.get_shape()), _DTYPES.get(stored_as), stored_as, file)
    if not tensors:
        raise SourceError(f"{file}: holds no tensors")
    return tensors


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with _opened(file) as handle:
        # clone: the mapped pages go with the handle, so that resident memory stays at one tensor
        tensor: Tensor = handle.get_tensor(name).clone()
        return tensor


def read_rows(file: Path, name: str, start: int, stop: int) -> Tensor:
    """Some rows of one tensor of a safetensors file."""
    with _opened(file) as handle:
        rows: Tensor = handle.get_slice(name)[start:stop].clone()
        return rows


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise SourceError(
            f"{file}: not a whole safetensors file (truncated or corrupt: {error}); copy it again"
        ) from None
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror or error}") from None


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise SourceError(f"{file}: missing; download the checkpoint again") from None
    except Exception as error:  # torch raises many types for one bad file
        reason = str(error).splitlines()[0]
        raise SourceError(f"{file}: cannot be read safely ({reason}); convert the checkpoint to safetensors") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise SourceError(f"{file}: holds more than named tensors; convert the checkpoint to safetensors")
    return loaded
