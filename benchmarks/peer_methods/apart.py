"""N models quantised apart, without a common base: what a user has who does not merge.

Q8_0 and Q4_0 are llama.cpp's, by the package `gguf`: blocks of 32 with a scale in float16, to the nearest; all
matrices, the embedding too. (Its Q4_K needs rows of a multiple of 256 numbers, which SmolLM2-135M has not; there
llama.cpp takes other types.) GPTQ is of 4 bits in groups of 128, calibrated on the expert's own training requests; NF4
is QLoRA's (Dettmers et al. 2023, arXiv 2305.14314): the 16 levels that a normal number takes, blocks of 64, their
magnitudes in 8 bits. Both leave the embedding in 16 bits, as their libraries do.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor

from peer_methods.deltas import Coded, Delta
from peer_methods.grids import grid, packed_bytes, vector_bits
from polymerge.method.gptq import gptq

GPTQ_BITS = 4
NF4_BLOCK, NF4_SCALES = 64, 256
# The share of a normal distribution's ends that the outermost levels leave out: 1 - (1/32 + 1/30) / 2.
NF4_OFFSET = 0.9677083


def llama_cpp(weight: Tensor, kind: str) -> Coded:
    """A matrix as `kind`, Q8_0 or Q4_0."""
    import gguf

    type_ = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.quantize(weight.numpy(), type_)
    read = torch.from_numpy(gguf.quants.dequantize(stored, type_)).float()
    return Coded(read, stored.nbytes, stored.nbytes, stored.nbytes)


def by_gptq(delta: Delta) -> Coded:
    rows, columns = delta.weight.shape
    levels = grid(delta.weight, torch.full((rows,), GPTQ_BITS))
    size = packed_bytes(rows * vector_bits(columns, GPTQ_BITS))
    return Coded(gptq(delta.weight, delta.moments(), levels), size, size, None)


def by_nf4(delta: Delta) -> Coded:
    weight = delta.weight
    flat = F.pad(weight.flatten(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    largest = _in_eight_bits(flat.abs().amax(1))[:, None].clamp(min=1e-12)
    levels = nf4_levels()
    numbers = torch.bucketize(flat / largest, (levels[1:] + levels[:-1]) / 2)
    read = (levels[numbers] * largest).flatten()[: weight.numel()].view_as(weight)
    # 4 bits a number, 8 a block, and a float32 for 256 blocks
    size = packed_bytes(4 * weight.numel()) + len(flat) + 4 * -(-len(flat) // NF4_SCALES)
    return Coded(read, size, size, None)


@lru_cache(maxsize=1)
def nf4_levels() -> Tensor:
    """Quantiles of the normal distribution, seven below 0, eight above and 0 itself, in [-1, 1]."""
    above = torch.tensor(norm.ppf(torch.linspace(NF4_OFFSET, 0.5, 9)[:-1].numpy()))
    below = -torch.tensor(norm.ppf(torch.linspace(NF4_OFFSET, 0.5, 8)[:-1].numpy()))
    levels = torch.cat([below, torch.zeros(1), above]).sort().values.float()
    return levels / levels.max()


def _in_eight_bits(magnitudes: Tensor) -> Tensor:
    """Magnitudes of blocks, less their mean, in 8 bits with one scale for 256 blocks."""
    mean = magnitudes.mean()
    groups = F.pad(magnitudes - mean, (0, -len(magnitudes) % NF4_SCALES)).view(-1, NF4_SCALES)
    step = groups.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return ((groups / step).round() * step).flatten()[: len(magnitudes)] + mean
