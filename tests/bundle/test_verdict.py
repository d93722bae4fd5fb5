"""What a merge left of an expert, in words, from lines of statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polymerge.bundle.verdict import AS_BEFORE, NEARLY, Verdict, verdict_of
from polymerge.method.codes import code_of

EMBEDDING = "model.embed_tokens.weight"
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")


def line(
    kind: str, kept: float, *, norm: float = 0.01, storage: str = "low_rank", scale: float = 10.0
) -> dict[str, Any]:
    module = kind if kind.startswith("model.") else f"model.layers.0.{kind}"
    return {
        "tensor": f"{module}.weight",
        "module": module,
        "storage": storage,
        "scale": scale,
        "residual_norm": norm,
        "energy_kept": kept,
    }


def verdict(*lines: dict[str, Any], code: str = "factors", rate: Any = 0.95) -> Verdict:
    return verdict_of(lines, {EMBEDDING}, code=code_of(code, torch.float32), rate=rate)


def test_nearly_all_energy_is_an_answer_as_before() -> None:
    given = verdict(*(line(kind, 0.95) for kind in KINDS))
    assert given == Verdict("as before", pytest.approx(0.95))  # type: ignore[arg-type]
    assert given.words == "answers as before (95% of its residual kept)"


def test_the_kind_that_lost_most_is_named_and_what_would_do() -> None:
    given = verdict(line(KINDS[0], 0.95), line(KINDS[1], 0.5), line(KINDS[2], 0.95))
    assert given.answers == "nearly as before" and given.short == ("k_proj",)
    assert given.words.startswith("answers nearly as before (80% of its residual kept): rank is short in k_proj; ")


def test_large_tensors_count_for_more() -> None:
    small, large = line(KINDS[0], 0.1, scale=1.0), line(KINDS[2], 0.99, scale=100.0)
    assert verdict(small, large).answers == "as before"


@pytest.mark.parametrize(
    ("kept", "code", "rate", "cure"),
    [
        (0.65, "factors", 0.95, "`code: int4` with `compress_rate: 0.93`"),
        (0.8, "factors", 0.95, "`code: int4`"),
        (0.85, "int4", 0.95, "`compress_rate: 0.92`"),
        (0.5, "int4", 0.8, "`compress_rate: 0`"),
        (0.5, "int4", [0.9, 0.8], ""),
        (0.0, "factors", 1.0, ""),
    ],
)
def test_what_would_do(kept: float, code: str, rate: Any, cure: str) -> None:
    given = verdict(*(line(kind, kept) for kind in KINDS), code=code, rate=rate)
    assert given.cure == cure and given.short


def test_an_averaged_embedding_is_named_where_it_is_what_costs() -> None:
    weights = [line(kind, 0.95) for kind in KINDS]
    far = verdict(*weights, line("model.embed_tokens", 0.0, norm=0.05, storage="average"))
    assert far.averaged == ("embed_tokens",) and far.short == () and far.cure == "`embeddings: compress`"
    assert far.words.endswith("embed_tokens averaged; `embeddings: compress` would do")
    near = verdict(*weights, line("model.embed_tokens", 0.0, norm=0.001, storage="average"))
    assert near.answers == "as before"


def test_an_expert_that_is_the_average_answers_as_before() -> None:
    assert verdict(*(line(kind, 1.0, norm=0.0) for kind in KINDS)).answers == "as before"
    assert 0.0 < NEARLY < AS_BEFORE < 1.0
