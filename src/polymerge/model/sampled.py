"""A loaded model against its bundle: a few layers must compute, for every expert, what its dense tensors would.

The other way than the running model's: dense matrices, one in memory at a time. Knows layers that multiply; whether
the whole model answers as its experts do is proved before a merge (`polymerge.merging.proof`) and before a server
starts (`polymerge.serve.probe`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bundle.bundle import Bundle
from ..bundle.expert import ExpertReader
from ..bundle.layer import BundleLayer
from ..errors import ModelError
from .linear import ExpertLinear
from .mixed import MixedModel

# Layers that are tried: the first, the last, and some between.
SAMPLES = 4
# How far the outputs may be, relative to their norm.
CLOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check_layers(model: MixedModel, bundle: Bundle, orders: Mapping[str, Tensor]) -> None:
    """Tries some of the layers that experts change.

    Args:
        orders: parameter -> its rows' numbers in the stored tensor, where they are stored in another order.

    Raises:
        ModelError: a layer that computes something else; names it and the expert.
    """
    modules = dict(model.hf.named_modules())
    placed = [
        (layer, module)
        for layer in bundle.layers.values()
        if layer.role == "linear"
        and isinstance(module := modules.get(layer.module), ExpertLinear)
        and module.inner is None  # another's rounding is measured as a whole, `polymerge.model.quantised`
    ]
    readers = {expert: bundle.expert_reader(expert) for expert in bundle.experts}
    for layer, module in placed[:: max(1, (len(placed) - 1) // (SAMPLES - 1))]:
        _check(model, bundle, readers, layer, module, orders.get(f"{layer.module}.weight"))


@torch.no_grad()
def _check(
    model: MixedModel,
    bundle: Bundle,
    readers: Mapping[str, ExpertReader],
    layer: BundleLayer,
    module: ExpertLinear,
    order: Tensor | None,
) -> None:
    weight, names = module.weight, [*bundle.experts, None]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, weight.shape[1], generator=generator).to(weight).expand(len(names), -1)[:, None]
    with model.assigned(names, len(names)):
        outputs = (module(x) - module(torch.zeros_like(x))).float()[:, 0]  # whatever its bias
    for name, output in zip(names, outputs, strict=True):
        stored = readers[name].read(layer.tensor) if name else bundle.average_tensor(layer.tensor)
        dense = (stored.T if layer.transposed else stored).float()
        dense = dense if order is None else dense[order.to(dense.device)]
        expected = F.linear(x[0, 0].float().cpu(), dense)
        error, size = float((output.cpu() - expected).norm()), float(expected.norm())
        if not error <= CLOSE.get(weight.dtype, CLOSE[torch.bfloat16]) * size:  # nor NaN
            raise ModelError(
                f"{bundle.path}: layer {layer.module!r} computes something else than the bundle holds for "
                f"{name or 'the average'} ({error:.2g} of {size:.2g} off); run `polymerge verify` on it"
            )
