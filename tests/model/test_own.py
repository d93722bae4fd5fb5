"""Modules with parameters of an expert's own, alone and inside each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from polymerge.model.assignment import Assignment
from polymerge.model.own import OwnModule, OwnNorm, OwnTensor

ROWS = ["b", "a", None, "b"]


def state_of(rows: list[Any]) -> Assignment:
    state = Assignment(["a", "b"], torch.device("cpu"))
    state.set(rows, len(rows))
    return state


class Scaled(nn.Module):
    """Reads another module's parameter, and runs one that has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.read = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.read.weight


def test_own_modules_inside_each_other_give_what_each_expert_gives_alone() -> None:
    torch.manual_seed(0)
    module, x = Scaled(), torch.randn(4, 5, 3)
    plain = Scaled()
    plain.load_state_dict(module.state_dict())
    weights = {name: [torch.randn(3, 3) for _ in range(2)] for name in ("inner.weight", "read.weight")}
    state = state_of(ROWS)
    inside, around = OwnModule(state, module.inner), OwnModule(state, module)
    inside.tensors.append(OwnTensor(module.inner, "weight", list(weights["inner.weight"])))
    around.tensors.append(OwnTensor(module.read, "weight", list(weights["read.weight"])))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    got = module(x)
    for row, expert in enumerate(ROWS):
        number = None if expert is None else "ab".index(expert)
        changed = {} if number is None else {name: values[number] for name, values in weights.items()}
        torch.testing.assert_close(got[row], functional_call(plain, changed, (x[row : row + 1],))[0])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert state.rows == 4 and len(state.groups) == 3  # as before


def test_a_mixture_has_the_mean_of_the_weights_and_a_table_stays() -> None:
    module = nn.BatchNorm1d(2)
    weight = OwnTensor(module, "weight", [torch.tensor([1.0, 2.0]), None])
    assert weight.of((0.25, 0.0, 0.75)).tolist() == [1.0, 1.25]
    assert weight.of((0.0, 1.0, 0.0)).tolist() == [1.0, 1.0]
    table = OwnTensor(module, "num_batches_tracked", [torch.tensor(0), torch.tensor(0)])
    assert int(table.of((0.3, 0.3, 0.4))) == 0


class OnePlus(nn.LayerNorm):
    """A layer norm with arithmetic of its own, as Nemotron's."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


@pytest.mark.parametrize(("norm", "fits"), [(nn.LayerNorm(4), True), (OnePlus(4), False), (nn.RMSNorm(4), False)])
def test_a_norm_is_tried_before_its_weight_follows_the_rows(norm: nn.Module, fits: bool) -> None:
    assert OwnNorm.fits(norm) is fits


def test_a_norms_rows_are_each_experts() -> None:
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(4), torch.randn(4, 2, 4)
    weights: dict[str, list[Tensor | None]] = {
        "weight": [torch.randn(4), torch.randn(4)],
        "bias": [None, torch.randn(4)],
    }
    expected = []
    for row, expert in enumerate(ROWS):
        values = {n: v["ab".index(expert)] for n, v in weights.items()} if expert else {}
        changed = {name: value for name, value in values.items() if value is not None}
        expected.append(functional_call(norm, changed, (x[row],)))
    OwnNorm(state_of(ROWS), norm, weights)
    torch.testing.assert_close(norm(x), torch.stack(expected))
