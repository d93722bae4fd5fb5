"""Quantised checkpoints against transformers' own loading of them, which dequantises on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from polymerge import merge
from polymerge.errors import SourceError
from polymerge.sources.checkpoint import Checkpoint
from polymerge.sources.dense import dense_model
from polymerge.sources.opening import open_checkpoint
from tests.sources.reading import assert_reads_fresh
from tests.tiny import COMMON, make_experts

pytestmark = pytest.mark.filterwarnings("ignore")
WIDE = {**COMMON, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def to_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in FP8 with a scale a block; the last blocks may be smaller."""
    rows, columns = weight.shape
    grid = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    packed = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            grid[i, j] = weight[here].abs().max() / 448
            packed[here] = (weight[here] / grid[i, j]).to(torch.float8_e4m3fn)
    return packed, grid


def quantise(folder: Path, block: tuple[int, int], *, says_so: bool = True) -> Path:
    """The folder's linear layers in FP8, as DeepSeek publishes its models."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensors[name].float(), block)
        tensors[f"{name.removesuffix('.weight')}.input_scale"] = torch.ones(1)
    save_file(tensors, file, {"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    edit_config(folder, **({"quantization_config": settings} if says_so else {}))
    return folder


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    folder = make_experts("llama", tmp_path, count=1, dtype=torch.bfloat16, config=transformers.LlamaConfig(**WIDE))
    return quantise(folder["e0"], (64, 32))


def parameters(model: Any) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def assert_holds(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape) == (torch.bfloat16, info.shape)
        assert torch.equal(tensor, expected[name]), name
        for start, stop in ((0, 1), (info.shape[0] // 3, info.shape[0] // 2 + 1), (info.shape[0] - 1, info.shape[0])):
            assert torch.equal(checkpoint.read_rows(name, start, stop), expected[name][start:stop]), name


def test_fp8_with_block_scales_is_what_transformers_loads(fp8: Path) -> None:
    expected = parameters(transformers.AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.bfloat16))
    checkpoint = open_checkpoint(fp8)
    assert_holds(checkpoint, expected)
    assert "quantization_config" not in checkpoint.config
    assert_reads_fresh(checkpoint)


def test_fp8_is_loaded_as_a_dense_model(fp8: Path) -> None:
    ids = torch.arange(5, 20)[None]
    expected = transformers.AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.bfloat16)(ids).logits
    model = dense_model(open_checkpoint(fp8), dtype=torch.bfloat16)
    assert torch.equal(model(ids).logits, expected)


def test_a_matrix_that_ends_inside_a_block_has_whole_blocks_before(tmp_path: Path) -> None:
    """transformers takes 2 scales for 80 rows as blocks of 40, or refuses; DeepSeek's blocks are of one size."""
    folder = quantise(make_experts("llama", tmp_path, count=1, dtype=torch.bfloat16)["e0"], (64, 32))
    packed, checkpoint = load_file(folder / "model.safetensors"), open_checkpoint(folder)
    for name, info in checkpoint.tensors.items():
        if name.endswith("proj.weight"):
            scale = packed[f"{name}_scale_inv"].repeat_interleave(64, 0).repeat_interleave(32, 1)
            expected = (packed[name].float() * scale[: info.shape[0], : info.shape[1]]).bfloat16()
            assert torch.equal(checkpoint.read(name), expected), name
            assert torch.equal(checkpoint.read_rows(name, 20, 41), expected[20:41]), name


def test_fp8_whose_configuration_is_silent_is_known_by_its_tensors(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**WIDE, "intermediate_size": 128})
    folder = make_experts("llama", tmp_path, count=1, dtype=torch.bfloat16, config=config)["e0"]
    checkpoint = open_checkpoint(quantise(folder, (128, 128), says_so=False))
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.bfloat16}


def test_scales_of_other_blocks_are_refused_with_both_shapes(fp8: Path) -> None:
    settings = json.loads((fp8 / "config.json").read_text())["quantization_config"]
    edit_config(fp8, quantization_config={**settings, "weight_block_size": [32, 32]})
    with pytest.raises(SourceError, match=r"down_proj.*\[128, 256\].*\[2, 8\].*\[4, 8\]"):
        open_checkpoint(fp8)


def test_an_fp8_expert_is_merged_beside_a_plain_one(fp8: Path, tmp_path: Path) -> None:
    plain = make_experts(
        "llama", tmp_path / "b", seed=1, count=1, dtype=torch.bfloat16, config=transformers.LlamaConfig(**WIDE)
    )["e0"]
    recipe = {"experts": {"packed": str(fp8), "plain": str(plain)}, "compress_rate": 0.0}
    bundle = merge(recipe, tmp_path / "bundle")
    expected = parameters(transformers.AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.bfloat16))
    for name, value in expected.items():
        torch.testing.assert_close(bundle.reconstruct("packed", name).bfloat16(), value, rtol=1e-2, atol=1e-3)
    assert "quantization_config" not in json.loads((bundle.path / "config.json").read_text())


@pytest.fixture
def mxfp4(tmp_path: Path) -> Path:
    """gpt-oss as it is published: experts in MXFP4, everything else in bfloat16."""
    config = transformers.GptOssConfig(
        **{**COMMON, "hidden_size": 64, "intermediate_size": 96}, head_dim=16, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    folder = make_experts("gpt-oss", tmp_path, count=1, dtype=torch.bfloat16, config=config)["e0"]
    file = folder / "model.safetensors"
    tensors = load_file(file)
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=draw
        )
        tensors[f"{name}_scales"] = torch.randint(
            118, 124, (experts, rows, columns // 32), dtype=torch.uint8, generator=draw
        )
    save_file(tensors, file, {"format": "pt"})
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder


def test_mxfp4_is_what_transformers_unpacks(mxfp4: Path) -> None:
    packed, checkpoint = load_file(mxfp4 / "model.safetensors"), open_checkpoint(mxfp4)
    expected = {name: value for name, value in packed.items() if value.dtype != torch.uint8}
    for name in {name.rpartition("_")[0] for name, value in packed.items() if value.dtype == torch.uint8}:
        expected[name] = convert_moe_packed_tensors(packed[f"{name}_blocks"], packed[f"{name}_scales"])
    assert any(name.endswith("experts.gate_up_proj") for name in expected)
    assert_holds(checkpoint, expected)
    assert_reads_fresh(checkpoint)


def test_mxfp4_answers_as_in_transformers(mxfp4: Path) -> None:
    ids = torch.arange(5, 20)[None]
    settings = transformers.Mxfp4Config(dequantize=True)
    original = transformers.AutoModelForCausalLM.from_pretrained(
        mxfp4, dtype=torch.bfloat16, quantization_config=settings
    )
    model = dense_model(open_checkpoint(mxfp4), dtype=torch.bfloat16)
    assert torch.equal(model(ids).logits, original(ids).logits)


def packed_as(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> str:
    """The one line about a Llama with one layer replaced by these tensors."""
    file = folder / "model.safetensors"
    plain = load_file(file)
    module = "model.layers.0.mlp.up_proj"
    del plain[f"{module}.weight"]
    save_file({**plain, **{f"{module}.{name}": value.clone() for name, value in tensors.items()}}, file)
    edit_config(folder, **config)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{folder}: ")
    return message


INT, BYTES = torch.zeros(4, 4, dtype=torch.int32), torch.zeros(8, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("method", "tensors", "way"),
    [
        ("bitsandbytes", {"weight": BYTES, "weight.absmax": torch.ones(4)}, ".dequantize().save_pretrained("),
        ("bitsandbytes", {"weight": BYTES.to(torch.int8), "SCB": torch.ones(4)}, ".dequantize().save_pretrained("),
        ("gptq", {"qweight": INT, "qzeros": INT, "scales": torch.ones(4)}, "torch.eye"),
        ("awq", {"qweight": INT, "qzeros": INT, "scales": torch.ones(4)}, "torch.eye"),
        ("compressed-tensors", {"weight_packed": INT, "weight_scale": torch.ones(4)}, "CompressedTensorsConfig("),
        ("compressed-tensors", {"weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, "CompressedTensorsConfig("),
        ("hqq", {"W_q": BYTES, "meta": torch.ones(4)}, "torch.eye"),
        ("quanto", {"weight._data": BYTES.to(torch.int8)}, "torch.eye"),
        ("mxfp8", {"weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, "FineGrainedFP8Config("),
    ],
)
def test_other_formats_are_refused_by_name_with_the_way_out(
    tmp_path: Path, method: str, tensors: dict[str, torch.Tensor], way: str
) -> None:
    folder = make_experts("llama", tmp_path, count=1)["e0"]
    message = packed_as(folder, tensors, quantization_config={"quant_method": method})
    assert f"quantised by {method} " in message and way in message and "mlp.up_proj" in message
    assert "save_pretrained" in message


def test_a_format_whose_configuration_is_silent_is_known_by_its_tensors(tmp_path: Path) -> None:
    folder = make_experts("llama", tmp_path, count=1)["e0"]
    assert "gptq" in packed_as(folder, {"qweight": INT, "scales": torch.ones(4)})


def test_plain_tensors_that_are_rounded_in_every_forward_pass_are_refused(tmp_path: Path) -> None:
    folder = make_experts("llama", tmp_path, count=1)["e0"]
    settings = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_config(folder, quantization_config=settings)  # microsoft/bitnet-b1.58-2B-4T-bf16
    with pytest.raises(SourceError, match=r"\(bitnet, quantization_mode\) rounds its plain weights"):
        open_checkpoint(str(folder))


def test_a_leftover_configuration_of_plain_tensors_is_no_quantisation(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path, count=2)
    edit_config(experts["e0"], quantization_config={"quant_method": "gptq", "bits": 4})
    bundle = merge({"experts": {n: str(p) for n, p in experts.items()}, "compress_rate": 0.0}, tmp_path / "bundle")
    assert "quantization_config" not in json.loads((bundle.path / "config.json").read_text())
    transformers.AutoModelForCausalLM.from_pretrained(bundle.path)
