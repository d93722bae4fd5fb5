"""The factors of an exported adapter: W̄ + B A is as near to the expert's matrix as their rank allows.

rho_i W̄ + B_i A_i, with the gains of the expert's own norm in its columns, is taken against W̄ again and factorised at
the task's rank, for the inputs that the layers see. Holds one tensor of one expert at a time. Knows what is to be
expressed (`polymerge.export.expressed`) and PEFT's form; does not know who runs the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..bundle.bundle import Bundle
from ..bundle.expert import ExpertReader
from ..bundle.files import DTYPE_NAMES, Entry, raw_bytes, write_json, write_safetensors
from ..bundle.manifest import ADAPTER_FILE
from ..bundle.peft import PEFT_PREFIX, adapter_config
from ..method.rsvd import rsvd, sketch_seed
from .expressed import Factored
from .vllm.norms import gain_ratio, norm_modules

# B [out, r] and A [r, in].
Pair = tuple[Tensor, Tensor]


def write_peft(
    bundle: Bundle, tasks: Sequence[Factored], pairs: Iterable[Pair], folder: Path, dtype: torch.dtype
) -> None:
    """An adapter's folder as PEFT has it, of the pairs of its tasks, one at a time."""
    shapes = {key: shape for task in tasks for key, shape in task.shapes.items()}
    entries = [
        Entry(PEFT_PREFIX + key, DTYPE_NAMES[dtype], shape, shape[0] * shape[1] * dtype.itemsize)
        for key, shape in shapes.items()
    ]
    config = adapter_config(shapes.items(), bundle.layers.values(), tied_embedding=None)
    write_json(folder / "adapter_config.json", config)
    contents = (bytes(raw_bytes(factor.to(dtype).cpu())) for b, a in pairs for factor in (a, b))
    write_safetensors(folder / ADAPTER_FILE, entries, contents)


class FactorMaker:
    """Makes the factors of a bundle's experts.

    Args:
        norms: module of a norm that is folded -> its tensor.
        dtype: in which the average is served where its tensors do not say.
    """

    def __init__(self, bundle: Bundle, norms: Mapping[str, str], device: torch.device, dtype: torch.dtype) -> None:
        self.bundle, self.norms, self.device, self.dtype = bundle, norms, device, dtype
        self._modules = norm_modules(bundle.path)

    def pairs(
        self,
        expert: str,
        tasks: Iterable[Factored],
        sizes: Mapping[str, Tensor],
        *,
        done: Callable[[Factored], None] = lambda task: None,
    ) -> Iterator[Pair]:
        """B and A of every task. `sizes` are those of the layers' inputs, by module: [in]."""
        reader = self.bundle.expert_reader(expert)
        for task in tasks:
            yield self._factors(expert, task, reader, sizes.get(task.module))
            done(task)

    def _factors(self, expert: str, task: Factored, reader: ExpertReader, size: Tensor | None) -> Pair:
        """B [out, r] and A [r, in]: W̄ + B A is as near to the expert's matrix as this rank allows.

        The bundle's own factors stay as they are, and what is folded in gets the rank that is left. To fit both
        together would be nearer in every norm and was worse in every measurement: a norm's gains change all columns a
        little, which no low rank holds, and would push out directions that were trained.
        """
        tensor = task.layer.tensor
        target = self._target(task, reader)
        stored = reader.factors(tensor)
        if stored and task.embedding:
            stored = stored[1].T, stored[0].T
        seed = sketch_seed(self.bundle.manifest.method.seed, tensor, expert, task.module)
        whole = task.layer.base == "adapters"  # all of what the average lacks and has too much, which is of low rank
        if stored is None or whole or task.rank == min(task.shape) or stored[1].shape[0] > task.rank:
            return self._fitted(target, task.rank, size, seed)
        b, a = (factor.to(self.device) for factor in stored)
        spare = task.rank - a.shape[0]
        if not spare:
            return b, a
        more_b, more_a = self._fitted(target.addmm_(b, a, alpha=-1.0), spare, size, seed)
        return torch.cat([b, more_b], dim=1), torch.cat([a, more_a])

    def _target(self, task: Factored, reader: ExpertReader) -> Tensor:
        """What the factors are to add to the average: [out, in], float32."""
        weight = reader.read(task.layer.tensor).to(self.device)
        if task.norm:
            ratio = self._ratio(task.norm, reader).to(weight)
            weight.mul_(ratio[:, None] if task.layer.transposed else ratio)
        weight.sub_(self._average(task.layer.tensor).to(weight))
        return weight.T if task.layer.transposed or task.embedding else weight

    def _average(self, tensor: str) -> Tensor:
        """As it is served: the experts' adapters give back what its rounding takes."""
        return self.bundle.average_tensor(tensor).to(self.bundle.base.tensors[tensor].dtype or self.dtype)

    def _fitted(self, matrix: Tensor, rank: int, size: Tensor | None, seed: int) -> Pair:
        """min ||(matrix - B A) diag(size)||: columns count by the size of what they are multiplied with."""
        method = self.bundle.manifest.method
        scale = torch.ones(matrix.shape[1]).to(matrix) if size is None else size.to(matrix)
        b, a = rsvd(matrix * scale, rank, n_oversamples=method.n_oversamples, n_iter=method.n_iter, seed=seed)
        return b, a / scale

    def _ratio(self, norm: str, reader: ExpertReader) -> Tensor:
        tensor = self.norms[norm]
        ratio = gain_ratio(self._modules[norm], reader.read(tensor), self.bundle.base_tensor(tensor))
        assert ratio is not None  # the plan folds no other norm
        return ratio
