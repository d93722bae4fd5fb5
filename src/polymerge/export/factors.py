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
from ..method.rsvd import from_columns, rsvd, sketch_seed
from ..sources.layers import meta_model
from .expressed import Factored
from .vllm.norms import gain_ratio, norm_modules

# What is left beside an expert's own factors is left out where it is no more than this share of them: its KL is a
# millionth of theirs. On the demo ratios leave 0.0001 to 0.0006, but for the embedding's (0.016); norms 0.2 to 2.5.
NEXT_TO_NOTHING = 1e-3
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
    contents = (raw_bytes(factor.to(dtype).cpu()) for b, a in pairs for factor in (a, b))
    write_safetensors(folder / ADAPTER_FILE, entries, contents)


class FactorMaker:
    """Makes the factors of a bundle's experts.

    Args:
        norms: module of a norm that is folded -> its tensor.
        dtype: in which the average is served where its tensors do not say.
    """

    def __init__(self, bundle: Bundle, norms: Mapping[str, str], device: torch.device, dtype: torch.dtype) -> None:
        self.bundle, self.norms, self.device, self.dtype = bundle, norms, device, dtype
        self._modules = norm_modules(meta_model(bundle.path))
        self._ratios: dict[tuple[str, str], Tensor] = {}

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
        stored = reader.factors(tensor)
        ratio = self._ratio(task.norm, expert, reader) if task.norm else None
        seed = sketch_seed(self.bundle.manifest.method.seed, tensor, expert, task.module)
        whole = task.layer.base == "adapters"  # all of what the average lacks and has too much, which is of low rank
        if stored is None or whole or task.rank == min(task.shape) or stored[1].shape[0] > task.rank:
            return self._fitted(self._target(task, reader, ratio), task.rank, size, seed)
        b, a = (factor.to(self.device) for factor in stored)
        spare = task.rank - a.shape[0]
        left = self._unsaid(task, reader, ratio, b, a) if spare else None
        if task.embedding:
            b, a = a.T, b.T
        if left is None:
            return b, a
        more_b, more_a = self._folded(left, spare, size, (b, a))
        return torch.cat([b, more_b], dim=1), torch.cat([a, more_a])

    def _target(self, task: Factored, reader: ExpertReader, ratio: Tensor | None) -> Tensor:
        """What the factors are to add to the average: [out, in], float32."""
        weight = reader.read(task.layer.tensor).to(self.device)
        if ratio is not None:
            weight.mul_((ratio[:, None] if task.layer.transposed else ratio).to(weight))
        tensor = task.layer.tensor
        weight.sub_(self._served(tensor, self.bundle.average_tensor(tensor)).to(weight))
        return weight.T if task.layer.transposed or task.embedding else weight

    def _unsaid(self, task: Factored, reader: ExpertReader, ratio: Tensor | None, b: Tensor, a: Tensor) -> Tensor:
        """What the expert's own B A leave of that: (rho W̄ + B A) diag(ratio) - W̄ - B A, a sum of small terms."""
        layer, rho = task.layer, reader.ratio(task.layer.tensor)
        stored = self.bundle.base_tensor(layer.tensor).to(self.device)
        base, served = stored.float(), self._served(layer.tensor, stored)
        if ratio is None:
            left = base * (rho - 1.0)
        else:
            left = base * ((ratio[:, None] if layer.transposed else ratio) * rho - 1.0).to(base)
        if served is not stored:
            left += base.sub_(served)
        left = left.T if layer.transposed else left
        if ratio is not None:
            left.addmm_(b, a * (ratio - 1.0).to(a))
        return left.T if task.embedding else left

    def _served(self, tensor: str, average: Tensor) -> Tensor:
        """As it is served: the experts' adapters give back what its rounding takes."""
        return average.to(self.bundle.base.tensors[tensor].dtype or self.dtype)

    def _folded(self, left: Tensor, rank: int, size: Tensor | None, said: Pair) -> Pair:
        """Factors of what is left beside the expert's own, in which a norm's gains have few columns that count.

        A ratio alone leaves next to nothing, which is left out.
        """
        scale = torch.ones(left.shape[1]).to(left) if size is None else size.to(left)
        b, a = said[0], said[1] * scale
        norm = max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0) ** 0.5  # ||B A||
        left = left * scale
        if float(torch.linalg.vector_norm(left)) <= NEXT_TO_NOTHING * norm:
            return left.new_zeros(len(left), rank), left.new_zeros(rank, left.shape[1])
        more_b, more_a = from_columns(left, rank, n_oversamples=self.bundle.manifest.method.n_oversamples)
        return more_b, more_a / scale

    def _fitted(self, matrix: Tensor, rank: int, size: Tensor | None, seed: int) -> Pair:
        """min ||(matrix - B A) diag(size)||: columns count by the size of what they are multiplied with."""
        method = self.bundle.manifest.method
        scale = torch.ones(matrix.shape[1]).to(matrix) if size is None else size.to(matrix)
        b, a = rsvd(matrix * scale, rank, n_oversamples=method.n_oversamples, n_iter=method.n_iter, seed=seed)
        return b, a / scale

    def _ratio(self, norm: str, expert: str, reader: ExpertReader) -> Tensor:
        """g_i / g, float64 [in]: several layers read one norm."""
        if (expert, norm) not in self._ratios:
            tensor = self.norms[norm]
            ratio = gain_ratio(self._modules[norm], reader.read(tensor), self.bundle.base_tensor(tensor))
            assert ratio is not None  # the plan folds no other norm
            self._ratios[(expert, norm)] = ratio.to(self.device)
        return self._ratios[(expert, norm)]
