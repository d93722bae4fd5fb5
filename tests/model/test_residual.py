"""The one sum y = rho (W̄ x) + B (A x), in every dtype and in every layer that uses it.

What holds in 16 bits, and is held here: rho is not lost, alone or in a batch; an output is within the roundings of its
own products of the matrix W = rho W̄ + B A in float32; and a row with others beside it is the row alone, up to the
rounding of its B (A x) and the last bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polymerge import load_model
from polymerge.method.codes import code_of
from polymerge.method.dense import dense
from polymerge.model.assignment import Assignment
from polymerge.model.linear import ExpertLinear, MixedLinear
from polymerge.model.moe import Layout, MixedBlockExperts, SlabResidual
from polymerge.model.residual import Term, add_mixed, add_one, mixed_ratio
from polymerge.model.triton.grouped import add_plain
from polymerge.model.triton.linear import CodedLinear
from tests.conftest import Merged

HALVES = [torch.bfloat16, torch.float16]
# of one rounding, relative
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
RATIOS = [1.0028, 0.9972, 1.0]
NAMES = ["e0", "e1", "e2"]
# every row alone is compared with the same row of these batches
BATCHES: list[list[Any]] = [
    ["e0", "e1", "e2", None],
    ["e0", None, "e1", "e0"],
    [{"e0": 1.0, "e1": 2.0}, "e0", "e1", None],
]
OUT, IN, RANK = 24, 40, 5


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)))


class PlainCoded(CodedLinear):
    """Without the kernel, whatever this machine has."""

    def add_residuals(self, x: Tensor, y: Tensor) -> None:
        add_plain(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.residuals, self.state)


class Case:
    """A layer of three experts and their matrices in float32, made of the numbers that the layer holds."""

    def __init__(self, dtype: torch.dtype, rank: int = RANK, share: float = 0.05, transposed: bool = False) -> None:
        self.weight = (normal(OUT, IN) / IN**0.5).to(dtype)
        if transposed:  # as loading hands a Conv1D's weight on
            self.weight = self.weight.T.contiguous().T
        self.factors = [
            ((normal(rank, IN, seed=n) / IN**0.5).to(dtype), (share * normal(OUT, rank, seed=n)).to(dtype))
            for n in range(3)
        ]
        self.base = self.weight.float()
        self.dense = [
            dense(self.base, r, (b.float(), a.float())) for r, (a, b) in zip(RATIOS, self.factors, strict=True)
        ]
        self.updates = [b.float() @ a.float() for a, b in self.factors]

    def layer(self, state: Assignment, kind: str) -> ExpertLinear:
        if kind == "coded":
            stored = [{"lora_A.weight": a, "lora_B.weight": b} if len(a) else None for a, b in self.factors]
            code = code_of("factors", self.weight.dtype)
            return PlainCoded(state, self.weight, None, stored, code, RATIOS, [None] * 3)
        return MixedLinear(state, self.weight, None, self.factors, RATIOS, [None] * 3)

    def matrix(self, expert: Any) -> Tensor:
        if expert is None:
            return self.base
        if isinstance(expert, dict):
            return sum(w * self.matrix(name) for name, w in expert.items()) / sum(expert.values())  # type: ignore[return-value]
        return self.dense[NAMES.index(expert)]

    def sizes(self, x: Tensor, expert: Any) -> Tensor:
        """Of W̄ x and B (A x), with nothing cancelled: what roundings are counted in. [B, T, out]"""
        x = x.float()
        return F.linear(x, self.base).abs() + max(F.linear(x, u).abs().amax() for u in self.updates)


class BlockCase:
    """A fused block of two block experts whose every matrix has a rho and nothing else."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.inner: Any = nn.Module()
        gate_up, down = normal(2, 2 * OUT, IN) / IN**0.5, normal(2, IN, OUT) / OUT**0.5
        self.inner.gate_up_proj = nn.Parameter(gate_up.to(dtype), requires_grad=False)
        self.inner.down_proj = nn.Parameter(down.to(dtype), requires_grad=False)
        self.inner.act_fn = F.silu

    def layer(self, state: Assignment) -> MixedBlockExperts:
        halves = [SlabResidual(slice(start, start + OUT), [None] * 3, RATIOS) for start in (0, OUT)]
        down = [SlabResidual(slice(0, IN), [None] * 3, RATIOS)]
        slabs = {(name, b): list(r) for b in (0, 1) for name, r in (("gate_up_proj", halves), ("down_proj", down))}
        layout = Layout("gate_up_proj", "down_proj", transposed=False, biases={})
        return MixedBlockExperts(state, self.inner, slabs, layout)

    def expected(self, x: Tensor, index: Tensor, ratio: float) -> Tensor:
        """In float32. x [T, in], index [T, 1] the block expert of every token."""
        gate_up, down = (ratio * p.float()[index[:, 0]] for p in (self.inner.gate_up_proj, self.inner.down_proj))
        gate, up = torch.einsum("toi,ti->to", gate_up, x.float()).chunk(2, dim=1)
        return torch.einsum("toi,ti->to", down, F.silu(gate) * up)


def assigned(experts: Any, rows: int) -> Assignment:
    state = Assignment(NAMES, torch.device("cpu"))
    state.set(experts, rows)
    return state


@pytest.fixture(params=["stacked", "one by one", "coded"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A way through a linear layer."""
    if request.param == "one by one":
        monkeypatch.setattr("polymerge.model.linear.MAX_TOGETHER", 0)
    return str(request.param)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("experts", ["e0", *BATCHES])
def test_rho_is_not_lost_in_16_bits(kind: str, dtype: torch.dtype, rank: int, experts: Any) -> None:
    case = Case(dtype, rank, share=0.0)
    x = normal(4, 50, IN).to(dtype)
    y = case.layer(assigned(experts, 4), kind)(x).float()
    plain = F.linear(x, case.weight).float()
    for row, expert in enumerate([experts] * 4 if experts == "e0" else experts):
        if isinstance(expert, str):
            ratio = RATIOS[NAMES.index(expert)]
            assert torch.equal(y[row], (ratio * plain[row]).to(dtype).float())  # one rounding, of the exact product
            mean = float((y[row] / plain[row]).mean())
            assert abs(mean - ratio) < 1e-3  # the numbers that it rounds to are 0.0078 apart at 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("experts", ["e0", *BATCHES])
def test_an_output_is_the_dense_matrix_s_up_to_its_roundings(
    kind: str, dtype: torch.dtype, experts: Any, transposed: bool
) -> None:
    case = Case(dtype, transposed=transposed)
    x = normal(4, 7, IN).to(dtype)
    y = case.layer(assigned(experts, 4), kind)(x).float()
    for row, expert in enumerate([experts] * 4 if experts == "e0" else experts):
        expected = F.linear(x[row].float(), case.matrix(expert))
        assert ((y[row] - expected).abs() <= 2 * EPS[dtype] * case.sizes(x, expert)[row]).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("experts", BATCHES)
def test_a_row_s_answer_is_its_own(kind: str, dtype: torch.dtype, experts: list[Any], transposed: bool) -> None:
    case = Case(dtype, transposed=transposed)
    x = normal(4, 7, IN).to(dtype)
    state = assigned(experts, 4)
    layer = case.layer(state, kind)
    together = layer(x).float()
    for row, expert in enumerate(experts):
        state.set(expert, 1)
        alone = layer(x[row : row + 1])[0].float()
        update = F.linear(x[row].float(), case.matrix(expert) - case.base).abs()
        # B (A x) is rounded, and where that tips the sum over it is one step of the last bit away: for every expert
        steps = len(expert) if isinstance(expert, dict) else 1
        assert ((together[row] - alone).abs() <= steps * EPS[dtype] * (update + 2 * alone.abs())).all()
        if expert is None:
            assert torch.equal(together[row], alone)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("experts", [["e0"] * 4, *BATCHES])
def test_a_block_of_a_mixture_keeps_rho(dtype: torch.dtype, experts: list[Any]) -> None:
    case, tokens = BlockCase(dtype), 60
    x = normal(4 * tokens, IN).to(dtype)
    index, weights = torch.arange(2).repeat(2 * tokens)[:, None], torch.ones(4 * tokens, 1, dtype=dtype)
    together = case.layer(assigned(experts, 4))(x, index, weights)
    for row, expert in enumerate(experts):
        if not isinstance(expert, str):
            continue
        part = slice(row * tokens, (row + 1) * tokens)
        expected = case.expected(x[part], index[part], RATIOS[NAMES.index(expert)])
        got = together[part].float()
        assert float((got - expected).norm() / expected.norm()) < 2 * EPS[dtype]
        ratio = float((got * expected).sum() / expected.square().sum())
        assert abs(ratio - 1) < 4e-3  # over three matrices; where rho is lost it is 0.0084
        alone = case.layer(assigned(expert, 1))(x[part], index[part], weights[part])
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_a_whole_matrix_of_an_expert_s_own_leaves_nothing_of_the_base(dtype: torch.dtype) -> None:
    base, whole, x = normal(6, OUT).to(dtype), normal(OUT, IN).to(dtype), normal(6, IN).to(dtype)
    residual = SlabResidual(slice(0, OUT), [None] * 3, [1.0] * 3, [None, whole, None])
    rows = assigned(["e1", "e0", None, "e1", "e2", "e1"], 6).weights
    y = base.clone()
    add_mixed(y, mixed_ratio(rows, residual.scales), residual.terms(x, rows, range(3)))
    expected = torch.where((rows[:, 1] == 1)[:, None], F.linear(x, whole), base)
    torch.testing.assert_close(y, expected, atol=1e-5 if dtype == torch.float32 else 0, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("llama", "model.layers.0.self_attn.q_proj"), ("gpt2", "transformer.h.0.attn.c_attn")],
)
@torch.no_grad()
def test_a_bundle_s_layer_in_bfloat16_is_its_reconstruction(merged: Merged, architecture: str, name: str) -> None:
    bundle, _ = merged(architecture, compress_rate=0.6)
    model = load_model(bundle, dtype="bfloat16")
    layer, tensor = model.hf.get_submodule(name), bundle.layers[f"{name}.weight"]
    assert isinstance(layer, MixedLinear)
    x = normal(4, 9, layer.weight.shape[1]).bfloat16()
    experts = ["e1", "e0", None, "e2"]
    with model.assigned(experts, 4):
        together = layer(x).float()
    for row, expert in enumerate(experts):
        with model.assigned(expert, 1):
            alone = layer(x[row : row + 1])[0].float()
        matrix = bundle.reconstruct(expert, tensor.tensor) if expert else bundle.base_tensor(tensor.tensor)
        bias = f"{name}.bias"
        want = F.linear(x[row].float(), matrix.T if tensor.transposed else matrix)
        if bias in bundle.layers:
            want += bundle.reconstruct(expert, bias) if expert else bundle.base_tensor(bias)
        for got in (together[row], alone):
            assert float((got - want).norm() / want.norm()) < 2.0**-7
        assert float((together[row] - alone).norm() / want.norm()) < 2.0**-8


def test_float32_is_the_sum_itself() -> None:
    y, x, a, b = normal(5, OUT), normal(5, IN), normal(RANK, IN), normal(OUT, RANK)
    expected = 1.5 * y.double() + x.double() @ a.double().T @ b.double().T
    one, mixed = y.clone(), y.clone()
    add_one(one, x, a, b, 1.5)
    add_mixed(mixed, torch.full((5, 1), 1.5), [Term(x, a, b)])
    torch.testing.assert_close(one.double(), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(mixed.double(), expected, atol=1e-4, rtol=1e-5)
    part = y.clone()
    rows = torch.tensor([3, 0])
    add_mixed(part, None, [Term(x[rows], a, b, torch.tensor([[0.5], [2.0]]), rows)])
    assert torch.equal(part[[1, 2, 4]], y[[1, 2, 4]])
    torch.testing.assert_close(part[3], y[3] + 0.5 * b @ (a @ x[3]), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(part[0], y[0] + 2.0 * b @ (a @ x[0]), atol=1e-4, rtol=1e-5)


def test_a_row_with_one_expert_has_its_rho_to_the_bit() -> None:
    ratios = torch.tensor([1.0028, 3.3e-3, 77.7, 1.0])
    weights = assigned(["e2", "e0", None, {"e0": 1.0, "e2": 3.0}], 4).weights
    got = mixed_ratio(weights, ratios)[:, 0]
    assert torch.equal(got[:3], ratios[[2, 0, 3]])
    assert float(got[3]) == pytest.approx(0.25 * 1.0028 + 0.75 * 77.7)
