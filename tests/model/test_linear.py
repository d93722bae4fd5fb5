"""How a batch that mixes experts goes through a model's layers: as many steps for many experts as for few, none of
which makes the host wait for a device; and the same answer by every way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from polymerge.model.assignment import Assignment
from polymerge.model.linear import MixedLinear
from polymerge.model.own import OwnNorm

BATCH, MOST = 32, 110
# What reads a number back from the device, or needs to know one to make its output.
WAITS = ("_local_scalar_dense", "item", "nonzero", "unique", "masked_select", "is_nonzero", "equal", "to_list")


class Steps(TorchDispatchMode):
    """The operations that start a kernel, one after the other: no views, and no memory that is only taken."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        returned = func._schema.returns
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in returned)
        if not view and not name.startswith(("empty", "new_empty", "detach")):
            self.names.append(name)
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask or any(name == wait or name.startswith(f"{wait}_") or name == f"_{wait}2" for wait in WAITS):
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


def placed(experts: int, ranks: Sequence[int] = (6,)) -> tuple[Any, Assignment, list[MixedLinear]]:
    """A Llama of two layers whose every matrix and norm has `experts` of its own, with random factors."""
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    state = Assignment([f"e{n}" for n in range(experts)], torch.device("cpu"))
    made = []
    for layer in model.model.layers:
        for number, (name, inner) in enumerate(list(layer.named_modules())):
            if isinstance(inner, nn.Linear):
                weight = inner.weight.data
                factors = [pair(weight, ranks[n % len(ranks)]) for n in range(experts)]
                ratios = [1 + n / 100 for n in range(experts)]
                mixed = MixedLinear(state, weight, None, factors, ratios, [None] * experts)
                mixed.input_of = 0 if name[-6] in "qkv" else 1 if "mlp" in name and "down" not in name else number
                parent, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, mixed)
                made.append(mixed)
            elif hasattr(inner, "variance_epsilon"):
                made_norms = [torch.rand_like(inner.weight) + 0.5 for _ in range(experts)]
                OwnNorm(state, inner, {"weight": made_norms})
    return model, state, made


def pair(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, weight.shape[1]) / 7, torch.randn(weight.shape[0], rank) / 30


@pytest.fixture(params=["padded", "grouped"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What a GPU does: a batch of products, or one kernel for rows of unequal numbers."""
    if request.param == "grouped":
        monkeypatch.setattr("polymerge.model.linear.groups", lambda *args: True)
    yield request.param


def steps_of_a_layer(experts: int, rows: Sequence[Any]) -> Steps:
    """Of the second layer, in a step of one token for every row after a prompt, the first with these experts."""
    model, state, _ = placed(experts)
    ids = torch.arange(2 * len(rows)).view(len(rows), 2) % 90
    with torch.no_grad():
        state.set(None, len(rows))
        cache = model(ids, use_cache=True).past_key_values
        state.set(rows, len(rows))
        steps, layer, forward = Steps(), model.model.layers[1], model.model.layers[1].forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            with steps:
                return forward(*args, **kwargs)

        model(ids[:, :1], past_key_values=cache)
        before = list(steps.names)
        layer.forward = counted
        model(ids[:, :1], past_key_values=cache)
    assert not before and steps.names.count("mm") == 7  # the base's
    return steps


def test_a_layer_starts_as_many_steps_for_64_experts_as_for_3_and_never_waits(way: str) -> None:
    counts = {}
    for experts in (3, 16, 64):
        steps = steps_of_a_layer(experts, [f"e{n % experts}" for n in range(BATCH)])
        assert not steps.waits
        counts[experts] = len(steps.names)
    assert len(set(counts.values())) == 1 and counts[64] <= MOST, counts


@pytest.mark.parametrize(
    "rows", [["e1", None, {"e0": 1.0, "e15": 2.0}, "e0"] * 8, ["e0", "e15"] * 16, [None] * 31 + ["e3"]]
)
def test_neither_do_mixtures_the_average_and_experts_far_apart(way: str, rows: list[Any]) -> None:
    steps = steps_of_a_layer(16, rows)
    assert not steps.waits
    assert len(steps.names) <= MOST


def test_the_first_step_after_rows_change_does_not_wait_either(way: str) -> None:
    model, state, _ = placed(16)
    with torch.no_grad(), Steps() as steps:
        state.set([f"e{n % 16}" for n in range(BATCH)], BATCH)
        model.model.layers[0].mlp(torch.randn(BATCH, 1, 48))
    assert not steps.waits


def test_a_wait_is_seen() -> None:
    x = torch.randn(4)
    with Steps() as steps:
        x[x > 0]
        x.sum().item()
        torch.unique(x)
    assert len(steps.waits) >= 3
    assert "sum" in steps.names


@pytest.mark.parametrize("ranks", [(6,), (5, 6), (1, 9, 0)])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(
    "rows",
    [
        ["e3", "e0", "e1", "e0", "e2", "e5"],
        ["e3", None, {"e0": 1.0, "e4": 3.0}, "e0", {"e1": 1.0, "average": 1.0}, "e5"],
        [None, None, None, None, None, "e4"],
    ],
)
@torch.no_grad()
def test_every_way_gives_the_dense_matrices(
    way: str, ranks: tuple[int, ...], tokens: int, rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, state, layers = placed(6, ranks)
    layer, names = layers[0], [*state.names, "average"]
    x = torch.randn(12, tokens, 48)  # two entries a row, as of beams
    state.set(rows, 6)
    expected = []
    for number in range(12):
        entry = rows[number // 2]
        of = entry if isinstance(entry, dict) else {entry or "average": 1.0}
        weights = [of.get(name, 0.0) / sum(of.values()) for name in names]
        expected.append(F.linear(x[number], layer.dense(weights)))
    torch.testing.assert_close(layer(x), torch.stack(expected), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("polymerge.model.linear.MAX_TOGETHER", 0)
    monkeypatch.setattr("polymerge.model.linear.groups", lambda *args: False)
    state.set(rows, 6)
    torch.testing.assert_close(layer(x), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_ranks_are_made_equal_where_that_is_cheap() -> None:
    equal, unequal = (placed(6, ranks)[2][0] for ranks in ((5, 6), (1, 9, 0)))
    assert equal.rank == 6 and len(equal.stacked_a) == 36
    assert unequal.rank == 0 and len(unequal.stacked_a) == 20 and unequal.places == (0, 1, None, 2, 3, None)


@torch.no_grad()
def test_layers_of_one_input_share_its_rows_and_others_do_not() -> None:
    model, state, _ = placed(6)
    attention = model.model.layers[0].self_attn
    state.set([f"e{n}" for n in range(6)], 6)
    x = torch.randn(6, 1, 48)
    with Steps() as steps:
        together = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        assert steps.names.count("index_select") == 4  # one there, three back
        other = attention.q_proj(x.clone())
    torch.testing.assert_close(other, together[0], atol=0, rtol=0)
    torch.testing.assert_close(attention.q_proj(2 * x), 2 * together[0])
