"""A linear layer that holds its residuals as they are stored, and decodes them whenever it is run.

A step of few tokens an expert is the kernel's of kernel.py, where it may be used; else one expert's factors after the
other's are decoded into memory that is free again at once, and multiplied by torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ...method.code import Code
from ..assignment import Assignment
from ..linear import ExpertLinear, shape_of
from .grouped import Residuals, add_plain, tiles_of


class CodedLinear(ExpertLinear):
    """Arguments as ExpertLinear's, and:

    Args:
        stored: for every expert its residual's tensors by the code's suffixes, or None.
        ratios: rho of every expert.
        fused: whether the kernels were tried and may be used.
    """

    def __init__(
        self,
        state: Assignment,
        base: Tensor | nn.Module,
        bias: Tensor | None,
        stored: Sequence[Mapping[str, Tensor] | None],
        code: Code,
        ratios: Sequence[float],
        biases: Sequence[Tensor | None],
        *,
        fused: bool = False,
    ) -> None:
        super().__init__(state, base, bias, biases)
        self.fused = fused
        self.residuals = Residuals(stored, code, shape_of(base), ratios)

    def add_residuals(self, x: Tensor, y: Tensor) -> None:
        """Takes mixtures of experts, too."""
        flat_x, flat_y = x.reshape(-1, x.shape[-1]).contiguous(), y.view(-1, y.shape[-1])
        if not self.fused:
            add_plain(flat_y, flat_x, self.residuals, self.state)
            return
        from .kernel import add_fused, decoded

        tiles = tiles_of(self.state, x)
        if tiles is not None and tiles.short:
            add_fused(flat_y, flat_x, self.residuals, tiles)
        else:
            add_plain(flat_y, flat_x, self.residuals, self.state, decoded)
