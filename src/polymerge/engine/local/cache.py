"""The key-value cache of a running batch: rows come and go, and nobody else's keys are copied.

All rows end at the same column, as padding on the left leaves them: causal masks and sliding windows, which count
columns back from the end, hold for every row. A row that leaves has its place taken by the last one; a newcomer's keys
are written so that they end where everyone's do. Buffers are larger than what is in use and stay where they are as long
as they suffice, so that a step of fixed shapes (`polymerge.model.step`) may hold views of them.

Knows columns and rows; does not know tokens or requests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ...errors import ModelError

# Buffers have a multiple of so many columns, and room for so many new tokens when they are made.
GROWTH = 256
# So many columns at least must come free for the live ones to be moved to the front of their buffers.
LEAST_MOVE = 64


def joins(model: Any) -> bool:
    """Whether rows of this transformers model can come and go: it keeps their keys and values and nothing else, and is
    told where their tokens stand."""
    if not {"past_key_values", "attention_mask", "position_ids"} <= inspect.signature(model.forward).parameters.keys():
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def rope_is_fixed(modules: Iterable[nn.Module]) -> bool:
    """Whether a token's keys are the same whatever else is read in the same pass. Ropes of the types `dynamic` and
    `longrope` choose their frequencies by the last position of a whole pass.

    Args:
        modules: of a model, those that make experts' positions among them.
    """
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    kinds = {kind for config in configs.values() for kind in _rope_types(config)}
    return not any("dynamic" in kind or kind == "longrope" for kind in kinds)


def _rope_types(config: Any) -> set[str]:
    """Of all layers' ropes."""
    said = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(said, dict):
        return set()
    parts = [said, *(part for part in said.values() if isinstance(part, dict))]
    return {str(part.get("rope_type") or part.get("type")) for part in parts}


@dataclass
class Extent:
    """Which part of all layers' buffers is in use: rows [0, rows), columns [start, end)."""

    rows: int = 0
    start: int = 0
    end: int = 0

    @property
    def width(self) -> int:
        return self.end - self.start


class RowsLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's buffers [rows, heads, columns, dim], larger than what is in use.

    A row's unused places hold zeros, and of rows that nobody has all are zero: a masked place has weight 0, and 0 times
    NaN is NaN. So a row is wiped where it was used when it leaves, which is less than its whole width.
    """

    def __init__(self, extent: Extent, like: DynamicLayer) -> None:
        super().__init__()
        self._extent = extent
        self.dtype, self.device, self.is_initialized = like.keys.dtype, like.keys.device, True
        self.keys = like.keys.new_zeros(0, like.keys.shape[1], 0, like.keys.shape[3])
        self.values = like.values.new_zeros(0, like.values.shape[1], 0, like.values.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[B, heads, new, dim] after what is there; the extent grows when the forward pass is over."""
        rows, start, end = self._extent.rows, self._extent.start, self._extent.end
        after = end + key_states.shape[-2]
        self.keys[:rows, :, end:after] = key_states
        self.values[:rows, :, end:after] = value_states
        return self.keys[:rows, :, start:after], self.values[:rows, :, start:after]

    def get_seq_length(self) -> int:
        return self._extent.width

    def place(self, rows: int, columns: int, start: int) -> None:
        """Moves what is in use to column `start`, in buffers of this size: the ones that are there, if it is theirs."""
        used = self._extent
        for name in ("keys", "values"):
            old = getattr(self, name)
            live = old[: used.rows, :, used.start : used.end]
            if (rows, columns) == (old.shape[0], old.shape[2]):
                new, live = old, live.clone()
                old[: used.rows] = 0.0
            else:
                new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            new[: used.rows, :, start : start + used.width] = live
            setattr(self, name, new)

    def write(self, row: int, other: DynamicLayer, source: int, length: int, end: int) -> None:
        """The last `length` columns of another layer's row, so that they end at `end`, into a row that nobody has."""
        for name in ("keys", "values"):
            ours, theirs = getattr(self, name)[row], getattr(other, name)[source]
            ours[:, end - length : end] = theirs[:, theirs.shape[1] - length :]

    def move(self, source: int, target: int, start: int, end: int) -> None:
        """What one row has in these columns, over another."""
        self.keys[target, :, start:end] = self.keys[source, :, start:end]
        self.values[target, :, start:end] = self.values[source, :, start:end]

    def wipe(self, row: int, start: int = 0, end: int | None = None) -> None:
        """Nothing is left in these columns of a row; by default in all."""
        self.keys[row, :, start:end] = 0.0
        self.values[row, :, start:end] = 0.0

    def part(self, rows: Tensor) -> RowsLayer:
        """A view of some rows: what it is given is written into these alone."""
        return _PartLayer(self, rows)


class _PartLayer(RowsLayer):
    """Some rows of another layer, for a model that is run once for every expert."""

    def __init__(self, whole: RowsLayer, rows: Tensor) -> None:
        super().__init__(whole._extent, whole)
        self.whole, self.rows = whole, rows.to(whole.keys.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[rows, heads, new, dim] after what is there."""
        start, end = self._extent.start, self._extent.end
        after = end + key_states.shape[-2]
        self.whole.keys[self.rows, :, end:after] = key_states
        self.whole.values[self.rows, :, end:after] = value_states
        return self.whole.keys[self.rows, :, start:after], self.whole.values[self.rows, :, start:after]


class RunningCache(Cache):  # type: ignore[misc]
    """A transformers cache that rows join and leave.

    Args:
        forget: drops everybody's views of the buffers; called before others are made in their place.

    Attributes:
        starts: the column at which every row begins, in the order of the rows.
        scribbled: whether a step wrote into rows that nobody has, as those of fixed shapes do.
    """

    def __init__(self, forget: Callable[[], None]) -> None:
        super().__init__(layers=[])
        self._forget = forget
        self.layers: list[DynamicLayer]
        self.extent = Extent()
        self.starts: list[int] = []
        self.scribbled = False

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return [self.extent.end - start for start in self.starts]

    def join(self, cache: DynamicCache, lengths: Sequence[int]) -> None:
        """Appends rows that were read together, padded on the left to one width, of these lengths."""
        if not self.layers:
            self.layers = [self._layer(layer) for layer in cache.layers]
        before = self.extent.rows
        self._make_room(before + len(lengths), max(lengths))
        for layer, other in zip(self.layers, cache.layers, strict=True):
            if isinstance(layer, RowsLayer):
                for number, length in enumerate(lengths):
                    if self.scribbled:
                        layer.wipe(before + number)
                    layer.write(before + number, other, number, length, self.extent.end)
        self.extent.rows += len(lengths)
        self.starts += [self.extent.end - length for length in lengths]
        self.extent.start = min(self.starts)

    def leave(self, row: int) -> None:
        """Drops a row; the last one takes its number."""
        last, end = self.extent.rows - 1, self.extent.end
        for layer in self._rows_layers():
            if row != last:
                layer.move(last, row, min(self.starts[row], self.starts[last]), end)
            layer.wipe(last, self.starts[last], end)
        self.starts[row] = self.starts[last]
        self.starts.pop()
        self.extent.rows = last
        self.extent.end = self.extent.end if self.starts else 0  # an empty one begins at the front
        self.extent.start = min(self.starts, default=0)

    def before_step(self) -> Tensor:
        """Makes room for one token a row. Returns the mask of the columns that it may look at, [rows, width + 1]."""
        self._make_room(self.extent.rows, 0, new=1)
        columns = torch.arange(self.extent.start, self.extent.end + 1)
        return (columns[None] >= torch.tensor(self.starts)[:, None]).long()

    def after_step(self) -> None:
        """Every row is one token longer."""
        self.extent.end += 1

    def part(self, rows: Tensor) -> Cache:
        """Some rows of the running ones, as a cache that writes into this one."""
        layers = [layer.part(rows) if isinstance(layer, RowsLayer) else layer for layer in self.layers]
        made = Cache(layers=[])
        made.layers = layers
        return made

    def room(self) -> tuple[int, int]:
        """Rows and columns of the buffers."""
        keys = self._rows_layers()[0].keys
        return int(keys.shape[0]), int(keys.shape[2])

    def views(self, rows: int, columns: int) -> list[tuple[Tensor, Tensor] | None]:
        """The first so many rows and columns of every layer's keys and values; None for a layer without any."""
        return [
            (layer.keys[:rows, :, :columns], layer.values[:rows, :, :columns]) if isinstance(layer, RowsLayer) else None
            for layer in self.layers
        ]

    def _make_room(self, rows: int, left: int, new: int = 0) -> None:
        """Room for so many rows, for `left` columns that end where all rows end, and for `new` ones after that. Buffers
        that are made anew are as large as is needed now, in both directions."""
        used, (have_rows, have_columns) = self.extent, self.room()
        if rows <= have_rows and left <= used.end and used.end + new <= have_columns:
            return
        start = max(0, left - used.width)
        needed = start + used.width + new
        if rows > have_rows or needed + LEAST_MOVE > have_columns:
            self._forget()
            have_rows, have_columns = 2 ** (rows - 1).bit_length(), -(-(needed + GROWTH) // GROWTH) * GROWTH
        for layer in self._rows_layers():
            layer.place(have_rows, have_columns, start)
        shift = start - used.start
        used.start, used.end = start, start + used.width
        self.starts = [place + shift for place in self.starts]

    def _layer(self, layer: DynamicLayer) -> DynamicLayer:
        """Layers that share another's keys were never written to; they stay as they are."""
        if type(layer) is not DynamicLayer:
            raise ModelError(
                f"{type(layer).__name__}: this architecture keeps more than keys and values; its requests cannot share "
                "a running batch"
            )
        return RowsLayer(self.extent, layer) if layer.is_initialized else layer

    def _rows_layers(self) -> list[RowsLayer]:
        return [layer for layer in self.layers if isinstance(layer, RowsLayer)]
