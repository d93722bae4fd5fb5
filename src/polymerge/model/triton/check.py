"""Whether the kernel of kernel.py may be used here: it is run on random factors and held against the plain sum."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec

import torch
from torch import Tensor

from ...host import dtype_name
from ...method.code import Code
from ..assignment import Assignment
from .grouped import Residuals, add_plain, tiles_of

# The largest error that is taken for rounding, in units of a row's root mean square.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Three experts: more components than one step of the kernel takes, none, and a few.
RANKS = (35, 0, 3)
RATIOS = (0.5, 2.0, 1.0)
ROWS = ["e2", "e0", None, "e1", "e0"]
# Tokens a row: as when decoding, one tile, and more than one.
TOKENS = (1, 20, 40)


def objection(shapes: Collection[tuple[int, int]], code: Code, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot be used, or None. Costs some products of thin matrices, and a compilation for every shape.

    Args:
        shapes: (out, in) of the layers with residuals.
        dtype: what the model computes in.
    """
    if not shapes:
        return "the bundle holds no factors"
    if code.kernel_bits is None:
        return f"it does not read the code {code.name!r}"
    if dtype not in TOLERANCES:
        return f"it does not compute in {dtype_name(dtype)}"
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        from .kernel import runs_on

        if not runs_on(device):
            return f"it runs on a GPU, not on {device}"
        for shape in sorted(set(shapes)):
            worst = max(largest_error(shape, code, device, dtype, tokens) for tokens in TOKENS)
            if not worst <= TOLERANCES[dtype]:  # not a number, too
                return f"for a matrix of {list(shape)} it is {worst:.2g} away from the plain path"
    except Exception as error:  # a compiler and a driver raise what they like
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def largest_error(shape: tuple[int, int], code: Code, device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """Between the kernel and the plain sum in float32, over a batch of all experts and the average."""
    from .kernel import add_fused, decoded

    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    out_features, in_features = shape
    stored = [
        code.encode(normal(out_features, r) / r**0.5, normal(r, in_features) / in_features**0.5) if r else None
        for r in RANKS
    ]
    residuals = Residuals(stored, code, shape, RATIOS).to(device)
    state = Assignment([f"e{n}" for n in range(len(RANKS))], device)
    state.set(ROWS, len(ROWS))
    x = normal(len(ROWS) * tokens, in_features).to(device, dtype)
    y = normal(len(ROWS) * tokens, out_features).to(device, dtype)
    tiles = tiles_of(state, x)
    assert tiles is not None
    expected = y.to(torch.float32, copy=True)
    add_plain(expected, x.float(), residuals, state)
    if tiles.short:
        add_fused(y, x, residuals, tiles)
    else:
        add_plain(y, x, residuals, state, decoded)
    return float(((y.float() - expected) / expected.square().mean(-1, keepdim=True).sqrt()).abs().max())
