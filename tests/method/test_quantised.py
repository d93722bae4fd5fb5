"""int8 and int4: packing loses nothing, rounding is near the best there is, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch

from polymerge.method.quantised import GROUP, Quantised, decoded, dequantise, pack, quantise, unpack

# Squared error of a standard normal number at the best uniform step (Max, 1960, table II).
BEST_UNIFORM = {4: 0.01154, 8: 0.0001}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 2, 77, 128, 130])
def test_packing_loses_nothing(bits: int, count: int) -> None:
    numbers = torch.randint(0, 2**bits, (3, count), dtype=torch.uint8)
    packed = pack(numbers, bits)
    assert packed.shape == (3, -(-count * bits // 8))
    assert torch.equal(unpack(packed, bits, count), numbers)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_near_the_best_uniform_quantiser(bits: int) -> None:
    rows = normal(64, 8 * GROUP)
    numbers, scales = quantise(rows, bits)
    assert float((dequantise(numbers, scales, bits) - rows).square().mean()) < 1.05 * BEST_UNIFORM[bits]


def test_rows_of_any_number_and_order_in_memory_are_rounded_alike() -> None:
    rows = normal(90, 1500)
    for given in (rows, rows.T.contiguous().T):
        numbers, scales = quantise(given, 4)
        apart = [quantise(row[None], 4) for row in rows]
        assert torch.equal(numbers, torch.cat([q for q, _ in apart]))
        assert torch.equal(scales, torch.cat([s for _, s in apart]))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("count", [1, 5, 129, 576])
def test_numbers_of_any_size_come_back(size: float, count: int) -> None:
    rows = normal(3, count) * size
    numbers, scales = quantise(rows, 8)
    assert scales.shape == (3, -(-count // GROUP))
    torch.testing.assert_close(dequantise(numbers, scales, 8), rows, rtol=0, atol=0.02 * size)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 2, 77, 128, 576, 301])
def test_bytes_are_decoded_as_their_numbers(bits: int, count: int) -> None:
    numbers, scales = quantise(normal(3, count), bits)
    expected = (numbers.float() - (2 ** (bits - 1) - 0.5)) * scales.float().repeat_interleave(
        -(-count // scales.shape[1]), dim=1
    )[:, :count]
    assert torch.equal(dequantise(numbers, scales, bits), expected)
    assert torch.equal(decoded(pack(numbers, bits), scales, bits, count), expected)


def test_one_huge_number_spoils_only_its_own_group() -> None:
    rows = normal(1, 4 * GROUP)
    rows[0, 0] = 1e4
    numbers, scales = quantise(rows, 8)
    error = (dequantise(numbers, scales, 8) - rows).abs()
    assert float(error[0, GROUP:].max()) < 0.02


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored | {"lora_A.int4": stored["lora_A.int4"][:-1]},
        lambda stored: stored | {"lora_B.int4": stored["lora_B.int4"].float()},
        lambda stored: stored | {"lora_B.int4_scale": stored["lora_B.int4_scale"].repeat(1, 2)},
        lambda stored: stored | {"lora_A.int4": stored["lora_A.int4"][0, 0]},
    ],
)
def test_decoding_refuses_what_does_not_fit(damage: object) -> None:
    code = Quantised(4)
    stored = code.encode(normal(20, 3), normal(3, 30))
    with pytest.raises(ValueError, match="expected"):
        code.decode(damage(stored), 20, 30)  # type: ignore[operator]
