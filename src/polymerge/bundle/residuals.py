"""An expert's residual in one layer, as its file holds it: whole, in the code's shapes, decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from ..errors import BundleError
from .folder import BundleFolder
from .layer import BundleLayer

# Those of the keys (without PEFT's prefix) that an expert's file has.
Those = Callable[[Iterable[str]], dict[str, Tensor]]


def popped(tensors: dict[str, Tensor]) -> Those:
    """Takes them out of what is read already."""
    return lambda keys: {key: tensors.pop(key) for key in keys if key in tensors}


def factors_of(bundle: BundleFolder, expert: str, layer: BundleLayer, those: Those) -> tuple[Tensor, Tensor] | None:
    """B [out, r] and A [r, in] of a residual in float32, decoded; None where the expert has none in this layer.

    Takes the arguments of `coded_factors`, and raises as it does.
    """
    stored = coded_factors(bundle, expert, layer, those)
    if not stored:
        return None
    try:
        return bundle.code_of(expert, layer).decode(stored, *layer.matrix_shape)
    except ValueError as error:
        raise BundleError(f"{bundle.expert_file(expert)}: {layer.module}: {error}; copy the bundle again") from None


def coded_factors(bundle: BundleFolder, expert: str, layer: BundleLayer, those: Those) -> dict[str, Tensor] | None:
    """A residual's tensors as stored, by the code's suffixes; None where the expert has none in this layer.

    Raises:
        BundleError: only some of the residual's tensors are there, or one has not the code's shape.
    """
    code = bundle.code_of(expert, layer)
    keys = {suffix: f"{layer.module}.{suffix}" for suffix in code.suffixes}
    stored = those(keys.values())
    if not stored:
        return None
    whole = {suffix: stored[key] for suffix, key in keys.items() if key in stored}
    place = f"{bundle.expert_file(expert)}: {layer.module}"
    if len(whole) < len(keys):
        missing = next(suffix for suffix in keys if suffix not in whole)
        raise BundleError(f"{place}: has {next(iter(whole))} but no {missing}; copy the bundle again")
    try:
        code.check(whole, *layer.matrix_shape)
    except ValueError as error:
        raise BundleError(f"{place}: {error}; copy the bundle again") from None
    return whole
