"""The arithmetic of one tensor: against float64, an SVD by LAPACK, and averages and ratios taken by hand."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polymerge.bundle import files
from polymerge.bundle.files import Rows, chunks_of
from polymerge.bundle.stats import StatsLine
from polymerge.errors import SourceError
from polymerge.merging.compress import Settings, TensorReport, compress_tensor
from polymerge.merging.measure import frobenius_norm
from polymerge.merging.treatment import TensorTask
from polymerge.method.codes import code_of
from polymerge.method.weights import Side, Weights
from polymerge.sources.layers import LayerRecord

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(
    dtype=torch.float32,
    code=code_of("factors", torch.float32),
    device=torch.device("cpu"),
    per_expert_scale=True,
    seed=0,
    n_oversamples=16,
    n_iter=6,
)
A, B = "m.lora_A.weight", "m.lora_B.weight"


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e-8, 1.0, 1e8, 1e25])
@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (500, 3), (200, 300)])
def test_the_norm_is_float64s_to_float32_rounding(shape: tuple[int, int], scale: float) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    for given in (matrix, matrix.T):
        assert frobenius_norm(given) == pytest.approx(float(matrix.double().norm()), rel=1e-6)
    assert frobenius_norm(torch.zeros(shape)) == 0.0


class Emitted(dict[tuple[str | None, str], Tensor]):
    """(owner, key) -> tensor; what is stored once is given once."""

    def emit(self, owner: str | None, key: str, tensor: Tensor | Rows) -> None:
        assert (owner, key) not in self
        data = bytearray(b"".join(chunks_of(tensor)))  # as it would be written
        self[owner, key] = torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape)


def compressed(
    weights: Mapping[str, Tensor], treatment: Any = "low_rank", rank: int = 4, **changes: Any
) -> tuple[Emitted, TensorReport]:
    """One tensor of these experts, done."""
    settings = {name: changes.pop(name) for name in list(changes) if name in Settings.__dataclass_fields__}
    counts = changes.pop("counts", {})
    record = {"role": "linear", **changes}
    as_difference = record.pop("as_difference", False)
    parameter = record.pop("parameter", "weight")
    first = next(iter(weights.values()))
    task = TensorTask(
        LayerRecord(f"m.{parameter}", "m", parameter, **record),
        tuple(first.shape),
        treatment,
        rank,
        {name: f"of-{name}" for name in weights},
        as_difference,
    )

    def read(expert: str, tensor: str, start: int, stop: int) -> Tensor:
        assert tensor == f"of-{expert}"
        return weights[expert][start:stop] if weights[expert].dim() else weights[expert]

    emitted = Emitted()
    return emitted, compress_tensor(task, replace(SETTINGS, **settings), read, emitted.emit, counts)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def three(*shape: int, spread: float = 0.3) -> dict[str, Tensor]:
    """Near one another and of different sizes."""
    base = normal(*shape, seed=0)
    sizes = {"a": 1.0, "b": 1.3, "c": 0.6}
    return {name: size * (base + spread * normal(*shape, seed=n)) for n, (name, size) in enumerate(sizes.items(), 1)}


def by_hand(weights: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float], float]:
    """W̄ = s̄ (1/N) sum of W_i / s_i, rho_i = s_i / s̄, and s̄, in float64."""
    sizes = {name: float(weight.double().norm()) for name, weight in weights.items()}
    mean = sum(sizes.values()) / len(sizes)
    total = sum((weights[name].double() / sizes[name] for name in weights), torch.zeros(()).double())
    return mean * total / len(sizes), {name: size / mean for name, size in sizes.items()}, mean


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_average_and_the_ratios_are_the_methods(shape: tuple[int, int]) -> None:
    weights = three(*shape)
    emitted, report = compressed(weights)
    average, ratios, mean = by_hand(weights)
    torch.testing.assert_close(emitted[None, "m.weight"].double(), average, rtol=1e-6, atol=1e-7)
    assert report.scales == pytest.approx(ratios, rel=1e-6)
    assert [line.expert for line in report.stats] == ["a", "b", "c"]
    for line in report.stats:
        assert line.mean_scale == pytest.approx(mean, rel=1e-6)
        assert line.scale == pytest.approx(ratios[line.expert] * mean, rel=1e-6)
        assert line.scale_ratio == report.scales[line.expert]


def test_three_matrices_of_one_number_by_hand() -> None:
    """s = 3, 1, 2, s̄ = 2; W / s = 1, -1, 1, so W̄ = 2/3; rho = 3/2, 1/2, 1; the residuals are 2, -4/3, 4/3."""
    weights = {"a": torch.tensor([[3.0]]), "b": torch.tensor([[-1.0]]), "c": torch.tensor([[2.0]])}
    emitted, report = compressed(weights, rank=1)
    assert emitted[None, "m.weight"].item() == pytest.approx(2 / 3)
    assert report.scales == pytest.approx({"a": 1.5, "b": 0.5, "c": 1.0})
    for name, residual in (("a", 2.0), ("b", -4 / 3), ("c", 4 / 3)):
        assert (emitted[name, B] @ emitted[name, A]).item() == pytest.approx(residual)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_as_near_as_an_svd_allows(dtype: torch.dtype, transposed: bool) -> None:
    """Against the average as stored: what the base lost in rounding, the residual has."""
    weights, rank = three(30, 50), 6
    code = code_of("factors", torch.float32)
    emitted, report = compressed(weights, rank=rank, dtype=dtype, code=code, transposed=transposed)
    base = emitted[None, "m.weight"]
    assert base.dtype == dtype
    for line in report.stats:
        weight = weights[line.expert].double()
        residual = weight - line.scale_ratio * base.double()
        u, s, v = torch.linalg.svd(residual.T if transposed else residual, full_matrices=False)
        best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
        b, a = emitted[line.expert, B].double(), emitted[line.expert, A].double()
        assert b.shape == (best.shape[0], rank) and a.shape == (rank, best.shape[1])
        torch.testing.assert_close(b @ a, best, rtol=0, atol=2e-3 * float(s[0]))
        lost = float(s[rank:].norm())
        assert line.relative_error == pytest.approx(lost / float(weight.norm()), rel=1e-4)
        assert line.residual_norm == pytest.approx(float(residual.norm() / weight.norm()), rel=1e-5)
        assert line.energy_kept == pytest.approx(1 - (lost / float(residual.norm())) ** 2, rel=1e-4)
        assert line.shape == ((50, 30) if transposed else (30, 50))
        assert line.seconds is not None and line.seconds >= 0


def test_a_coded_residual_is_measured_as_it_will_be_read() -> None:
    weights = three(48, 64)
    code = code_of("int4", torch.float32)
    emitted, report = compressed(weights, rank=8, code=code)
    for line in report.stats:
        b, a = code.decode({suffix: emitted[line.expert, f"m.{suffix}"] for suffix in code.suffixes}, 48, 64)
        rebuilt = line.scale_ratio * emitted[None, "m.weight"] + b @ a
        weight = weights[line.expert]
        assert line.relative_error == pytest.approx(float((weight - rebuilt).norm() / weight.norm()), rel=1e-4)


def test_with_a_shared_scale_all_ratios_are_one_and_the_average_is_the_same() -> None:
    weights = three(24, 40)
    apart, _ = compressed(weights)
    shared, report = compressed(weights, per_expert_scale=False)
    assert report.scales == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert torch.equal(shared[None, "m.weight"], apart[None, "m.weight"])
    residual = weights["a"].double() - shared[None, "m.weight"].double()
    lost = residual - shared["a", B].double() @ shared["a", A].double()
    assert float(lost.norm()) == pytest.approx(float(torch.linalg.svdvals(residual)[4:].norm()), rel=1e-3)


def test_full_storage_is_the_experts_own_matrix_and_has_no_ratio() -> None:
    weights = three(24, 40)
    emitted, report = compressed(weights, "full", 0)
    for name, weight in weights.items():
        assert torch.equal(emitted[name, "m.weight"], weight)
    assert not report.scales
    assert [line.relative_error for line in report.stats] == [0.0] * 3
    assert [line.energy_kept for line in report.stats] == [1.0] * 3


def test_without_rank_only_the_scaled_average_is_left() -> None:
    weights = three(24, 40)
    emitted, report = compressed(weights, "average", 0)
    assert list(emitted) == [(None, "m.weight")]
    for line in report.stats:
        left = weights[line.expert].double() - line.scale_ratio * emitted[None, "m.weight"].double()
        assert line.relative_error == pytest.approx(float(left.norm() / weights[line.expert].double().norm()), rel=1e-5)
        assert line.relative_error == line.residual_norm and line.energy_kept == 0.0


def test_what_all_share_is_stored_once_and_exactly() -> None:
    weight = normal(24, 40, seed=3)
    emitted, report = compressed({"a": weight, "b": weight.clone()})
    assert list(emitted) == [(None, "m.weight")] and torch.equal(emitted[None, "m.weight"], weight)
    assert report.scales == {"a": 1.0, "b": 1.0}
    assert [(line.rank, line.storage, line.relative_error) for line in report.stats] == [(0, "average", 0.0)] * 2


def test_a_matrix_of_zeros_is_an_expert_like_any_other() -> None:
    weights = {"a": torch.zeros(24, 40), "b": normal(24, 40, seed=1)}
    emitted, report = compressed(weights, rank=24)
    average, ratios, _ = by_hand({"b": weights["b"]})
    torch.testing.assert_close(emitted[None, "m.weight"].double(), average / 4, rtol=1e-5, atol=1e-6)  # s̄ / 2, mean / 2
    assert report.scales == {"a": 0.0, "b": 2.0} and ratios == {"b": 1.0}
    assert [key for owner, key in emitted if owner == "a"] == []  # nothing is left beyond 0 times the average
    _, none = compressed({"a": torch.zeros(3, 4), "b": -torch.zeros(3, 4)}, rank=1)
    assert none.scales == {"a": 1.0, "b": 1.0}
    assert all(line.relative_error == 0.0 and math.isfinite(line.energy_kept) for line in none.stats)


@pytest.mark.parametrize("slab", [1, 7, 1000])
def test_kept_tensors_are_averaged_and_every_experts_own_is_there(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SLAB_NUMEL", slab)
    weights = three(10, 6)
    emitted, report = compressed(weights, "keep", 0, role="embedding")
    mean = sum(weight.double() for weight in weights.values()) / 3
    torch.testing.assert_close(emitted[None, "m.weight"].double(), mean, rtol=1e-6, atol=1e-7)
    for name, weight in weights.items():
        assert torch.equal(emitted[name, "m.weight"], weight)
        assert report.digests[name] == hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    assert not report.stats and not report.scales
    averaged, _ = compressed(weights, "average", 0, role="embedding")
    assert list(averaged) == [(None, "m.weight")]
    assert torch.equal(averaged[None, "m.weight"], emitted[None, "m.weight"])


def test_equal_kept_tensors_are_stored_once_to_the_last_bit() -> None:
    weight = normal(7, seed=5) / 3
    emitted, _ = compressed(dict.fromkeys("abc", weight), "keep", 0, role="norm")
    assert list(emitted) == [(None, "m.weight")] and torch.equal(emitted[None, "m.weight"], weight)


def test_the_bias_of_a_compressed_layer_travels_as_a_difference() -> None:
    weights = three(9)
    emitted, _ = compressed(weights, "keep", 0, role="bias", parameter="bias", as_difference=True, dtype=torch.bfloat16)
    base = emitted[None, "m.bias"]
    assert base.dtype == torch.bfloat16
    for name, weight in weights.items():
        assert emitted[name, "m.lora_B.bias"].dtype == torch.float32
        torch.testing.assert_close(base.float() + emitted[name, "m.lora_B.bias"], weight, rtol=0, atol=1e-7)


def test_a_number_without_dimensions_is_kept() -> None:
    weights = {"a": torch.tensor(1.5), "b": torch.tensor(2.5)}
    emitted, _ = compressed(weights, "keep", 0, role="other")
    assert emitted[None, "m.weight"].shape == () and emitted[None, "m.weight"].item() == 2.0
    assert emitted["b", "m.weight"].shape == () and emitted["b", "m.weight"].item() == 2.5


def test_an_unknown_tensor_is_copied_in_its_own_type_and_must_agree() -> None:
    numbers = torch.arange(6)
    emitted, report = compressed({"a": numbers, "b": numbers.to(torch.int32)}, "copy", 0, role="other", known=False)
    assert list(emitted) == [(None, "m.weight")] and torch.equal(emitted[None, "m.weight"], numbers)
    assert report.digests["a"] != report.digests["b"]
    with pytest.raises(SourceError, match=r"expert 'b': tensor 'of-b' is unknown .* differs"):
        compressed({"a": numbers, "b": numbers + 1}, "copy", 0, role="other", known=False)


@pytest.mark.parametrize("treatment", ["low_rank", "full", "keep"])
@pytest.mark.parametrize(("value", "said"), [(math.nan, "1 NaN or infinite"), (-math.inf, "1 NaN"), (1e6, "float16")])
def test_values_that_the_bundle_cannot_hold_are_refused(treatment: str, value: float, said: str) -> None:
    weights = three(10, 6)
    weights["c"][3, 3] = value
    role = "embedding" if treatment == "keep" else "linear"
    with pytest.raises(SourceError, match=f"expert 'c': tensor 'of-c' .*{said}"):
        compressed(weights, treatment, 2, role=role, dtype=torch.float16)


def test_the_sources_are_not_changed() -> None:
    weights = three(24, 40)
    before = {name: weight.clone() for name, weight in weights.items()}
    tasks = [("low_rank", "linear"), ("full", "linear"), ("average", "linear"), ("keep", "embedding")]
    for treatment, role in tasks:
        compressed(weights, treatment, 4 if treatment == "low_rank" else 0, role=role)
        assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_the_sketch_depends_on_names_and_seed_alone() -> None:
    weights = three(24, 40)
    one, _ = compressed(weights)
    again, _ = compressed(weights)
    other, _ = compressed(weights, seed=1)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["a", A], other["a", A])


def test_a_line_of_the_statistics_is_plain_data() -> None:
    line = StatsLine("t", "e", "m", (2, 3), 1, "low_rank", 1.0, 2.0, 0.5, 0.1, 0.9, 0.01, None)
    assert list(line.to_json()) == [
        "tensor", "expert", "module", "shape", "rank", "storage", "scale", "mean_scale", "scale_ratio",
        "residual_norm", "energy_kept", "relative_error", "seconds",
    ]  # fmt: skip


def test_a_table_is_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert's own, and they differ: read, averaged and given away some rows at a time."""
    monkeypatch.setattr(files, "SLAB_NUMEL", 30)
    weights = {name: torch.full((100, 6), float(n)) for n, name in enumerate("ab")}
    record = LayerRecord("m.weight", "m", "weight", "embedding", False)
    task = TensorTask(record, (100, 6), "keep", 0, {name: name for name in weights})
    seen: list[tuple[str | None, list[int]]] = []

    def read(expert: str, tensor: str, start: int, stop: int) -> Tensor:
        assert stop - start <= 5
        return weights[expert][start:stop]

    def emit(owner: str | None, key: str, tensor: Tensor | Rows) -> None:
        assert isinstance(tensor, Rows)
        seen.append((owner, [part.shape[0] for part in tensor.parts]))

    compress_tensor(task, SETTINGS, read, emit)
    assert seen == [(owner, [5] * 20) for owner in (None, "a", "b")]


def counting(experts: Mapping[str, Tensor], outputs: int = 3) -> dict[str, Weights]:
    """Of every expert's residual a few directions count for nearly all."""
    rows, columns = next(iter(experts.values())).shape
    fall = torch.logspace(0, -3 if outputs < rows else -1, columns)
    return {
        name: Weights(Side(normal(200, columns, seed=n) * fall), Side(normal(outputs, rows, seed=n + 9)))
        for n, name in enumerate(experts)
    }


@pytest.mark.parametrize("code", ["factors", "int4"])
def test_a_residual_that_fits_its_rank_is_stored_as_ever(code: str) -> None:
    """Nothing is weighed where nothing is lost."""
    base = normal(60, 40, seed=0)
    base[-6:] = 0
    experts = {}
    for number, name in enumerate("abc"):
        own = torch.zeros_like(base)
        own[-6:] = normal(6, 2, seed=number + 1) @ normal(2, 40, seed=number + 5)
        experts[name] = base + own / own.norm()
    given: dict[str, Any] = {"rank": 12, "code": code_of(code, torch.float32)}
    plain, weighted = compressed(experts, **given), compressed(experts, **given, counts=counting(experts))
    assert plain[0].keys() == weighted[0].keys()
    assert all(torch.equal(plain[0][key], weighted[0][key]) for key in plain[0])
    assert all(line.rank <= 6 and line.relative_error < 1e-4 for line in weighted[1].stats if code == "factors")


def test_weights_that_bring_an_expert_no_nearer_are_passed_over() -> None:
    experts = three(60, 40)
    counts = counting(experts)
    nearer = compressed(experts, rank=1, counts=counts)[1].stats
    assert all(line.relative_error < line.residual_norm for line in nearer)
    assert compressed(experts, rank=4, counts={"b": counts["b"]})[0].keys() == compressed(experts, rank=4)[0].keys()


def test_what_counts_for_one_expert_changes_no_other() -> None:
    experts = three(60, 40)
    counts = {"b": counting(experts, outputs=200)["b"]}
    plain, weighted = compressed(experts)[0], compressed(experts, counts=counts)[0]
    same = {owner for owner, key in plain if torch.equal(plain[owner, key], weighted[owner, key])}
    assert same == {None, "a", "c"}
