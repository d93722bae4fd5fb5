"""A linear layer that holds its residuals as they are stored and adds them with the kernel of kernel.py."""

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
    ) -> None:
        super().__init__(state, base, bias, biases)
        self.residuals = Residuals(stored, code, shape_of(base), ratios)

    def add_residuals(self, x: Tensor, y: Tensor) -> None:
        """With the kernel; in torch's own operations where a row is a mixture of experts."""
        from .kernel import add_fused, runs_on

        flat_x, flat_y = x.reshape(-1, x.shape[-1]).contiguous(), y.view(-1, y.shape[-1])
        tiles = tiles_of(self.state, x) if runs_on(x.device) else None
        if tiles is None:
            add_plain(flat_y, flat_x, self.residuals, self.state)
        else:
            add_fused(flat_y, flat_x, self.residuals, tiles)
