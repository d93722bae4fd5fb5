"""How the factors of linear layers are held in memory: decoded, or packed as they are stored.

Whoever loads asks here, and whoever says beforehand what that will take. Knows what a plan knows too; what only the
weights say, or a run of the model, is added in `polymerge.model.placing`.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Literal, get_args

from ..errors import ModelError
from ..method.code import Code
from ..recipe.merge import BaseKind

Held = Literal["decoded", "packed"]


def held_as(name: str) -> str:
    """A way to hold residuals by its name. Raises ModelError for an unknown one."""
    if name not in get_args(Held):
        raise ModelError(f"residuals: {name!r} is neither {' nor '.join(get_args(Held))}")
    return name


def stays_packed(residuals: str, code: Code) -> bool:
    """Whether factors in this code may stay as they are stored; an entropy coder's are decoded all the same."""
    return held_as(residuals) == "packed" and code.kernel_bits is not None


def layer_stays_packed(module: str, base: BaseKind, modules: Container[str], orders: Container[str]) -> bool:
    """Whether a linear layer's may: those inside fused blocks are decoded, and those of which a row has more than one
    expert's own, as the average has over the model under adapters.

    Args:
        modules: names of the model's.
        orders: parameters whose rows a checkpoint stores in another order.
    """
    return module in modules and f"{module}.weight" not in orders and base == "average"
