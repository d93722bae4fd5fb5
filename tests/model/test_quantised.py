"""A base in fewer bits: refusals, layers that never read their base's weight, and the real libraries against the model
that transformers quantises itself with the experts' factors in float32 added to its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from polymerge import Bundle, load_model
from polymerge.errors import MissingExtraError, ModelError
from polymerge.model import quantised
from polymerge.model.assignment import Assignment
from polymerge.model.divergence import divergence
from polymerge.model.linear import MixedLinear
from polymerge.model.quantised import check_base, is_quantised, quantization_config
from tests.conftest import Merged
from tests.model.test_mixed import ROWS, batch, row

CPU = torch.device("cpu")


class Product(nn.Module):
    """Multiplies with a matrix that it has no name for."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.hidden = [matrix]
        self.out_features, self.in_features = matrix.shape

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.hidden[0])


@pytest.mark.parametrize("rows", ["b", None, ["b", "a", None], ["a", {"a": 1.0, "b": 3.0}, "b"], [None, None, None]])
@torch.no_grad()
def test_a_layer_asks_its_base_for_the_product_and_never_for_the_weight(rows: Any) -> None:
    torch.manual_seed(0)
    matrix, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(3, 5, 4)
    state = Assignment(["a", "b"], CPU)
    factors = [(torch.randn(2, 4), torch.randn(6, 2)) for _ in range(2)]
    both = [MixedLinear(state, base, bias, factors, [1.1, 0.9], [None, bias + 1]) for base in (matrix, Product(matrix))]
    state.set(rows, 3)
    assert "weight" not in dict(both[1].named_parameters())
    torch.testing.assert_close(both[1](x), both[0](x))


@pytest.mark.parametrize("base", ["int8", "nf4", "fp8", "int4"])
def test_a_missing_library_is_one_line_with_the_extra(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError,
        match=rf"^base {base} needs \w+; pip install -e '\.\[quantized\]' in your clone of polymerge$",
    ):
        check_base(base, CPU)


def test_an_unknown_base_and_one_without_a_kernel_are_refused(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = merged("llama", compress_rate=0.6)
    with pytest.raises(ModelError, match="'int3' is not one of 16bit, int8, nf4, int4, fp8"):
        load_model(bundle, base="int3")
    monkeypatch.setattr(quantised, "find_spec", lambda name: object())
    with pytest.raises(ModelError, match="int4 has no kernel for cpu; nf4"):
        load_model(bundle, base="int4")


def test_a_divergence_is_that_of_torch() -> None:
    torch.manual_seed(0)
    exact, other = (torch.log_softmax(torch.randn(7, 9), -1) for _ in range(2))
    expected = F.kl_div(other, exact, log_target=True, reduction="batchmean")
    assert divergence([exact], [other]) == pytest.approx(float(expected), rel=1e-5)
    cut = [F.pad(p, (0, 3), value=-torch.inf) for p in (exact, other)]  # what an expert does not know
    assert divergence(cut[:1], cut[1:]) == pytest.approx(float(expected), rel=1e-5)


def test_a_parameter_of_a_library_is_known() -> None:
    class Held(nn.Parameter):
        pass

    assert is_quantised(Held(torch.zeros(2)))
    assert not is_quantised(nn.Parameter(torch.zeros(2))) and not is_quantised(None)


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models' tokenizers know no words."""

    class Encoder:
        def encode(self, text: str) -> list[int]:
            return list(range(5, 25))

    monkeypatch.setattr("polymerge.model.mixed.MixedModel.tokenizer_of", lambda self, expert: Encoder())


def dense_with_factors(bundle: Bundle, expert: str | None, base: str) -> Any:
    """transformers' own quantised model of the average, with an expert's B (A x) and rho, in float32, around its linear
    layers, and the expert's other tensors in their place."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        bundle.path, dtype=torch.float32, quantization_config=quantization_config(base, torch.float32), device_map="cpu"
    ).eval()
    if expert is None:
        return model
    scales = bundle.scales(expert)
    for layer in bundle.layers.values():
        whole = bundle.reconstruct(expert, layer.tensor).float()
        module = model.get_submodule(layer.module)
        if not is_quantised(module._parameters.get(layer.parameter)):
            module._parameters[layer.parameter].data = whole
            continue
        ratio = scales.get(layer.tensor, 1.0)
        update = whole - ratio * bundle.average_tensor(layer.tensor).float()
        plain = module.forward
        module.forward = lambda x, f=plain, r=ratio, u=update: r * f(x) + F.linear(x, u)
    return model


@pytest.mark.quantized
@pytest.mark.parametrize("base", ["int8", "nf4", "fp8"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
@torch.no_grad()
def test_a_quantised_base_answers_as_transformers_own_with_the_residuals(
    merged: Merged, few_tokens: None, architecture: str, base: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip(quantised.QUANTISERS[base].library)
    bundle, _ = merged(architecture, compress_rate=0.6)
    model, inputs = load_model(bundle, base=base), batch()
    assert any(is_quantised(parameter) for parameter in model.hf.parameters())
    assert [module for module in model.hf.modules() if isinstance(module, MixedLinear) and module.inner is not None]
    got = model(**inputs, experts=ROWS).logits
    for number, expert in enumerate(ROWS):
        alone = row(inputs, number)
        expected = dense_with_factors(bundle, expert, base)(**alone).logits
        seen = alone["attention_mask"].bool()
        assert float((got[number : number + 1] - expected)[seen].abs().max()) < 1e-4
    assert f"base {base}: KL" in caplog.text
    assert model.base_divergence is not None and 0 < model.base_divergence < 1
    with pytest.raises(ModelError, match="stays where it was loaded"):
        model.to(torch.bfloat16)


@pytest.mark.quantized
@pytest.mark.parametrize(("architecture", "rate", "words"), [("mixtral", 0.6, "one tensor"), ("llama", 0.0, "own")])
def test_what_cannot_be_quantised_is_refused(
    merged: Merged, few_tokens: None, architecture: str, rate: float, words: str
) -> None:
    pytest.importorskip("torchao")
    bundle, _ = merged(architecture, compress_rate=rate)
    with pytest.raises(ModelError, match=f"{words}.*16bit can"):
        load_model(bundle, base="int8")


def test_answers_are_remembered_for_their_base() -> None:
    assert quantised.held_digest("abc", "16bit") == "abc"
    assert quantised.held_digest("abc", "int8")[:40] != quantised.held_digest("abc", "nf4")[:40]
