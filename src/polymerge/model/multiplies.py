"""Whether a module multiplies and does nothing else. Knows one module; does not know how it is used."""

from __future__ import annotations

import torch
from torch import nn

from .quantised import is_quantised


def multiplies(inner: nn.Module) -> bool:
    """Tries whether a module gives the product with its weight, and its bias, and nothing else."""
    from transformers.pytorch_utils import Conv1D

    if type(inner) in (nn.Linear, Conv1D):
        return True
    if not isinstance(inner, nn.Linear):
        return False
    weight, bias = inner.get_parameter("weight"), getattr(inner, "bias", None)
    if is_quantised(weight):
        return True
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            return torch.allclose(inner(x), nn.functional.linear(x, weight, bias), rtol=1e-3, atol=1e-3)
    except Exception:  # it wants something else
        return False
