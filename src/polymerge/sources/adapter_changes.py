"""The keys of a PEFT adapter's file, sorted into changes of its base's tensors.

Knows PEFT's names: factors, DoRA's magnitudes, modules and tables of the adapter's own, rows of a table, biases. What
has no place in the base, or another shape, is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SourceError
from .adapter_base import AdapterBase
from .adapter_config import is_saved_whole, scaling_of, start_of, token_indices
from .checkpoint import TensorInfo, read_tensor
from .lora import Added, Change, FusedFactors, LowRank, OfExperts, OfPart, OwnPart, Replaced

PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta")


@dataclass
class _Module:
    """The keys of one module's parts in the adapter's file: `lora_A`, `lora_B`, `lora_magnitude_vector` ..."""

    parts: dict[str, str] = field(default_factory=dict)

    @property
    def embedding(self) -> bool:
        return any("embedding" in part for part in self.parts)

    def factor(self, side: str) -> str | None:
        return self.parts.get(f"lora_embedding_{side}" if self.embedding else f"lora_{side}")


@dataclass
class Changes:
    """What an adapter does to its base: tensors of its own (target -> key in its file) and changes of others.

    Attributes:
        apart: targets that are modules of the adapter's own, beside the base's.
    """

    whole: dict[str, str] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)
    changed: dict[str, Change] = field(default_factory=dict)

    def drop(self, target: str) -> None:
        self.whole.pop(target, None)
        self.changed.pop(target, None)


class ChangesReader:
    """Sorts the keys of an adapter's file into changes of the base's tensors."""

    def __init__(self, base: AdapterBase, settings: dict[str, Any], file: Path, stored: dict[str, TensorInfo]) -> None:
        self._base, self._settings, self._file, self._stored = base, settings, file, stored
        self._changes = Changes()

    def read(self) -> Changes:
        modules: dict[str, _Module] = {}
        for key in self._stored:
            name = key.removeprefix(PREFIX).replace(".token_adapter.base_layer.", ".base_layer.")
            factor, tokens = _FACTOR.fullmatch(name), _TOKENS.fullmatch(name)
            if factor:
                part = factor["part"] + (".bias" if factor["leaf"] == "bias" else "")
                modules.setdefault(factor["module"], _Module()).parts[part] = key
            elif tokens:
                self._add_tokens(tokens["module"], key)
            elif "lora_" in name:
                raise SourceError(f"{self._file}: {key!r} is a kind of LoRA tensor that a merge does not read")
            else:
                self._add_whole(name, key)
        targets = self._settings.get("target_parameters") or []
        for module, keys in modules.items():
            plain = module
            while plain.endswith(".base_layer"):
                plain = plain.removesuffix(".base_layer")
            fused = self._base.fused(plain, targets) if targets else []
            if fused:
                depth = (len(module) - len(plain)) // len(".base_layer")
                self._add_fused(module, fused, depth, keys)
            else:
                self._add_factors(module, keys)
        return self._changes

    def _target(self, module: str, parameter: str, key: str) -> str:
        tensor = self._base.tensor(module, parameter)
        if tensor is None:
            raise SourceError(f"{self._file}: {self._base.refusal(key, module)}")
        return tensor

    def _change(self, target: str, change: Change, key: str) -> None:
        if target in self._changes.changed:
            raise SourceError(f"{self._file}: {key!r} changes {target!r} a second time, which a merge does not read")
        self._changes.changed[target] = change

    def _add_whole(self, name: str, key: str) -> None:
        """A module of `modules_to_save`, a bias that was trained, or a table of the base that was saved with it."""
        module, _, parameter = name.rpartition(".")
        plain = re.sub(r"\.(modules_to_save|original_module|base_layer)$", "", module)
        apart = is_saved_whole(self._settings, plain)
        if apart and plain != module and (not module.endswith("modules_to_save") or self._also(plain, parameter)):
            return  # the base's own, behind the copy that PEFT computes with, or that copy once more
        fused = self._base.stored_as_many(plain, parameter) if apart else None
        if fused is not None:
            self._add_whole_fused(fused, key)
            return
        target = self._target(plain, parameter, key)
        shape, expected = self._stored[key].shape, self._base.info(target).shape
        ends = (self._base.embedding, self._base.head)
        resized = target in ends or (parameter == "bias" and f"{plain}.weight" == self._base.head)
        if shape != expected and not (resized and shape[1:] == expected[1:]):
            raise SourceError(f"{self._file}: {self._sizes(key, shape, target)}")
        self._changes.whole[target] = key
        if apart:
            self._changes.apart.add(target)

    def _add_whole_fused(self, parameter: str, key: str) -> None:
        """An own module of `modules_to_save` whose parameter the base stores matrix by matrix."""
        shape, expected = self._stored[key].shape, self._base.layout(parameter)[0]
        if shape != expected:
            raise SourceError(f"{self._file}: {key!r} is {list(shape)}, but {parameter!r} is {list(expected)}")
        for target in self._base.parts(parameter, torch.empty(shape, device="meta")):
            part = partial(self._base.part, parameter, partial(self._read, key), target)
            self._change(self._part(target, parameter), OwnPart(part), key)

    def _also(self, module: str, parameter: str) -> bool:
        return f"{PREFIX}{module}.{parameter}" in self._stored

    def _add_tokens(self, module: str, key: str) -> None:
        target = self._target(module, "weight", key)
        rows, shape = token_indices(self._settings, module), self._stored[key].shape
        if rows is None and self._base.tied and target == self._base.head:
            rows = token_indices(self._settings, str(self._base.embedding).removesuffix(".weight"))
        if rows is None or shape != (len(rows), *self._base.info(target).shape[1:]):
            raise SourceError(
                f"{self._file}: {key!r} is {list(shape)}, which does not fit trainable_token_indices of {module!r}"
            )
        self._change(target, Replaced(rows, self._read(key)), key)

    def _add_factors(self, module: str, keys: _Module) -> None:
        a_key, b_key = keys.factor("A"), keys.factor("B")
        if a_key is None or b_key is None:
            raise SourceError(f"{self._file}: {module!r} has one LoRA factor of two")
        target = self._target(module, "weight", a_key)
        a, b = self._pair(module, a_key, b_key)
        if a.shape[0] != b.shape[1]:
            raise self._misfit(module, a, b)
        scaling = scaling_of(self._settings, module, a.shape[0])
        transposed = keys.embedding or self._is_conv1d(target)
        change = LowRank(a, b, scaling, transposed, begins="zero" if keys.embedding else start_of(self._settings))
        change.dtype = self._dtype(a_key, b_key)
        if change.shape != self._size(target):
            raise SourceError(f"{self._file}: {self._sizes(b_key, change.shape, target)}")
        change.magnitude = self._magnitude(module, keys, change)
        self._check_start(change, target, module)
        self._change(target, change, a_key)
        if "lora_B.bias" in keys.parts:
            self._add_bias(module, keys.parts["lora_B.bias"], scaling)

    def _add_bias(self, module: str, key: str, scaling: float) -> None:
        target = self._base.tensor(module, "bias")
        if target is None:
            raise SourceError(f"{self._file}: {key!r} adds a bias to {module!r}, which has none in {self._named()}")
        value = scaling * self._read(key)
        if tuple(value.shape) != self._base.info(target).shape:
            raise SourceError(f"{self._file}: {self._sizes(key, tuple(value.shape), target)}")
        self._change(target, Added(value), key)

    def _add_fused(self, module: str, fused: list[str], depth: int, keys: _Module) -> None:
        """PEFT wraps a module once for every parameter; the outermost wrapper is the last parameter's."""
        a_key, b_key = keys.factor("A"), keys.factor("B")
        if a_key is None or b_key is None or len(keys.parts) > 2 or depth >= len(fused):
            raise SourceError(f"{self._file}: {module!r} does not have two LoRA factors for each of {fused}")
        parameter = fused[len(fused) - 1 - depth]
        shape, transposed = self._base.layout(parameter)
        experts = shape[0] if len(shape) == 3 else 1
        transposed = transposed and len(shape) == 3
        rows, columns = (shape[2], shape[1]) if transposed else shape[-2:]
        a, b = self._pair(module, a_key, b_key)
        rank = a.shape[0] // experts
        if a.shape != (rank * experts, columns) or b.shape != (rows, rank * experts):
            raise self._misfit(parameter, a, b)
        scaling = scaling_of(self._settings, parameter, rank)
        if len(shape) == 2:
            target = self._target(*parameter.rpartition(".")[::2], a_key)
            self._change(target, LowRank(a, b, scaling, dtype=self._dtype(a_key, b_key)), a_key)
            return
        factors = FusedFactors(a, b, scaling, experts, transposed)
        for target in self._base.parts(parameter, torch.empty(shape, device="meta")):
            part = partial(self._base.part, parameter, partial(factors.delta, 0, experts), target)
            whole = target == parameter
            self._change(self._part(target, parameter), OfExperts(factors) if whole else OfPart(part), a_key)

    def _part(self, target: str, parameter: str) -> str:
        if target not in self._base.checkpoint.tensors:
            raise SourceError(f"{self._file}: changes {parameter!r}, but {self._named()} has no tensor {target!r}")
        return target

    def _pair(self, module: str, a_key: str, b_key: str) -> tuple[Tensor, Tensor]:
        a, b = self._read(a_key), self._read(b_key)
        if a.dim() != 2 or b.dim() != 2:
            raise self._misfit(module, a, b)
        return a, b

    def _dtype(self, *keys: str) -> torch.dtype:
        """That holds what is stored under these keys."""
        return reduce(torch.promote_types, (self._stored[key].dtype or torch.float32 for key in keys))

    def _misfit(self, module: str, a: Tensor, b: Tensor) -> SourceError:
        return SourceError(
            f"{self._file}: the factors of {module!r} are {list(a.shape)} and {list(b.shape)}, "
            "expected [r, in] and [out, r]"
        )

    def _magnitude(self, module: str, keys: _Module, change: LowRank) -> Tensor | None:
        key = keys.parts.get("lora_magnitude_vector")
        if key is None and not self._settings.get("use_dora"):
            return None
        if key is None or self._stored[key].shape != (change.b.shape[0],):
            raise SourceError(f"{self._file}: use_dora, but {module!r} has no lora_magnitude_vector of its size")
        return self._read(key)

    def _check_start(self, change: LowRank, target: str, module: str) -> None:
        if change.begins == "zero":
            return
        if self._base.tied and target == self._base.head:
            raise SourceError(f"{self._file}: {module!r} takes its start out of a table that is tied; merge it first")
        if change.begins == "olora" and change.transposed:
            raise SourceError(f"{self._file}: OLoRA on {module!r}, a Conv1D, has no arithmetic in PEFT; merge it first")

    def _is_conv1d(self, target: str) -> bool:
        """By the module's class, as PEFT does; the adapter's `fan_in_fan_out` counts where the class is not known."""
        record = self._base.record(target)
        if self._base.known:
            return record is not None and record.transposed
        return bool(self._settings.get("fan_in_fan_out"))

    def _size(self, target: str) -> tuple[int, ...]:
        key = self._changes.whole.get(target)
        if key is None and self._base.tied and target in (self._base.embedding, self._base.head):
            other = str(self._base.embedding if target == self._base.head else self._base.head)
            key = self._changes.whole.get(other) if other not in self._changes.apart else None
        return self._stored[key].shape if key else self._base.info(target).shape

    def _sizes(self, key: str, shape: tuple[int, ...], target: str) -> str:
        expected = list(self._base.info(target).shape)
        text = f"{key!r} makes {list(shape)}, but {target!r} of {self._base.checkpoint.label} is {expected}"
        if target in (self._base.embedding, self._base.head):
            return f"{text}; an adapter with another vocabulary is saved with save_embedding_layers=True"
        return text

    def _named(self) -> str:
        return f"the base {self._base.checkpoint.label}"

    def _read(self, key: str) -> Tensor:
        return read_tensor(self._file, key).float()
