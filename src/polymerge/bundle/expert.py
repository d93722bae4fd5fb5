"""One expert of a bundle, rebuilt tensor by tensor: from the base, its own file, and those of whom it borrows."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import BundleError
from ..method.dense import dense
from .folder import BundleFolder
from .kept import ROW_NUMBERS, numbers_problem
from .layer import BundleLayer
from .manifest import INHERITED_FILE
from .residuals import factors_of
from .tensors import StoredTensors, opened


class ExpertReader:
    """Dense tensors of one expert: W_i = rho_i W̄ + B_i A_i, or the expert's own tensor where it has one."""

    def __init__(self, bundle: BundleFolder, expert: str) -> None:
        self._bundle = bundle
        self._scales = bundle.scales(expert)
        self._expert, self._its = expert, StoredTensors(bundle.expert_file(expert))
        self._lenders: dict[Path, StoredTensors] = {}

    def read(self, tensor: str) -> Tensor:
        """float32, in the checkpoint's layout; a table with the rows that are the expert's. Raises BundleError for an
        unknown tensor."""
        layer = self._bundle.layers.get(tensor)
        if layer is None:
            raise BundleError(f"{self._bundle.path}: no tensor {tensor!r} in this bundle")
        return self._whole(layer)[: self.shape(tensor)[0]] if layer.table else self._whole(layer)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Of the expert's tensor."""
        layer = self._bundle.layers[tensor]
        rows = self._bundle.vocabulary(self._expert) if layer.table else None
        return layer.shape if rows is None else (rows, *layer.shape[1:])

    def _whole(self, layer: BundleLayer) -> Tensor:
        tensor = layer.tensor
        elsewhere = self._expert in layer.rows or layer.lends_whole(self._expert)
        whole = self.kept(layer) if elsewhere else self._its.get(f"{layer.module}.{layer.parameter}")
        if whole is not None and layer.rank and layer.role != "linear":
            return self.whole_table(layer, whole, self._rebuilt(layer)).float()
        if whole is not None:
            whole = self.whole_table(layer, whole) if layer.table else whole
            return whole.float() if whole.is_floating_point() else whole
        base = self._bundle.base_tensor(tensor)
        if not base.is_floating_point():
            return base
        base = base.float()
        if layer.parameter == "bias":
            difference = self._its.get(f"{layer.module}.lora_B.bias")
            return base if difference is None else base + difference.float()
        return self._rebuilt(layer) if layer.role == "linear" or layer.rank else base

    def kept(self, layer: BundleLayer) -> Tensor:
        """What the expert keeps of a tensor of which a few rows are stored, or that is another's too: whole, as stored.

        Raises:
            BundleError: it is not where the manifest says, or does not fit the base.
        """
        if self._expert not in layer.rows:
            return self._stored(layer, f"{layer.module}.{layer.parameter}")
        numbers, rows = self.kept_rows(layer)
        whole = self._bundle.base_tensor(layer.tensor)
        whole[numbers.long()] = rows.to(whole.dtype)
        return whole

    def kept_rows(self, layer: BundleLayer) -> tuple[Tensor, Tensor]:
        """Numbers, int32 [n], and values [n, ...] of the rows that the expert keeps of a table. Raises as `kept`."""
        key = f"{layer.module}.{layer.parameter}"
        rows, numbers = self._stored(layer, key), self._stored(layer, key + ROW_NUMBERS)
        problem = numbers_problem(numbers, rows, layer.shape)
        if problem is None and len(numbers) != layer.rows[self._expert]:
            problem = f"has {len(numbers)} rows, and the manifest says {layer.rows[self._expert]}"
        if problem:
            file = self._lender(layer).file
            raise BundleError(f"{file}: {layer.module} {problem}; copy the bundle again")
        return numbers, rows

    def _stored(self, layer: BundleLayer, key: str) -> Tensor:
        source = self._lender(layer)
        tensor = source.get(key)
        if tensor is None:
            raise BundleError(f"{source.file}: has no {key}, which is expert {self._expert!r}'s; copy the bundle again")
        return tensor

    def _lender(self, layer: BundleLayer) -> StoredTensors:
        """The file in which the expert's share of a tensor lies."""
        lent = layer.borrowed.get(self._expert)
        if lent is None:
            return self._its
        file = (
            self._bundle.expert_folder(self._expert) / INHERITED_FILE
            if lent.of is None
            else self._bundle.expert_file(lent.of)
        )
        if file not in self._lenders:
            self._lenders[file] = StoredTensors(file)
        return self._lenders[file]

    def _rebuilt(self, layer: BundleLayer) -> Tensor:
        base, tensor = self._bundle.base_tensor(layer.tensor).float(), layer.tensor
        return dense(base, self.ratio(tensor), self.factors(tensor), transposed=layer.transposed)

    def ratio(self, tensor: str) -> float:
        """rho_i of a linear weight; 1 where none is stored."""
        return self._scales.get(tensor, 1.0)

    def dtype(self, tensor: str) -> torch.dtype | None:
        """What a tensor of the expert is in; None for one that is no number."""
        layer = self._bundle.layers[tensor]
        key = self._its.keys.get(f"{layer.module}.{layer.parameter}")
        if key is None:
            return self._bundle.base.tensors[tensor].dtype
        with opened(self._its.file) as handle:
            stored: torch.dtype = handle.get_slice(key)[:0].dtype if layer.shape else handle.get_tensor(key).dtype
            return stored

    def factors(self, tensor: str) -> tuple[Tensor, Tensor] | None:
        """B [out, r] and A [r, in] of a linear weight, float32, decoded; None where the expert has none."""
        layer = self._bundle.layers[tensor]
        if self._expert not in layer.borrowed or layer.lends_whole(self._expert):
            return factors_of(self._bundle, self._expert, layer, self._its.those)
        (b, a), times = self.lent(tensor)
        return b * times, a

    def lent(self, tensor: str) -> tuple[tuple[Tensor, Tensor], float]:
        """B and A that the expert has of another's, as they are stored, and what B A counts.

        Raises:
            BundleError: they are not where the manifest says.
        """
        layer = self._bundle.layers[tensor]
        lender = self._lender(layer)
        factors = factors_of(self._bundle, self._expert, layer, lender.those)
        if factors is None:
            raise BundleError(
                f"{lender.file}: has no factors of {layer.module}, which are expert {self._expert!r}'s too"
            )
        return factors, layer.borrowed[self._expert].times

    def whole_table(self, layer: BundleLayer, stored: Tensor, others: Tensor | None = None) -> Tensor:
        """The expert's table in the bundle's size: where only its own rows are stored, the others are those that are
        given, or the average's.

        Raises:
            BundleError: they are not as many as the manifest says.
        """
        if not (layer.rank or layer.role == "embedding") or stored.shape[:1] == layer.shape[:1]:
            return stored
        rows = self._bundle.manifest.experts[self._expert].own_rows
        if len(rows) != len(stored) or stored.shape[1:] != layer.shape[1:] or rows[-1] >= layer.shape[0]:
            raise BundleError(
                f"{self._its.file}: {layer.module} has {list(stored.shape)}, and the manifest says "
                f"{len(rows)} rows of {list(layer.shape)}; copy the bundle again"
            )
        whole = self._bundle.base_tensor(layer.tensor) if others is None else others
        whole[rows] = stored.to(whole.dtype)
        return whole

    def kept_numbers(self) -> dict[str, list[int]]:
        """Module of a table -> numbers of the rows that the expert keeps of it, where these alone are stored.

        Raises:
            BundleError: they do not fit the table.
        """
        layers = self._bundle.manifest.layers
        return {x.module: self.kept_rows(x)[0].tolist() for x in layers if self._expert in x.rows}
