"""Quantised checkpoints, read as the bfloat16 tensors that they stand for.

Knows FP8 with a scale a block (DeepSeek: `weight` beside `weight_scale_inv`) and MXFP4 (gpt-oss: `*_blocks` beside
`*_scales`): the arithmetic is transformers' own, done for one tensor, or for the rows that are asked for, at a time.
Every other format is refused by its name, with the way to a plain checkpoint. Knows nothing of files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SourceError
from .checkpoint import Checkpoint, TensorInfo

FP8 = "F8_E4M3"
SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
# What FP8 checkpoints say of activations, which a plain model does not have.
ACTIVATIONS = (".activation_scale", ".input_scale")
# Types of masks and positions, which a plain checkpoint may hold too.
MASKS = ("BOOL", "I64")
BLOCK = (128, 128)  # DeepSeek's, where a configuration does not say its own

BY_TRANSFORMERS = "`AutoModelForCausalLM.from_pretrained(SOURCE, device_map='auto').dequantize().save_pretrained(NEW)`"
BY_CONFIG = "`AutoModelForCausalLM.from_pretrained(SOURCE, quantization_config=CONFIG).save_pretrained(NEW)`"
BY_HAND = (
    "merge the model that it was made from, or unpack it: W = (layer(torch.eye(in_features)) - bias).T of every "
    "quantised layer, in a plain model that is saved with `save_pretrained(NEW)`"
)
# The configuration's quant_method -> how to a plain checkpoint. Every other one goes by hand.
WAYS = {
    "bitsandbytes": BY_TRANSFORMERS,
    "higgs": BY_TRANSFORMERS,
    "compressed-tensors": BY_CONFIG.replace("CONFIG", "CompressedTensorsConfig(run_compressed=False)"),
    "mxfp8": BY_CONFIG.replace("CONFIG", "FineGrainedFP8Config(dequantize=True)"),
}
# Formats that a configuration may be silent about: the ending of a tensor's name -> the format.
SIGNATURES = {
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qweight": "gptq or awq",
    ".weight_packed": "compressed-tensors",
    ".W_q": "hqq",
}
# Settings of plain weights that are rounded anew in every forward pass (BitNet's bfloat16 models).
AS_IT_RUNS = {"quantization_mode": "online", "keep_master_weights": True, "store_master_weights": True}


class DequantisedCheckpoint(Checkpoint):
    """Another checkpoint, with its FP8 and MXFP4 tensors as bfloat16 under the names of the architecture."""

    def __init__(self, packed: Checkpoint) -> None:
        self.label, self.folder, self.origin = packed.label, packed.folder, packed.origin
        settings = packed.config.get("quantization_config") or {}
        self.config = {key: value for key, value in packed.config.items() if key != "quantization_config"}
        self._packed = packed
        rows, columns = settings.get("weight_block_size") or BLOCK
        self._block = int(rows), int(columns)
        self.tensors = {}
        for name, info in packed.tensors.items():
            if _is_scale(name, packed):
                continue
            if name + SCALE in packed.tensors:
                _check_grid(name, packed, self._block)
                self.tensors[name] = _as_bfloat16(info, info.shape)
            elif _is_blocks(name, packed):
                experts, rows, groups, size = info.shape  # transformers keeps them as [E, in, out]
                self.tensors[name.removesuffix(BLOCKS)] = _as_bfloat16(info, (experts, groups * size * 2, rows))
            else:
                self.tensors[name] = info

    def read(self, name: str) -> Tensor:
        shape = self.tensors[name].shape
        return self.read_rows(name, 0, shape[0]) if shape else self._packed.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._packed.tensors:
            return _from_mxfp4(*(self._packed.read_rows(name + part, start, stop) for part in (BLOCKS, SCALES)))
        if name + SCALE in self._packed.tensors:
            return self._from_fp8(name, start, stop)
        return self._packed.read_rows(name, start, stop)

    def fingerprint(self) -> list[str]:
        return self._packed.fingerprint()

    def _from_fp8(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix begin and end with a block; a fused tensor's rows are whole matrices."""
        shape, scale = self.tensors[name].shape, name + SCALE
        if len(shape) != 2:
            matrices = self._packed.read_rows(name, start, stop)
            return _from_fp8(matrices, self._packed.read_rows(scale, start, stop), self._block)
        step = self._block[0]
        first, last = start // step, -(-stop // step)
        scales = self._packed.read(scale)
        if scales.numel() > 1:
            scales = scales[first:last]
        packed = self._packed.read_rows(name, first * step, min(last * step, shape[0]))
        return _from_fp8(packed, scales, self._block)[start - first * step : stop - first * step].clone()


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself where its tensors are plain, and otherwise its tensors unpacked.

    Raises:
        SourceError: another format than FP8 with block scales and MXFP4, or one that works on plain tensors; names it
            and the way out.
    """
    tensors = checkpoint.tensors
    odd = [name for name, info in tensors.items() if info.dtype is None and not _is_mask(name, info)]
    packed = [name for name in odd if _is_packed(name, checkpoint)]
    left = [name for name in odd if name not in packed and not _is_scale(name, checkpoint)]
    signed = next((kind for name in tensors for end, kind in SIGNATURES.items() if name.endswith(end)), None)
    method = _method(checkpoint) or signed
    if method and (left or signed):
        raise SourceError(_refusal(checkpoint, method, (left or odd or list(tensors))[0]))
    settings = checkpoint.config.get("quantization_config")
    rounded = next((k for k, v in AS_IT_RUNS.items() if isinstance(settings, dict) and settings.get(k) == v), None)
    if rounded:
        raise SourceError(
            f"{checkpoint.label}: config.json's quantization_config ({method}, {rounded}) rounds its plain weights in "
            "every forward pass, which a bundle does not do; without quantization_config they are merged as stored"
        )
    return DequantisedCheckpoint(checkpoint) if packed else checkpoint


def _method(checkpoint: Checkpoint) -> str:
    for key in ("quantization_config", "compression_config"):
        settings = checkpoint.config.get(key)
        if isinstance(settings, dict):
            return str(settings.get("quant_method") or "an unnamed method")
    return ""


def _is_mask(name: str, info: TensorInfo) -> bool:
    return info.stored_as in MASKS or name.endswith((".bias", ".masked_bias"))


def _refusal(checkpoint: Checkpoint, method: str, tensor: str) -> str:
    way = WAYS.get(method, BY_HAND).replace("SOURCE", repr(checkpoint.label))
    stored_as = checkpoint.tensors[tensor].stored_as
    return f"{checkpoint.label}: quantised by {method} ({tensor!r} is {stored_as}), which a merge does not read; {way}"


def _is_packed(name: str, checkpoint: Checkpoint) -> bool:
    stored_as = checkpoint.tensors[name].stored_as
    return (stored_as == FP8 and name + SCALE in checkpoint.tensors) or _is_blocks(name, checkpoint)


def _is_blocks(name: str, checkpoint: Checkpoint) -> bool:
    info = checkpoint.tensors[name]
    scales = checkpoint.tensors.get(name.removesuffix(BLOCKS) + SCALES)
    return (
        name.endswith(BLOCKS)
        and info.stored_as == "U8"
        and scales is not None
        and len(info.shape) == 4
        and scales.shape == info.shape[:-1]
    )


def _is_scale(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor is only there to unpack another, or to quantise activations."""
    weight, blocks = name.removesuffix(SCALE), name.removesuffix(SCALES) + BLOCKS
    of_weight = name.endswith(SCALE) and weight in checkpoint.tensors and _is_packed(weight, checkpoint)
    of_blocks = name.endswith(SCALES) and blocks in checkpoint.tensors and _is_blocks(blocks, checkpoint)
    module = name.rpartition(".")[0]
    of_layer = name.endswith(ACTIVATIONS) and f"{module}.weight{SCALE}" in checkpoint.tensors
    return of_weight or of_blocks or of_layer


def _check_grid(name: str, checkpoint: Checkpoint, block: tuple[int, int]) -> None:
    shape, grid = checkpoint.tensors[name].shape, checkpoint.tensors[name + SCALE].shape
    expected = (*shape[:-2], *(-(-size // step) for size, step in zip(shape[-2:], block, strict=True)))
    if grid not in (expected, (), (1,)):
        raise SourceError(
            f"{checkpoint.label}: tensor {name!r} is {list(shape)} with scales {list(grid)}; blocks of {list(block)} "
            f"would have {list(expected)}"
        )


def _as_bfloat16(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    return replace(info, shape=shape, dtype=torch.bfloat16)


def _from_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """[.., out, in] in bfloat16. transformers takes the size of a block for the matrix's over the grid's, so a matrix
    that ends inside a block is filled up first."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, columns = weight.shape[-2:]
    whole = weight.float()
    if scale.numel() == 1:  # one for the whole tensor
        scale = scale.reshape(1, 1)
    else:
        whole = torch.nn.functional.pad(whole, (0, -columns % block[1], 0, -rows % block[0]))
    scale = scale if scale.dtype == torch.uint8 else scale.float()  # bytes are exponents
    unpacked: Any = Fp8Dequantize(None).convert({"weight": whole, "weight_scale_inv": scale})
    (dense,) = unpacked.values()
    matrix: Tensor = dense[0] if isinstance(dense, list) else dense
    return matrix[..., :rows, :columns].to(torch.bfloat16).contiguous()


def _from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, in, out] in bfloat16, of [E, out, in / 32, 16] and [E, out, in / 32]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    dense: Tensor = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    return dense
