"""A whole model that is run once for every distinct expert among the rows: slow, and right for every architecture.

This is what is left where an expert's own parameter is read by a module whose rows cannot be run apart, because it
reads and writes a cache of them all. Where no parameter needs that, a batch goes through the model once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from .assignment import Assignment
from .own import OwnModule
from .rows import cache_part, expanded, join_cache, joined, part_of

# What is read beside a text, as transformers names it. Rows have any number of each.
OF_IMAGES = re.compile(r"pixel|image|video|audio|input_features|feature_attention|second_per_grid")
# Arguments that a model's memory of a text comes in, and the dimension that the rows are in it; None: it is seen.
CACHES = {"past_key_values": None, "cache_params": None, "state": 0, "mems": 1, "past_buckets_states": None}


class WholeModel(OwnModule):
    """Takes the place of the forward of a model, or of its backbone, which some callers run alone.

    Attributes:
        split: off, a batch goes through the model once unless a caller passes arguments that were not tried.
        states: attributes of modules that hold what a cache would (RecurrentGemma).
    """

    def __init__(
        self,
        state: Assignment,
        inner: nn.Module,
        *,
        split: bool,
        tried: frozenset[str],
        states: Sequence[tuple[nn.Module, str]] = (),
    ) -> None:
        super().__init__(state, inner)
        self.split, self._tried, self._states = split, tried, states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        state, batch = self.state, _batch(args, kwargs)
        if state.fixed:
            return self._forward(*args, **kwargs)
        if len(state.groups) == 1:
            with state.narrowed(state.groups[0][0]):
                return super().forward(*args, **kwargs)
        state.beams = batch // state.rows
        if not self._must_split(kwargs):
            return self._forward(*args, **kwargs)
        rows = [expanded(numbers, state.beams) for _, numbers in state.groups]
        outputs = []
        caches: dict[str, list[Any]] = {name: [] for name in CACHES}
        back = set[str]()
        before, after = self._held(), []
        for (weights, _), numbers in zip(state.groups, rows, strict=True):
            picked = [_part(value, str(place), numbers, batch) for place, value in enumerate(args)]
            named = {name: _part(value, name, numbers, batch) for name, value in kwargs.items()}
            self._hold(cache_part(before, numbers, batch))
            with state.narrowed(weights), self.in_place():
                output = self._forward(*picked, **named)
            after.append(self._held())
            for name in caches:
                taken = _taken(output, name)
                back |= {name} if taken is not None else set()
                caches[name].append(named.get(name) if taken is None else taken)
            outputs.append(output)
        self._hold(join_cache(None, after, rows))
        result = joined(outputs, rows)
        for name, parts in caches.items():
            if parts[0] is not None:  # one that is not given back (RecurrentGemma) was written to where it is
                cache = join_cache(kwargs.get(name), parts, rows, CACHES[name])
                if name in back:
                    _put(result, name, cache)
        return result

    @property
    def takes_numbers(self) -> bool:
        return not self.split and not self.tensors and not self._states

    def _held(self) -> list[Any]:
        return [vars(module).get(attribute) for module, attribute in self._states]

    def _hold(self, values: Sequence[Any]) -> None:
        for (module, attribute), value in zip(self._states, values, strict=True):
            vars(module)[attribute] = value

    def _must_split(self, kwargs: dict[str, Any]) -> bool:
        given = {name for name, value in kwargs.items() if isinstance(value, Tensor) and value.dim() > 1}
        return self.split or bool(self.tensors and given - self._tried - {"inputs_embeds", *CACHES})


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids"))
    return next((int(v.shape[0]) for v in (*args, *named) if isinstance(v, Tensor) and v.dim() > 1), 1)


def _part(value: Any, key: str, rows: Tensor, batch: int) -> Any:
    if key in CACHES:  # a cache that is shared with other batches knows its own rows
        return cache_part(value, rows, batch, CACHES[key]) if value is not None else None
    if not isinstance(value, Tensor):
        return value
    if key == "position_ids" and value.dim() == 3:  # one for every axis of an image
        return value[:, rows] if value.shape[1] == batch else value
    if value.dim() > 1 and value.shape[0] == batch:
        return part_of(value, key, rows, batch, frozenset())
    if OF_IMAGES.match(key):
        raise ModelError(
            f"{key}: {list(value.shape)} for {batch} rows; which row each belongs to is not known, so a batch with "
            "images has one expert"
        )
    return value


def _taken(output: Any, name: str) -> Any:
    """A cache that a model gives back; it is put together apart from the rest."""
    if not isinstance(output, dict) or output.get(name) is None:
        return None
    value = output[name]
    output[name] = None
    return value


def _put(output: Any, name: str, value: Any) -> None:
    output[name] = value
