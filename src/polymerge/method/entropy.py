"""The code for the disk: whole numbers of one step a matrix, entropy coded.

A number of a component counts as much as the component's singular value sigma. So both factors' numbers are taken in
units of it and divided by one step for the whole matrix: the rounding then costs each component the same squared
error, which is how bits are best shared out among Gaussian numbers of unlike size (reverse water-filling; Cover and
Thomas, "Elements of Information Theory", section 10.3.3). A large component's numbers become large and take many bits,
a small one's are mostly zero and take less than one: stored is which of the whole numbers came, as likely as a normal
distribution of the component's width has them (asymmetric numeral systems, Duda 2013, arXiv 1311.2540; by the package
`constriction`). The step is the smallest for which the matrix's share of bytes is enough.

Pure functions on tensors. Knows nothing of experts, files or bundles.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import needs_extra
from .code import Code, check_tensor
from .krylov import krylov
from .quantised import BUDGET_BYTES
from .rsvd import rank_for_rate

# What a number takes on average. On the demo's experts 3.125 lose 3% more of the squared residual, and 2.5, which is an
# eighth more rank to multiply by, 1% less.
NUMBER_BITS = 2.8125
# A component whose numbers have a standard deviation of less than this many steps is left out. It would gain
# nothing that the others do not gain with its bits.
LEAST_WIDTH = 0.7
# The widest, in steps, and how many widths numbers reach: what is beyond is clipped.
MOST_WIDTH, REACH = 1000.0, 16.0
# No number in reach is less likely, times the width: real factors have longer tails than a normal distribution.
LEAST_LIKELY = 1e-5
SCALE_DTYPE = torch.bfloat16
WORD, CHECKSUM = 4, 4  # bytes


@dataclass(frozen=True)
class Entropy(Code):
    """Two scales a component, and one stream of bytes a matrix, of the same length whatever the numbers are."""

    name = "entropy"
    suffixes = ("lora.entropy_scale", "lora.entropy")

    def rank(self, out_features: int, in_features: int, compress_rate: float) -> int:
        budget = rank_for_rate(out_features, in_features, compress_rate) * (out_features + in_features) * BUDGET_BYTES
        component = (out_features + in_features) * NUMBER_BITS / 8 + 2 * SCALE_DTYPE.itemsize
        return min(max(0, math.floor((budget - CHECKSUM) / component)), out_features, in_features)

    def bytes(self, out_features: int, in_features: int, rank: int) -> int:
        return rank * 2 * SCALE_DTYPE.itemsize + _stream_bytes(rank * (out_features + in_features))

    def factorise(
        self, matrix: Tensor, rank: int, *, n_oversamples: int, n_iter: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        return krylov(matrix, rank, n_oversamples=n_oversamples, n_iter=n_iter, seed=seed)

    def encode(self, b: Tensor, a: Tensor) -> dict[str, Tensor]:
        rows = [factor.double().cpu() for factor in (b.T, a)]
        sizes = [factor.square().mean(1).sqrt() for factor in rows]
        units = torch.cat([f / s.clamp_min(1e-300)[:, None] for f, s in zip(rows, sizes, strict=True)], dim=1)
        weights = sizes[0] * sizes[1]  # of a component's numbers: sigma / sqrt(out * in)
        room = _stream_bytes(units.numel()) - CHECKSUM
        for step in _steps(weights, units.shape[1], 8 * room):
            widths = _widths(weights, step)
            numbers = _rounded(units, widths)
            stream = _written(numbers, widths)
            if len(stream) <= room:
                break
        b_gain, a_gain = (_gain(numbers[:, part], units[:, part]) for part in _parts(len(b)))
        scales = torch.stack([widths, weights * b_gain * a_gain * widths], dim=1).to(SCALE_DTYPE)
        whole = np.frombuffer(_checksum(numbers) + stream + bytes(room - len(stream)), dtype=np.uint8).copy()
        stored = (scales, torch.from_numpy(whole)[None])
        return {suffix: part.to(a.device) for suffix, part in zip(self.suffixes, stored, strict=True)}

    def check(self, stored: Mapping[str, Tensor], out_features: int, in_features: int) -> None:
        scales, stream = (stored[suffix] for suffix in self.suffixes)
        rank = scales.shape[:1].numel()
        check_tensor(self.suffixes[0], scales, SCALE_DTYPE, (rank, 2))
        check_tensor(self.suffixes[1], stream, torch.uint8, (1, _stream_bytes(rank * (out_features + in_features))))

    def decode(self, stored: Mapping[str, Tensor], out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        self.check(stored, out_features, in_features)
        scales, stream = (stored[suffix] for suffix in self.suffixes)
        widths, gains = scales.double().cpu().T
        whole = stream.cpu().numpy().tobytes()
        numbers = _read(whole[CHECKSUM:], widths, out_features + in_features)
        if _checksum(numbers) != whole[:CHECKSUM]:
            raise ValueError(f"{self.suffixes[1]} does not decode to the numbers that were encoded")
        b, a = (numbers[:, part].double() for part in _parts(out_features))
        b, a = b / widths.clamp_min(LEAST_WIDTH)[:, None], a * gains[:, None]
        return b.T.float().to(stream.device), a.float().to(stream.device)


def entropy(dtype: torch.dtype) -> Code:
    """Whole numbers of one step a matrix, whatever the dtype of the bundle.

    Raises:
        MissingExtraError: constriction is not installed.
    """
    _constriction()
    return Entropy()


def _constriction() -> Any:
    with needs_extra("entropy"):
        import constriction

    return constriction.stream


def _stream_bytes(count: int) -> int:
    """Of a matrix with so many numbers in its factors: whole words."""
    return CHECKSUM + int(count * NUMBER_BITS / 8) // WORD * WORD if count else 0


def _parts(out_features: int) -> tuple[slice, slice]:
    """Where B's and A's numbers of a component lie."""
    return slice(out_features), slice(out_features, None)


def _steps(weights: Tensor, count: int, bits: int) -> Iterator[float]:
    """Steps to try: the one that a normal distribution would need, then larger ones, at last one that leaves nothing.

    Args:
        weights: of the components. count: numbers of each. bits: that there are for all.
    """
    largest = float(weights.max())
    low, high = math.log2(largest or 1.0) - math.log2(MOST_WIDTH), math.log2(largest or 1.0) + 2
    for _ in range(30):
        middle = (low + high) / 2
        widths = _widths(weights, 2.0**middle).numpy()
        needed = count * float(np.interp(np.log2(widths[widths > 0]), *_entropies()).sum())
        low, high = (middle, high) if needed > bits else (low, middle)
    for tries in range(60):
        yield 2.0 ** (high + (tries - 3) * 0.005)
    yield 2.0**high * 2**12


def _widths(weights: Tensor, step: float) -> Tensor:
    """Standard deviations of the components' numbers in steps, as they are stored; 0 where a component is left out."""
    widths = (weights / step).clamp_max(MOST_WIDTH).to(SCALE_DTYPE).double()
    return torch.where(widths < LEAST_WIDTH, 0.0, widths)


def _rounded(units: Tensor, widths: Tensor) -> Tensor:
    """Nearest whole numbers of rows with standard deviation one, each row in its width. int16."""
    reach = (REACH * widths).ceil()[:, None]
    return (units * widths[:, None]).round().clamp(-reach, reach).to(torch.int16)


def _gain(numbers: Tensor, units: Tensor) -> Tensor:
    """By what a row of numbers is multiplied to be nearest to what it was rounded from."""
    levels = numbers.double()
    return (levels * units).sum(1) / levels.square().sum(1).clamp_min(1.0)


def _checksum(numbers: Tensor) -> bytes:
    return zlib.crc32(numbers.numpy().astype("<i2").tobytes()).to_bytes(CHECKSUM, "little")


def _written(numbers: Tensor, widths: Tensor) -> bytes:
    """The numbers [r, n] as a stream, the first component outermost."""
    coder = _constriction().stack.AnsCoder()
    for row, width in reversed([*zip(numbers.numpy(), widths.tolist(), strict=True)]):
        if width:
            coder.encode_reverse(row.astype(np.int32) + math.ceil(REACH * width), _model(width))
    words: np.ndarray[Any, np.dtype[np.uint32]] = coder.get_compressed()
    return words.astype("<u4").tobytes()


def _read(stream: bytes, widths: Tensor, count: int) -> Tensor:
    """What `_written` was given: [r, count]. No stream ends with a word of zeros, which are what fills its room."""
    words = np.trim_zeros(np.frombuffer(stream, dtype="<u4"), "b")
    coder = _constriction().stack.AnsCoder(words.astype(np.uint32))
    numbers = np.zeros((len(widths), count), dtype=np.int16)
    for row, width in zip(numbers, widths.tolist(), strict=True):
        if width:
            row[:] = coder.decode(_model(width), count) - math.ceil(REACH * width)
    return torch.from_numpy(numbers)


@lru_cache(maxsize=4096)
def _model(width: float) -> Any:
    return _constriction().model.Categorical(_likelihoods(width).astype(np.float32), perfect=False)


def _likelihoods(width: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of the whole numbers within reach of a normal number of this standard deviation, the lowest first."""
    reach = math.ceil(REACH * width)
    edges = torch.arange(-reach, reach + 2, dtype=torch.float64) - 0.5
    likely = torch.special.ndtr(edges / width).diff().clamp_min(LEAST_LIKELY / max(1.0, width))
    return np.asarray((likely / likely.sum()).numpy())


@lru_cache(maxsize=1)
def _entropies() -> tuple[list[float], list[float]]:
    """log2 of a width, and the bits of a number of that width."""
    places = np.linspace(math.log2(LEAST_WIDTH) - 0.1, math.log2(MOST_WIDTH), 100).tolist()
    tables = [_likelihoods(2.0**place) for place in places]
    return places, [float(-(table * np.log2(table)).sum()) for table in tables]
