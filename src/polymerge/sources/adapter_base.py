"""The model under an adapter: which tensor stores the parameter that the adapter names.

Knows the architecture's modules (from `polymerge.sources.layers`), the head that is tied to the embedding and fused
parameters that a checkpoint stores as many. Knows nothing of the adapter's arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint, TensorInfo, architecture_of
from .layers import LayerRecord, map_layers, meta_model

# Multimodal classes put the language model one level deeper, or shallower in older versions of transformers.
_LEVELS = ("model", "language_model")
_SENSES = re.compile(r"(^|[._])(vision|visual|image|audio|speech|multi_modal|multimodal|mm)([._]|$)")
_OTHER_HEADS = re.compile(r"(^|\.)(score|classifier|classification_head|qa_outputs|v_head|value_head|summary)(\.|$)")


class AdapterBase:
    """The base's tensors by the names of its modules.

    Attributes:
        tied: the head is the embedding's table. It has a name all the same: an adapter may part them.
        embedding, head: their tensors' names; None where the architecture has none, or is not known.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        layers = map_layers(checkpoint)
        self.records = layers.records
        self.known = layers.layers_from == "architecture"
        self._model: Any = meta_model(checkpoint.folder) if self.known else None
        self.tied, self.embedding = layers.tied, layers.embedding
        self.head = layers.lm_head or self._head_by_architecture()
        self._places = {(r.module, r.parameter): tensor for tensor, r in layers.records.items()}
        if self.head is not None:
            self._places.setdefault(_split(self.head), self.head)
        self._changes: dict[str, dict[str, Tensor]] = {}
        self._short: dict[tuple[str, ...], set[str]] = {}
        for tensor in self._places.values():
            self._short.setdefault(_without_levels(tensor), set()).add(tensor)

    def info(self, tensor: str) -> TensorInfo:
        """Form of a tensor; of a tied head, the embedding's."""
        tensors = self.checkpoint.tensors
        return tensors[tensor if tensor in tensors else str(self.embedding)]

    def rows(self, tensor: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor; of a tied head, the embedding's."""
        tensors = self.checkpoint.tensors
        return self.checkpoint.read_rows(tensor if tensor in tensors else str(self.embedding), start, stop)

    def record(self, tensor: str) -> LayerRecord | None:
        """What the tensor is."""
        return self.records.get(tensor)

    def tensor(self, module: str, parameter: str) -> str | None:
        """The tensor that stores a module's parameter, under the name of today or of another class of the model."""
        name = f"{module}.{parameter}"
        place = self._places.get((module, parameter)) or (name if name in self.checkpoint.tensors else None)
        near = self._short.get(_without_levels(name), set())
        return place or (next(iter(near)) if len(near) == 1 else None)

    def refusal(self, key: str, module: str) -> str:
        """Why a key of the adapter has no place."""
        kind = architecture_of(self.checkpoint.config)
        base = f"the base {self.checkpoint.label} ({kind})"
        if _SENSES.search(module):
            return f"{key!r} belongs to a multimodal model's other senses, which {base} does not have"
        if _OTHER_HEADS.search(module):
            return f"{key!r} is a head that {base} does not have; only language models can be merged"
        return f"{key!r} fits no tensor of {base}; is it the adapter's base?"

    def fused(self, module: str, targets: Sequence[str]) -> list[str]:
        """The parameters of a module itself that `target_parameters` name, the innermost of PEFT's wrappers first."""
        if self._model is None:
            return []
        place = next((m for m in self._model_names(module)), None)
        if place is None:
            return []
        names = (f"{place}.{name}" for name, _ in self._model.get_submodule(place).named_parameters(recurse=False))
        return [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]

    def layout(self, parameter: str) -> tuple[tuple[int, ...], bool]:
        """Shape of a parameter of the model, and whether its matrices are [in, out]."""
        module, _, name = parameter.rpartition(".")
        owner = self._model.get_submodule(module)
        return tuple(getattr(owner, name).shape), bool(getattr(owner, "is_transposed", False))

    def parts(self, parameter: str, delta: Tensor) -> dict[str, Tensor]:
        """A change of a fused parameter, as changes of the tensors that store it; by transformers' own rules."""
        from transformers.core_model_loading import revert_weight_conversion

        stored: dict[str, Tensor] = revert_weight_conversion(self._model, {parameter: delta})
        return stored

    def stored_as_many(self, module: str, parameter: str) -> str | None:
        """The model's name of a module's parameter that the checkpoint stores as other tensors; None of any other."""
        if self._model is None or self.tensor(module, parameter) is not None:
            return None
        places = (place for place in self._model_names(module) if hasattr(self._model.get_submodule(place), parameter))
        return next((f"{place}.{parameter}" for place in places), None)

    def part(self, parameter: str, whole: Callable[[], Tensor], tensor: str) -> Tensor:
        """One stored tensor's part of a fused parameter's own value or change. A merge goes layer by layer, so those of
        the two parameters that were asked for last are kept."""
        kept = self._changes.get(parameter)
        if kept is None:
            kept = self.parts(parameter, whole())
            self._changes = {**dict(list(self._changes.items())[-1:]), parameter: kept}
        return kept[tensor]

    def _model_names(self, module: str) -> list[str]:
        short = _without_levels(module)
        names = [name for name, _ in self._model.named_modules()]
        return [module] if module in names else [name for name in names if name and _without_levels(name) == short]

    def _head_by_architecture(self) -> str | None:
        if self._model is None:
            return None
        head = self._model.get_output_embeddings()
        name = next((name for name, module in self._model.named_modules() if module is head), None)
        return f"{name}.weight" if name else None


def _split(tensor: str) -> tuple[str, str]:
    module, _, parameter = tensor.rpartition(".")
    return module, parameter


def _without_levels(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part not in _LEVELS)
