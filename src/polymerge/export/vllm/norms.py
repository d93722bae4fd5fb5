"""Which linear layers read a norm's output and nothing else does, and what folding an expert's norm into them takes.

A norm without a bias is n(x) times a gain for every column. Where all that reads it are linear layers, an expert's own
gain may as well stand in their columns: W (g_i n(x)) = (W diag(g_i / g)) (g n(x)) with the base's gain g in the norm.

Read off the architecture as `polymerge.sources.layers` does: the model runs once on the meta device (no memory, no
numbers), and shows what is called with a norm's output. There is no list of architectures here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

log = logging.getLogger(__name__)

# What hands a tensor on without mixing its columns, as long as the last dimension stays.
SAME_COLUMNS = {"view", "reshape", "contiguous", "__getitem__", "to", "float"}
# A quotient of gains beyond this would blow the rounding of the base's column up.
LARGEST_RATIO = 1e3


def norm_readers(model: nn.Module | None) -> dict[str, list[str]]:
    """Module of a norm -> the linear modules that read it, for norms that nothing else reads.

    Empty where the installed transformers cannot build (None) or run the architecture without weights.

    Args:
        model: on the meta device (`polymerge.sources.layers.meta_model`).
    """
    if model is None:
        return {}
    try:
        return _traced(model)
    except Exception as error:  # a forward pass that needs numbers; the norms are then reported, not folded
        log.info("cannot follow the norms of %s (%s)", type(model).__name__, error)
        return {}


def gain_ratio(norm: nn.Module, expert: Tensor, base: Tensor) -> Tensor | None:
    """g_i / g for every column, float64 [width], whatever the module makes of its weight (Gemma's gain is 1 + weight).

    None where a gain of the base is too small to divide by.
    """
    x = torch.randn(2, len(base), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = (functional_call(norm, {"weight": weight.double()}, (x,)).double() for weight in (expert, base))
    ratio: Tensor = (ours / theirs).mean(0)
    return ratio if bool(torch.isfinite(ratio).all()) and float(ratio.abs().max()) < LARGEST_RATIO else None


def norm_modules(model: nn.Module | None) -> dict[str, nn.Module]:
    """Name -> module, of the same."""
    return {} if model is None else {name: module for name, module in model.named_modules() if _is_plain(module)}


def _is_plain(module: nn.Module) -> bool:
    """One weight of one dimension and nothing else: a norm without a bias."""
    names = [(name, value.dim()) for name, value in module.named_parameters()]
    return names == [("weight", 1)] and not isinstance(module, nn.Linear | nn.Embedding)


def _traced(model: nn.Module) -> dict[str, list[str]]:
    reads = _Reads({id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Linear)})

    def outputs(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                reads.watch(name, output)

        return hook

    hooks = [m.register_forward_hook(outputs(n)) for n, m in model.named_modules() if _is_plain(m)]
    try:
        with torch.no_grad(), reads:
            ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
            mask = torch.zeros(1, 1, 2, 2, device="meta")  # whole already: making one would look at numbers
            model(ids, attention_mask=mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {norm: readers for norm, readers in reads.linear.items() if readers and norm not in reads.others}


class _Reads(TorchFunctionMode):
    """Notes every call that takes a watched tensor.

    Attributes:
        linear: norm -> linear modules that read it.
        others: norms that something else reads.
    """

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.linear: dict[str, list[str]] = {}
        self.others: set[str] = set()
        self._weights = weights
        self._watched: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that its id stays its own

    def watch(self, norm: str, tensor: Tensor) -> None:
        self._watched[id(tensor)] = (norm, tensor)
        self.linear.setdefault(norm, [])

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        norms = {self._watched[id(a)][0] for a in _tensors([args, kwargs]) if id(a) in self._watched}
        for norm in norms if isinstance(result, Tensor | tuple | list) and _tensors(result) else ():
            module = self._weights.get(id(args[1])) if func is F.linear else None
            if module:
                self.linear[norm].append(module)
            elif getattr(func, "__name__", "") in SAME_COLUMNS and result.shape[-1] == args[0].shape[-1]:
                self.watch(norm, result)
            else:
                self.others.add(norm)
        return result


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, tuple | list) else []
