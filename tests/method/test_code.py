"""What every code promises: the bytes and the keys that it says, and factors that come back."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from polymerge.method.codes import CODES, PLAIN, code_of
from polymerge.method.rsvd import rank_for_rate, rsvd
from tests.method.test_quantised import normal

INSTALLED = [name for name in CODES if name in PLAIN or find_spec("constriction")]


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (7, 1001), (129, 300)])
def test_a_code_stores_what_it_says_and_never_more_than_16_bit_factors(name: str, shape: tuple[int, int]) -> None:
    code = code_of(name, torch.bfloat16)
    for rate in (0.5, 0.9, 0.95, 0.99, 1.0):
        rank = code.rank(*shape, rate)
        published = rank_for_rate(*shape, rate)
        assert code.bytes(*shape, rank) <= 2 * published * sum(shape)
        assert bool(rank) == bool(published)
        if not rank:
            continue
        b, a = normal(shape[0], rank), normal(rank, shape[1])
        stored = code.encode(b, a)
        assert tuple(stored) == code.suffixes
        assert sum(tensor.nbytes for tensor in stored.values()) == code.bytes(*shape, rank)
        b_again, a_again = code.decode(stored, *shape)
        assert b_again.shape == b.shape and a_again.shape == a.shape
        few = 8 * code.bytes(*shape, rank) / (rank * sum(shape)) < 4  # bits a number
        assert float((b_again @ a_again - b @ a).norm() / (b @ a).norm()) < (0.3 if few else 0.17)


def test_at_equal_bytes_fewer_bits_keep_more_of_a_slow_spectrum() -> None:
    left, right = (torch.linalg.qr(normal(256, 256, seed=seed)).Q for seed in (1, 2))
    matrix = left * torch.arange(1, 257).float() ** -0.8 @ right
    lost = {}
    for name in INSTALLED:
        code = code_of(name, torch.bfloat16)
        b, a = code.decode(code.encode(*rsvd(matrix, code.rank(256, 256, 0.9))), 256, 256)
        lost[name] = float((matrix - b @ a).square().sum() / matrix.square().sum())
    assert lost["int4"] < 0.8 * lost["int8"] < 0.8 * 0.8 * lost["factors"]
    assert lost.get("entropy", 0.0) < 0.8 * lost["int4"]
