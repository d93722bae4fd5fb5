"""An expert's residual in one layer, as its file holds it: whole, in the code's shapes, decoded."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import BundleError
from .folder import BundleFolder
from .layer import BundleLayer


def factors_of(
    bundle: BundleFolder, expert: str, layer: BundleLayer, get: Callable[[str], Tensor | None]
) -> tuple[Tensor, Tensor] | None:
    """B [out, r] and A [r, in] of a residual in float32, decoded; None where the expert has none in this layer.

    Takes the arguments of `coded_factors`, and raises as it does.
    """
    stored = coded_factors(bundle, expert, layer, get)
    if not stored:
        return None
    try:
        return bundle.code_of(expert, layer).decode(stored, *layer.matrix_shape)
    except ValueError as error:
        raise BundleError(f"{bundle.expert_file(expert)}: {layer.module}: {error}; copy the bundle again") from None


def coded_factors(
    bundle: BundleFolder, expert: str, layer: BundleLayer, get: Callable[[str], Tensor | None]
) -> dict[str, Tensor] | None:
    """A residual's tensors as stored, by the code's suffixes; None where the expert has none in this layer.

    Args:
        get: the expert's stored tensor of that key (without PEFT's prefix), or None.

    Raises:
        BundleError: only some of the residual's tensors are there, or one has not the code's shape.
    """
    code = bundle.code_of(expert, layer)
    stored = {suffix: get(f"{layer.module}.{suffix}") for suffix in code.suffixes}
    whole = {suffix: tensor for suffix, tensor in stored.items() if tensor is not None}
    if not whole:
        return None
    place = f"{bundle.expert_file(expert)}: {layer.module}"
    if len(whole) < len(stored):
        missing = next(suffix for suffix in stored if suffix not in whole)
        raise BundleError(f"{place}: has {next(iter(whole))} but no {missing}; copy the bundle again")
    try:
        code.check(whole, *layer.matrix_shape)
    except ValueError as error:
        raise BundleError(f"{place}: {error}; copy the bundle again") from None
    return whole
