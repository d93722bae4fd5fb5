"""The registry: a code is one file and one line. A third code, made here, lives in a bundle as the others do."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import polymerge
from polymerge import Bundle, add_expert, export_dense, export_peft, load_model, merge, verify
from polymerge.errors import BundleError, RecipeError
from polymerge.merging.plan import plan_merge
from polymerge.method.code import Code, check_tensor
from polymerge.method.codes import CODES, PLAIN, PUBLISHED, code_of
from polymerge.method.rsvd import rank_for_rate
from polymerge.model.linear import MixedLinear
from polymerge.recipe.merge import load_recipe
from tests.conftest import Merged

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


@dataclass(frozen=True)
class Halves(Code):
    """A component a row: its part of A, then its part of B, in float16 whatever the bundle's dtype."""

    dtype: torch.dtype

    name = "halves"
    suffixes = ("lora.half",)

    def rank(self, out_features: int, in_features: int, compress_rate: float) -> int:
        return rank_for_rate(out_features, in_features, compress_rate)

    def bytes(self, out_features: int, in_features: int, rank: int) -> int:
        return 2 * rank * (out_features + in_features)

    def encode(self, b: Tensor, a: Tensor) -> dict[str, Tensor]:
        return {"lora.half": torch.cat([a, b.T], dim=1).half()}

    def check(self, stored: Mapping[str, Tensor], out_features: int, in_features: int) -> None:
        rows = stored["lora.half"]
        check_tensor("lora.half", rows, torch.float16, (len(rows), in_features + out_features))

    def decode(self, stored: Mapping[str, Tensor], out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        self.check(stored, out_features, in_features)
        a, b = stored["lora.half"].float().split([in_features, out_features], dim=1)
        return b.T, a


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that a code costs."""
    monkeypatch.setitem(CODES, "halves", f"{__name__}:Halves")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_a_code_of_one_file_and_one_line_lives_in_a_bundle(
    halves: None, merged: Merged, tmp_path: Path, architecture: str
) -> None:
    _, experts = merged(architecture, compress_rate=0.7, scale="shared")
    sources = {name: str(path) for name, path in experts.items()}
    recipe = {"experts": sources, "compress_rate": 0.7, "code": "halves", "scale": "shared"}
    bundle = merge(recipe, tmp_path / "bundle")
    assert bundle.expert_file("e0").name == "coded_expert.safetensors" and bundle.manifest.format_version == 2
    assert verify(bundle, sources=True).problems == []
    expected = load_model(bundle)(IDS, experts="e1").logits
    folder = export_dense(bundle, "e1", tmp_path / "dense")
    torch.testing.assert_close(plain(folder)(IDS).logits, expected, atol=1e-5, rtol=0)
    adapted = PeftModel.from_pretrained(plain(bundle.path), export_peft(bundle, "e1", tmp_path / "peft").folder)
    torch.testing.assert_close(adapted.eval()(IDS).logits, expected, atol=1e-5, rtol=0)
    residuals = plan_merge(load_recipe(recipe)).residual_bytes
    published = plan_merge(load_recipe(recipe | {"code": "factors"})).residual_bytes
    assert 2 * residuals == published  # the experts are in float32
    add_expert(bundle, "more", sources["e0"])
    assert verify(Bundle.open(bundle.path)).problems == []


def plain(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


def test_a_code_that_no_packed_layer_reads_is_decoded_with_a_warning(
    halves: None, merged: Merged, caplog: pytest.LogCaptureFixture
) -> None:
    bundle, _ = merged("llama", compress_rate=0.7, code="halves")
    caplog.set_level(logging.WARNING, "polymerge")
    model = load_model(bundle, residuals="packed")
    assert any(isinstance(module, MixedLinear) for module in model.modules())
    assert [r for r in caplog.records if "in the code halves are decoded all the same" in r.message]


def test_a_bundle_of_a_code_that_is_not_there_is_refused(
    halves: None, merged: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = merged("llama", compress_rate=0.7, code="halves")
    monkeypatch.delitem(CODES, "halves")
    with pytest.raises(BundleError, match=r"method\.code: .*no code 'halves' among factors, int8, int4, entropy"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("facters", "no code 'facters' among factors, int8, int4, entropy; did you mean 'factors'?"),
        ("zip", "no code 'zip'"),
    ],
)
def test_an_unknown_code_is_one_line(name: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"experts": {"a": "x", "b": "y"}, "code": name})
    assert f"code: {said}" in str(caught.value) and "\n" not in str(caught.value)


def test_every_name_is_its_code_s_own_and_the_published_one_is_the_default() -> None:
    for name in PLAIN:
        assert code_of(name, torch.bfloat16).name == name
    recipe = load_recipe({"experts": {"a": "x", "b": "y"}})
    assert recipe.code == "auto"
    # readers of version 1 and PEFT know the published code and no other
    version_1 = [name for name in PLAIN if code_of(name, torch.bfloat16).format_version == 1]
    assert version_1 == [PUBLISHED] == [n for n in PLAIN if code_of(n, torch.bfloat16).peft_readable]


def test_nobody_outside_the_method_compares_a_code_s_name() -> None:
    source = Path(polymerge.__file__).parent
    bases = source / "model" / "quantised.py"  # a base in fewer bits may be called as a code is
    for file in (file for file in source.rglob("*.py") if file.parent.name != "method" and file != bases):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare | ast.MatchValue):
                names = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)} & CODES.keys()
                assert not names, f"{file.name}, line {node.lineno}: asks whether a code is {names}"


def test_names_of_codes_cost_no_torch() -> None:
    """A recipe and the command line's help need names alone."""
    code = "import sys, polymerge.recipe.merge, polymerge.cli.merge; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
