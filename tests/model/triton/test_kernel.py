"""Residuals added as they are stored: the sum in torch against dense matrices, the Triton kernel against that sum.

On a machine with a GPU the kernel is compiled and runs there; elsewhere Triton's interpreter runs it on the CPU.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymerge import Bundle, load_model, merge
from polymerge.errors import BundleError, ModelError
from polymerge.method.codes import PLAIN, code_of
from polymerge.model import loading
from polymerge.model.assignment import Assignment
from polymerge.model.placing import CodedPlacer, Placer
from polymerge.model.residual import add_mixed, mixed_ratio
from polymerge.model.triton import check
from polymerge.model.triton.grouped import Residuals, add_plain, tiles_of
from polymerge.model.triton.linear import CodedLinear
from tests.conftest import Merged
from tests.tiny import VOCAB

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANKS, RATIOS = (5, 0, 34), (0.5, 2.0, 1.5)
# one expert, one without a rank, one and the average, all in turn
BATCHES = [["e0"] * 3, ["e1"] * 3, ["e2", None, "e2"], ["e2", "e1", "e0", None, "e2"]]
ROWS = ["e1", "e0", None, "e2", "e1"]


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """The module, which is interpreted where there is no GPU. Triton decides that when it is imported."""
    pytest.importorskip("triton", reason="needs the extra `triton`")
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        from polymerge.model.triton import kernel

        assert (DEVICE.type == "cpu") == kernel.INTERPRETED
        yield kernel


def normal(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def residuals_of(code: str, out_features: int, in_features: int) -> tuple[Residuals, list[torch.Tensor]]:
    """Residuals of three experts, and B A of each in float32."""
    stored_factors, dense = [], []
    coder = code_of(code, torch.bfloat16)
    for rank in RANKS:
        stored = coder.encode(normal(out_features, rank), normal(rank, in_features)) if rank else None
        b, a = coder.decode(stored, out_features, in_features) if stored else (torch.zeros(out_features, 0), None)
        dense.append(b @ a if a is not None else torch.zeros(out_features, in_features))
        stored_factors.append(stored)
    return Residuals(stored_factors, coder, (out_features, in_features), RATIOS).to(DEVICE), dense


def assigned(experts: Any, rows: int) -> Assignment:
    state = Assignment(["e0", "e1", "e2"], DEVICE)
    state.set(experts, rows)
    return state


def inputs(rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(rows, out_features).to(DEVICE, dtype), normal(rows, in_features).to(DEVICE, dtype)


@pytest.mark.parametrize("code", PLAIN)
@pytest.mark.parametrize("experts", [*BATCHES, [{"e0": 1.0, "e2": 3.0}, "e1", {"e1": 1.0, "average": 1.0}]])
def test_the_plain_sum_is_that_of_dense_matrices(code: str, experts: list[Any]) -> None:
    residuals, dense = residuals_of(code, 37, 21)
    state = assigned(experts, len(experts))
    y, x = inputs(2 * len(experts), 37, 21, torch.float32)
    expected = y.clone()
    for number in range(len(x)):
        weights = state.weights[number // 2].cpu()
        matrix = sum(w * d for w, d in zip(weights, dense, strict=False))
        ratio = weights @ torch.tensor([*RATIOS, 1.0])
        expected[number] = ratio * y[number] + x[number] @ matrix.T.to(DEVICE)  # type: ignore[union-attr]
    add_plain(y, x, residuals, state)
    torch.testing.assert_close(y, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(48, 80), (33, 301), (5, 7), (255, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("code", PLAIN)
def test_the_kernel_gives_the_plain_sum(kernel: Any, code: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    residuals, _ = residuals_of(code, *shape)
    for experts in BATCHES:
        for tokens in (1, 9):  # decoding; a prompt
            state = assigned(experts, len(experts))
            y, x = inputs(len(experts) * tokens, *shape, dtype)
            expected = y.to(torch.float32, copy=True)
            add_plain(expected, x.float(), residuals, state)
            tiles = tiles_of(state, x)
            kernel.add_fused(y, x, residuals, tiles)
            scale = expected.square().mean(-1, keepdim=True).sqrt()
            assert ((y - expected) / scale).abs().max() < check.TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("code", ["int8", "int4"])
@pytest.mark.parametrize("width", [80, 301, 300])
def test_rows_are_decoded_as_torch_decodes_them(kernel: Any, code: str, dtype: torch.dtype, width: int) -> None:
    rows = residuals_of(code, width, 21)[0].b
    for first, last in ((0, len(rows.numbers)), (3, 22)):
        step = 2.0**-7 if kernel.INTERPRETED and dtype == torch.bfloat16 else 0.0  # where the interpreter cuts off
        made, expected = kernel.decoded(rows, first, last, dtype), rows.decoded(first, last, dtype)
        torch.testing.assert_close(made, expected, rtol=step, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_keeps_rho_as_the_plain_sum_does(kernel: Any, dtype: torch.dtype) -> None:
    coder, shape, ratios = code_of("factors", dtype), (48, 32), (1.0028, 0.9972, 1.3)
    nothing = coder.encode(torch.zeros(48, 3), torch.zeros(3, 32))
    residuals = Residuals([nothing] * 3, coder, shape, ratios).to(DEVICE)
    state = assigned(["e2", "e1", "e0", None], 4)
    y, x = inputs(4 * 20, *shape, dtype)
    expected = y.clone()
    add_mixed(expected, mixed_ratio(state.weights, residuals.ratios).repeat_interleave(20, dim=0), [])
    kernel.add_fused(y, x, residuals, tiles_of(state, x))
    step = 2.0**-7 if kernel.INTERPRETED and dtype == torch.bfloat16 else 0.0  # where the interpreter does not round
    torch.testing.assert_close(y, expected, rtol=step, atol=0)


def test_a_prompt_longer_than_a_tile_and_an_empty_batch(kernel: Any) -> None:
    residuals, _ = residuals_of("int4", 16, 16)
    state = assigned(["e2", None, "e0"], 3)
    y, x = inputs(3 * 150, 16, 16, torch.float32)
    expected, tiles = y.clone(), tiles_of(state, x.view(3, 150, 16))
    assert tiles is not None and len(tiles.table) == 2 * 10
    add_plain(expected, x, residuals, state)
    kernel.add_fused(y, x, residuals, tiles)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    kernel.add_fused(y[:0], x[:0], residuals, tiles_of(state, x[:0]))


def test_the_average_is_in_no_tile_and_a_mixture_has_none() -> None:
    tiles = tiles_of(assigned(["e1", None, "e0", "e1"], 4), torch.zeros(4, 2, 8))
    assert tiles is not None
    assert tiles.order.tolist() == [0, 1, 6, 7, 4, 5]
    assert tiles.table.tolist() == [[1, 0, 4], [0, 4, 6]]
    assert tiles_of(assigned(["e1", {"e0": 1.0, "e1": 1.0}], 2), torch.zeros(2, 8)) is None


def coded_layers(model: Any) -> list[CodedLinear]:
    return [module for module in model.modules() if isinstance(module, CodedLinear)]


def residual_bytes(model: Any) -> int:
    """Of the factors that coded layers hold."""
    factors = [rows for layer in coded_layers(model) for rows in (layer.residuals.a, layer.residuals.b)]
    return sum(tensor.nbytes for rows in factors for tensor in rows.buffers())


def bytes_of_files(bundle: Bundle, model: Any) -> int:
    """Of the same factors in the bundle."""
    modules = [name for name, module in model.hf.named_modules() if isinstance(module, CodedLinear)]
    keys = {f"base_model.model.{module}.{suffix}" for module in modules for suffix in bundle.code.suffixes}
    files = [load_file(bundle.expert_file(expert)) for expert in bundle.experts]
    return sum(tensor.nbytes for tensors in files for key, tensor in tensors.items() if key in keys)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (5, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(DEVICE)}


@pytest.mark.parametrize(
    ("architecture", "code"), [("llama", "int4"), ("gpt2", "int8"), ("qwen2", "factors"), ("mixtral", "int4")]
)
@torch.no_grad()
def test_a_model_with_the_kernel_says_what_the_plain_one_says(
    kernel: Any, merged: Merged, architecture: str, code: str
) -> None:
    bundle, _ = merged(architecture, compress_rate=0.7, code=code)
    plain, coded = (load_model(bundle, device=DEVICE, dtype="float32", residuals=k) for k in ("decoded", "packed"))
    assert not coded_layers(plain)
    assert residual_bytes(coded) == bytes_of_files(bundle, coded) > 0
    for experts in (ROWS, "e2", [*ROWS[:4], {"e0": 1.0, "e2": 3.0}]):
        expected = plain(**batch(), experts=experts).logits
        torch.testing.assert_close(coded(**batch(), experts=experts).logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(coded(**batch()).logits, plain(**batch()).logits)


@torch.no_grad()
def test_decoding_and_beams_say_what_the_plain_model_says(kernel: Any, merged: Merged) -> None:
    bundle, _ = merged("llama", compress_rate=0.7, code="int4")
    plain, coded = (load_model(bundle, device=DEVICE, dtype="float32", residuals=k) for k in ("decoded", "packed"))
    options = {"max_new_tokens": 2, "num_beams": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = plain.generate(**batch(), experts=ROWS, **options)
    assert torch.equal(coded.generate(**batch(), experts=ROWS, **options), expected)


def wrong(kernel: Any, patch: pytest.MonkeyPatch) -> None:
    right = kernel.add_fused

    def off_by_one_number(y: torch.Tensor, *others: Any) -> None:
        right(y, *others)
        y[-1, -1] += 1

    patch.setattr(kernel, "add_fused", off_by_one_number)


def broken(kernel: Any, patch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("PTX was compiled\nwith an unsupported toolchain")

    patch.setattr(kernel, "add_fused", fails)


def without_gpu(kernel: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kernel, "runs_on", lambda device: False)


def not_installed(kernel: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(check, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (wrong, "away from the plain path"),
        (broken, "RuntimeError: PTX was compiled with an unsupported"),
        (without_gpu, "runs on a GPU, not on"),
        (not_installed, "triton is not installed"),
    ],
)
@torch.no_grad()
def test_without_the_kernel_factors_are_decoded_when_a_layer_is_run(
    kernel: Any, merged: Merged, monkeypatch: pytest.MonkeyPatch, failure: Any, words: str
) -> None:
    bundle, _ = merged("llama", compress_rate=0.7, code="int4")
    expected = load_model(bundle, device=DEVICE, dtype="float32")(**batch(), experts=ROWS).logits
    failure(kernel, monkeypatch)
    reason = check.objection([(32, 48)], bundle.code, DEVICE, torch.float32)
    assert reason and words in reason and "\n" not in reason
    model = load_model(bundle, device=DEVICE, dtype="float32", residuals="packed")
    assert coded_layers(model) and not any(layer.fused for layer in coded_layers(model))
    assert residual_bytes(model) == bytes_of_files(bundle, model)
    torch.testing.assert_close(model(**batch(), experts=ROWS).logits, expected, atol=1e-5, rtol=1e-5)


def test_on_a_gpu_a_missing_kernel_is_a_warning(
    merged: Merged, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "polymerge")
    monkeypatch.setattr(check, "objection", lambda *arguments: "there is no compiler")
    bundle, _ = merged("llama", compress_rate=0.7, code="int4")
    for device, expected in (("cpu", 0), ("cuda", 1)):
        assert loading._placer("packed", bundle, torch.device(device), torch.float32) is CodedPlacer
        assert len(caplog.records) == expected
    assert "there is no compiler" in caplog.text


def test_what_has_nothing_to_pack_is_decoded_and_an_unknown_way_refused(merged: Merged) -> None:
    bundle, _ = merged("llama", compress_rate=1.0)
    assert loading._placer("packed", bundle, DEVICE, torch.float32) is Placer
    with pytest.raises(ModelError, match="'cuda' is neither decoded nor packed"):
        load_model(bundle, residuals="cuda")


@pytest.mark.parametrize("damage", ["shape", "missing"])
def test_a_damaged_residual_is_refused_before_the_kernel_reads_it(
    kernel: Any, merged: Merged, tmp_path: Path, damage: str
) -> None:
    _, experts = merged("llama", compress_rate=0.7, code="int4")
    recipe = {"experts": {k: str(v) for k, v in experts.items()}, "compress_rate": 0.7, "code": "int4"}
    copy = merge(recipe, tmp_path / "copy")
    file = copy.expert_file("e1")
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("q_proj.lora_B.int4"))
    if damage == "shape":
        tensors[key] = tensors[key][:, 1:].contiguous()
    else:
        del tensors[key]
    save_file(tensors, file, {"format": "pt"})
    opened = Bundle(copy.path, copy.manifest)  # past the size check of Bundle.open
    with pytest.raises(BundleError, match=r"q_proj.*lora_B\.int4.*copy the bundle again"):
        load_model(opened, device=DEVICE, dtype="float32", residuals="packed")


@pytest.mark.slow
def test_it_compiles_for_gpus_that_are_not_here(kernel: Any, tmp_path: Path) -> None:
    """Down to the machine code of an A100 and an H100, for every code, in bfloat16 and float32; it is not run."""
    script = Path(__file__).with_name("compile_kernel.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["24"]
