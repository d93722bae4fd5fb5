"""A decoding step of fixed shapes: one token for each of so many rows, over so many columns of their keys and values.

What changes from step to step (tokens, places, experts) is written into tensors that stay where they are, and the rest
happens on the device alone. So the step can be captured as a CUDA graph and replayed: one launch in the place of
thousands. It runs without being captured too, anywhere. Knows shapes; does not know requests, or how rows come and go.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from .assignment import Assignment

# Runs before a capture: kernels are chosen and compiled, and what is made once is made.
WARMING = 2


class Row(NamedTuple):
    """Of one step.

    Attributes:
        token: its latest, which is read.
        place: of that token among the row's.
        start: the column at which the row begins.
        number: of its expert; the average's is the one after the last.
    """

    token: int
    place: int
    start: int
    number: int


class FixedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [rows, heads, columns, dim], views of somebody's; a step writes into one column."""

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._column = keys, values, column
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[rows, heads, 1, dim] in their place."""
        self.keys.index_copy_(2, self._column, key_states)
        self.values.index_copy_(2, self._column, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) - 1


class FixedStep:
    """A step of a transformers model.

    Args:
        layers: keys and values [rows, heads, columns, dim] of every layer, as views that stay valid; None for a layer
            without any. What is not a row's is never NaN.
        state: what the model's mixed layers read; None for a model that has none.
        mixed: rows have experts; or else all are the average.

    Attributes:
        rows: that it has. Those that nobody needs read and write what nobody looks at.
    """

    def __init__(
        self, hf: Any, layers: Sequence[tuple[Tensor, Tensor] | None], state: Assignment | None, *, mixed: bool
    ) -> None:
        views = next(views for views in layers if views is not None)
        self.rows, self.columns = views[0].shape[0], views[0].shape[2]
        self._hf, self._state, self._mixed = hf, state, mixed
        device = views[0].device
        host = torch.zeros(4 * self.rows + 1, dtype=torch.long)
        self._host = host.pin_memory() if device.type == "cuda" else host
        self._packed = torch.zeros_like(host, device=device)
        self._tokens, self._places, self._starts, self._numbers = self._packed[:-1].view(4, self.rows)
        self._column = self._packed[-1:]
        self._cache = Cache(layers=[])
        self._cache.layers = [FixedLayer(*pair, self._column) if pair else DynamicLayer() for pair in layers]
        self._range = torch.arange(self.columns, device=device)
        self._constants: dict[Hashable, Any] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)

    @staticmethod
    def objection(modules: Iterable[nn.Module]) -> str | None:
        """Why a model whose mixed modules are among these has no such step; None where it has."""
        for module in modules:
            if isinstance(getattr(module, "state", None), Assignment) and not getattr(module, "takes_numbers", False):
                return f"a {type(module).__name__} looks at its rows' experts from the host"
        return None

    def capture(self, rows: Sequence[Row], column: int, pool: Any = None) -> None:
        """From now on the step is replayed. It is run for these rows, twice. Raises what the driver raises.

        Args:
            pool: of memory, which graphs that are never replayed at a time can share.
        """
        self._fill(rows, column)
        self._assign()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMING):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._logits = self._compute()
        self._graph = graph

    def run(self, rows: Sequence[Row], column: int) -> Tensor:
        """Logits [len(rows), V]; of a captured step they are valid until the next.

        Args:
            column: that is written.
        """
        self._fill(rows, column)
        if self._graph is None:
            self._assign()
            return self._compute()[: len(rows)]
        self._graph.replay()
        return self._logits[: len(rows)]

    def _fill(self, rows: Sequence[Row], column: int) -> None:
        unused = [Row(0, 0, column, 0)] * (self.rows - len(rows))
        values = [value for of in zip(*rows, *unused, strict=True) for value in of]
        self._host.copy_(torch.tensor([*values, column]))
        self._packed.copy_(self._host, non_blocking=True)

    def _compute(self) -> Tensor:
        seen = (self._range >= self._starts[:, None]) & (self._range <= self._column)
        dtype = self._hf.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
        with self._reading():
            output = self._hf(
                input_ids=self._tokens[:, None],
                attention_mask=mask[:, None, None],
                position_ids=self._places[:, None],
                past_key_values=self._cache,
                use_cache=True,
            )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _assign(self) -> None:
        if self._state is not None and not self._mixed:
            self._state.set(None, self.rows)

    def _reading(self) -> AbstractContextManager[None]:
        if self._state is None or not self._mixed:
            return nullcontext()
        return self._state.reading(self._numbers, self._constants)
