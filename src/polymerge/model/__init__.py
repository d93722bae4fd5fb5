"""The bundle as a torch model in which every row of a batch has its own expert.

assignment.py  which expert speaks for which row
residual.py    the sum y = rho (W̄ x) + B (A x)
linear.py      a linear layer under an assignment
own.py         modules of which experts have their own parameters
moe.py         fused mixture-of-experts blocks
loading.py     from a bundle's files to these modules
mixed.py       the model that a caller sees
triton/        residuals left as they are stored, and a kernel that reads them; imported only when asked for

Layers need torch alone; what reads bundles is imported when it is first used (`benchmarks/gpu.py` runs without).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assignment import Experts as Experts
    from .assignment import RowExpert as RowExpert
    from .loading import load_model as load_model
    from .mixed import MixedModel as MixedModel

_HOME = {"Experts": "assignment", "RowExpert": "assignment", "load_model": "loading", "MixedModel": "mixed"}

__all__ = ["Experts", "MixedModel", "RowExpert", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'polymerge.model' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
