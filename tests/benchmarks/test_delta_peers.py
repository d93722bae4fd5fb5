"""The peers that compress deltas: their arithmetic against oracles, and their bytes against packed arrays."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
import transformers

from peer_methods import apart
from peer_methods.deltacome import delta_come
from peer_methods.deltas import Coded, Delta
from peer_methods.dqrelo import bit_delta, d_qrelo
from peer_methods.gptq import input_moments
from peer_methods.grids import GROUP, grid, packed_bytes, vector_bits
from peer_methods.impart import DROPPED_WHOLE, im_part, shares
from peer_methods.loraquant import lora_quant
from peer_methods.lowrank_delta import split_merge, truncated
from peer_methods.paired import kept
from peer_methods.prinmix import allocated, prin_mix
from peer_methods.rows import ROWS, Ours, Peer, Plain, Run
from peer_methods.sizes import bundle_sizes, in_half
from peer_methods.task import Task
from polymerge import load_model
from polymerge.demo.skills import Skill, SkillExample
from polymerge.method.gptq import Moments, gptq
from polymerge.search.agreement import ExampleAgreement
from tests.conftest import Merged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(out: int = 96, in_: int = 160, rank: int | None = None) -> Delta:
    """A base and a difference whose spectrum falls, seen through inputs that are not alike."""
    n = min(out, in_)
    u, v = torch.linalg.qr(torch.randn(out, n)).Q, torch.linalg.qr(torch.randn(in_, n)).Q
    s = 1 / torch.arange(1, n + 1).float()
    s[rank or n :] = 0
    base, delta = torch.randn(out, in_), (u * s) @ v.T
    x = torch.randn(400, in_) @ torch.diag(torch.linspace(0.2, 2, in_))
    parts = torch.linalg.svd(delta, full_matrices=False)
    return Delta(base + delta, base, *parts, lambda: base + delta / 3, lambda: Moments(x.T @ x / 400))


def lost(coded: Coded, delta: Delta) -> float:
    """Share of the squared difference that is gone."""
    return float((coded.weight - delta.weight).square().sum() / delta.delta.square().sum())


def noticed(coded: Coded, delta: Delta) -> float:
    """The same of the outputs that the inputs give."""
    moments, rest = delta.moments().matrix, coded.weight - delta.weight
    return float(((rest @ moments) * rest).sum() / ((delta.delta @ moments) * delta.delta).sum())


def test_a_grid_rounds_to_the_nearest_of_its_levels() -> None:
    rows, bits = torch.randn(5, 300), torch.tensor([1, 2, 3, 4, 8])
    levels = grid(rows, bits)
    for row, width in enumerate(bits.tolist()):
        codes = torch.arange(2.0**width)[:, None]
        values = (codes - levels.zero[row]) * levels.scale[row]  # [levels, n]
        nearest = (values - rows[row]).abs().amin(0)
        torch.testing.assert_close((levels.round(rows)[row] - rows[row]).abs(), nearest, atol=1e-6, rtol=1e-5)


def test_a_row_without_bits_is_nothing() -> None:
    rows = torch.randn(2, 130)
    rounded = grid(rows, torch.tensor([0, 8])).round(rows)
    assert not rounded[0].any() and (rounded[1] - rows[1]).abs().max() < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [7, 128, 300])
def test_bits_of_a_vector_are_those_of_packed_arrays(bits: int, width: int) -> None:
    groups = -(-width // GROUP)
    levels = np.unpackbits(np.arange(width, dtype=np.uint8)[:, None], axis=1)[:, -bits:]
    zeros = np.zeros((groups, bits), dtype=np.uint8)
    scales = np.unpackbits(np.zeros(groups, dtype=np.float16).view(np.uint8))
    packed = np.packbits(np.concatenate([levels.ravel(), zeros.ravel(), scales]))
    assert packed.nbytes == packed_bytes(vector_bits(width, bits))


def test_gptq_with_inputs_that_are_all_alike_rounds_to_the_nearest() -> None:
    weight = torch.randn(6, 200)
    levels = grid(weight, torch.full((6,), 3))
    torch.testing.assert_close(gptq(weight, Moments(torch.eye(200)), levels), levels.round(weight))


def test_gptq_loses_less_of_the_outputs_and_stays_on_the_grid() -> None:
    weight, mixing = torch.randn(12, 200), torch.randn(200, 200)
    x = torch.randn(1000, 200) @ mixing
    levels = grid(weight, torch.full((12,), 3))
    rounded, nearest = gptq(weight, Moments(x.T @ x / 1000), levels), levels.round(weight)
    assert (x @ (rounded - weight).T).norm() < 0.8 * (x @ (nearest - weight).T).norm()
    torch.testing.assert_close(rounded, levels.round(rounded))


def test_moments_of_inputs_are_those_of_a_plain_forward(task: Task) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(task.base)
    ids = torch.tensor([[5, 9, 13, 7], [3, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    moments = input_moments(model, [(ids[:1], mask[:1]), (ids[1:], mask[1:])])
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids[mask.bool()]))
    first = moments["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(first.matrix, x.T @ x / 6)
    assert first is moments["model.layers.0.self_attn.v_proj.weight"]
    assert set(moments) == set(task.linear())


BUDGETED: list[tuple[Callable[..., Coded], tuple[float, float]]] = [
    *((m, (0.07, 0.12)) for m in (delta_come, prin_mix, d_qrelo, split_merge, truncated, lora_quant)),
    (im_part, (0.04, 0.3)),  # what it draws at random can lose more with a few more bytes
    (partial(im_part, quantised=True), (0.03, 0.05)),  # with four fifths of the vectors dropped it has no use for more
]


@pytest.mark.parametrize(("method", "budgets"), BUDGETED)
def test_more_bytes_are_taken_and_lose_less_and_none_is_over_its_budget(
    method: Callable[..., Coded], budgets: tuple[float, float]
) -> None:
    delta = made()
    whole = 2 * delta.numbers
    small, large = (method(delta, budget=budget) for budget in budgets)
    assert 0.7 * budgets[0] * whole < small.disk <= budgets[0] * whole + 2  # a scalar and a byte that is not full
    assert 0.7 * budgets[1] * whole < large.disk <= budgets[1] * whole + 2
    assert noticed(large, delta) < noticed(small, delta)


@pytest.mark.parametrize("method", [delta_come, prin_mix, truncated, split_merge])
def test_a_difference_of_rank_two_is_kept_to_within_rounding(method: Callable[..., Coded]) -> None:
    delta = made(rank=2)
    assert lost(method(delta, budget=0.2), delta) < 1e-3


def test_d_qrelo_with_room_for_every_rank_is_the_expert() -> None:
    delta = made()
    assert lost(d_qrelo(delta, budget=2.1), delta) < 1e-4 < lost(bit_delta(delta), delta)
    assert bit_delta(delta).disk == 96 * 160 // 8 + 2


def test_the_scalar_of_split_merge_gives_a_residual_its_length_again() -> None:
    delta = made()
    residual = split_merge(delta, budget=0.2).weight - delta.average()
    torch.testing.assert_close(residual.norm(), (delta.weight - delta.average()).norm())


def test_prinmix_allocates_as_an_integer_program_does() -> None:
    costs = torch.tensor([0, 20, 30, 40, 80])
    sizes = torch.rand(12, 1, dtype=torch.float64).sort(dim=0, descending=True).values
    errors = sizes * torch.tensor([1.0, 0.12, 0.04, 0.012, 0.0001])
    budget = 290
    choice = allocated(errors, costs, budget)
    rows = np.kron(np.eye(12), np.ones((1, 5)))  # one width a vector
    constraints = [
        scipy.optimize.LinearConstraint(rows, 1, 1),
        scipy.optimize.LinearConstraint(np.tile(costs.numpy(), 12)[None], 0, budget),
    ]
    best = scipy.optimize.milp(
        errors.flatten().numpy(), integrality=np.ones(60), bounds=scipy.optimize.Bounds(0, 1), constraints=constraints
    )
    reached = float(errors.gather(1, choice[:, None]).sum())
    assert int(costs[choice].sum()) <= budget
    assert best.fun - 1e-9 <= reached < 1.05 * best.fun


@pytest.mark.parametrize("gamma", [0.2, 0.7, 0.95])
def test_impart_drops_so_much_on_average_and_less_of_large_vectors(gamma: float) -> None:
    s = 1 / torch.arange(1, 101).float()
    dropped = shares(s, torch.Size((100, 100)), gamma)
    looked_at = int(100 * (1 - DROPPED_WHOLE) + 1e-9)
    mean = (float(dropped.sum()) + looked_at - len(dropped)) / looked_at
    assert gamma <= mean + 1e-6 < gamma + 1 / looked_at
    assert dropped[0] == 0 and bool((dropped.diff() >= 0).all()) and float(dropped.max()) < 1


def test_nf4_has_the_published_levels_and_takes_the_nearest() -> None:
    # QLoRA, appendix E
    published = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]
    torch.testing.assert_close(apart.nf4_levels(), torch.tensor(published), atol=2e-6, rtol=0)
    delta = made()
    coded = apart.by_nf4(delta)
    blocks = delta.weight.view(-1, 64)
    levels = torch.tensor(published) * blocks.abs().amax(1)[:, None, None]  # [blocks, 1, 16]
    nearest = (levels - blocks[..., None]).abs().amin(-1)
    torch.testing.assert_close((coded.weight.view(-1, 64) - blocks).abs(), nearest, atol=0.02, rtol=0)
    assert coded.disk == delta.numbers // 2 + len(blocks) + 4


def test_llama_cpps_types_take_what_their_blocks_take() -> None:
    weight = torch.randn(4, 64)
    assert apart.llama_cpp(weight, "Q8_0").disk == 8 * 34 and apart.llama_cpp(weight, "Q4_0").disk == 8 * 18
    assert (apart.llama_cpp(weight, "Q8_0").weight - weight).abs().max() < 0.02


def test_gptq_apart_beats_rounding_where_the_inputs_are_known() -> None:
    delta = made()
    coded, levels = apart.by_gptq(delta), grid(delta.weight, torch.full((96,), 4))
    x = torch.linalg.cholesky(delta.moments().matrix).T
    rounded = levels.round(delta.weight)
    assert (x @ (coded.weight - delta.weight).T).norm() < (x @ (rounded - delta.weight).T).norm()
    assert coded.disk == 96 * (160 * 4 + 2 * 20) // 8


def answered(*right: bool, original: bool = True) -> list[ExampleAgreement]:
    return [ExampleAgreement(0.0, 1, 1, yes, original) for yes in right]


def test_what_is_kept_is_paired_with_the_original() -> None:
    by_expert, mean = kept({"a": answered(*[True] * 9, False), "b": answered(*[True] * 10)})
    assert by_expert["a"].share == 0.9 and by_expert["a"].low < 0.9 < by_expert["a"].high
    assert by_expert["b"].share == by_expert["b"].low == by_expert["b"].high == 1.0
    assert mean is not None and mean.share == pytest.approx(0.95)
    assert kept({"c": answered(True, original=False)}) == ({}, None)


@pytest.fixture
def run(task: Task, tmp_path: Path) -> Iterator[Run]:
    examples = (SkillExample("w5 w6", "w7"), SkillExample("w9 w8 w11", "w4 w3"))
    yield Run(task, [Skill(name, examples, examples) for name in task.experts], tmp_path)


def worst(row_measured: dict[str, list[ExampleAgreement]]) -> float:
    return max(abs(e.kl) for examples in row_measured.values() for e in examples)


def test_rows_that_keep_everything_are_the_experts_and_count_every_number(run: Run) -> None:
    whole = Plain("", "own", linear=True).measure(run)
    assert worst(whole[0]) < 1e-5 and whole[1] == in_half(3 * run.one_model)
    full = Peer("", "own", partial(truncated, budget=2.0)).measure(run)
    assert worst(full[0]) < 0.05 < worst(Plain("", "averaged", linear=False).measure(run)[0])
    assert full[1].gguf is None


def test_a_bundles_row_counts_its_files_and_what_the_model_holds(run: Run) -> None:
    recipe = {"compress_rate": 0.5, "code": "int4", "embeddings": "average", "lm_head": "average"}
    measured, sizes = Ours("", "averaged", tuple(recipe.items())).measure(run)
    assert set(measured) == set(run.task.experts)
    assert 2 * run.one_model < sizes.disk < sizes.resident
    assert sizes.gguf is not None and sizes.gguf < 1.05 * sizes.resident


def test_every_row_has_its_place(task: Task) -> None:
    assert len({(row.name, row.tables) for row in ROWS}) == len(ROWS)
    assert {row.tables for row in ROWS} == {"own", "averaged", "compressed"}
    assert isinstance(task.rest("norm"), list)


@pytest.mark.parametrize("method", [*(method for method, _ in BUDGETED), lambda delta, budget: bit_delta(delta)])
def test_an_expert_that_is_the_base_stays_it(method: Callable[..., Coded]) -> None:
    base = torch.randn(96, 160)
    parts = torch.linalg.svd(torch.zeros(96, 160), full_matrices=False)
    same = Delta(base, base, *parts, lambda: base, lambda: Moments(torch.eye(160)))
    coded = method(same, budget=0.2)
    assert torch.isfinite(coded.weight).all() and (coded.weight - base).abs().max() < 1e-6


@pytest.mark.slow
def test_a_method_that_routes_itself_is_measured_and_counted_too(run: Run) -> None:
    row = next(row for row in ROWS if row.name == "SMILE")
    measured, sizes = row.measure(run)
    assert set(measured) == set(run.task.experts) and sizes.gguf is None
    assert sizes.disk == sizes.resident > 2 * run.one_model


def test_tables_of_an_experts_own_are_held_too(merged: Merged) -> None:
    bundle, _ = merged("llama", compress_rate=0.6)
    sizes = bundle_sizes(bundle, load_model(bundle, device="cpu"), own_tables=True)
    assert sizes.resident == pytest.approx(sizes.disk, rel=0.03) and sizes.gguf is None
