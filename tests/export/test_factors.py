"""Factors of an exported adapter, against the dense matrices that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polymerge import Bundle, merge, quantize_bundle
from polymerge.export import plan_vllm
from polymerge.export.factors import NEXT_TO_NOTHING, FactorMaker
from tests.tiny import make_experts, tiny_tokenizer


def bundle_of(folder: Path, architecture: str, **recipe: Any) -> Bundle:
    experts = make_experts(architecture, folder / "experts", spread=0.02)
    for path in experts.values():
        tiny_tokenizer().save_pretrained(path)
    sources = {name: str(path) for name, path in experts.items()}
    tables = {"embeddings": "compress", "lm_head": "compress"}
    return merge({"experts": sources, "compress_rate": 0.6, "code": "factors", **tables, **recipe}, folder / "bundle")


@pytest.mark.parametrize(
    ("architecture", "base", "recipe"),
    [
        ("llama", None, {}),
        ("llama-tied", None, {"norms": "average"}),
        ("gpt2", None, {}),  # matrices are stored the other way round
        ("llama", "int8", {"dtype": "bfloat16"}),  # served in 16 bits, which round what is stored
        ("llama", None, {"dtype": "bfloat16", "code": "int4"}),
    ],
)
def test_what_the_factors_leave_is_what_the_experts_matrix_has_beside_them(
    tmp_path: Path, architecture: str, base: str | None, recipe: dict[str, Any]
) -> None:
    """W_i diag(ratio) - W̄ - B A, made of the whole matrices."""
    bundle = bundle_of(tmp_path, architecture, **recipe)
    if base:
        bundle = quantize_bundle(bundle, tmp_path / "small", base=base, device="cpu").bundle
    plan = plan_vllm(bundle)
    maker = FactorMaker(bundle, plan.norms, torch.device("cpu"), torch.bfloat16 if base else torch.float32)
    reader = bundle.expert_reader("e1")
    tasks = [task for task in plan.experts["e1"] if reader.factors(task.layer.tensor)]
    assert len(tasks) >= 8
    for task in tasks:
        factors = reader.factors(task.layer.tensor)
        assert factors
        b, a = factors
        said = (b @ a).T if task.embedding else b @ a
        ratio = maker._ratio(task.norm, "e1", reader) if task.norm else None
        whole = maker._target(task, reader, ratio) - said
        left = maker._unsaid(task, reader, ratio, b, a)
        assert left.shape == task.shape
        torch.testing.assert_close(left, whole, atol=1e-6, rtol=1e-4)
        assert task.norm is None or float(left.abs().max()) > 1e-4


def test_next_to_nothing_beside_an_experts_factors_is_left_out_and_no_more(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, "llama")
    maker = FactorMaker(bundle, {}, torch.device("cpu"), torch.float32)
    b, a, size = torch.randn(48, 6), torch.randn(6, 40), torch.rand(40) + 0.1
    left = torch.randn(48, 40)
    left *= (b @ a * size).norm() / (left * size).norm()
    for share, kept in ((0.9 * NEXT_TO_NOTHING, False), (1.1 * NEXT_TO_NOTHING, True)):
        more_b, more_a = maker._folded(left * share, 40, size, (b, a))
        assert more_b.shape == (48, 40) and more_a.shape == (40, 40)
        torch.testing.assert_close(more_b @ more_a, left * share if kept else torch.zeros(48, 40), atol=1e-5, rtol=1e-3)
