"""Numbers that a merge cannot use are found; copies are compared at their rounding."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from polymerge.errors import SourceError
from polymerge.merging.reading import check_values, checked_digest, reader_of, same_numbers
from polymerge.sources.opening import open_checkpoint


def test_a_reader_gives_rows_of_the_right_expert(tmp_path: Path) -> None:
    checkpoints = {}
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text("{}")
        tensors = {"x": torch.arange(12.0).view(4, 3) + 100 * number, "n": torch.tensor(number)}
        save_file(tensors, tmp_path / str(number) / "model.safetensors")
        checkpoints[f"e{number}"] = open_checkpoint(str(tmp_path / str(number)))
    read = reader_of(checkpoints)
    assert torch.equal(read("e1", "x", 1, 3), torch.arange(12.0).view(4, 3)[1:3] + 100)
    assert read("e0", "x", 0, 4).shape == (4, 3)
    assert read("e1", "n", 0, 1).item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_are_counted_that_are_not_finite(dtype: torch.dtype) -> None:
    values = torch.ones(20, dtype=dtype)
    check_values(values, torch.float16, "e", "x")
    values[3], values[7] = float("nan"), float("-inf")
    with pytest.raises(SourceError, match=r"'e'.*'x' holds 2 NaN or infinite"):
        check_values(values, torch.float16, "e", "x")


@pytest.mark.parametrize(
    ("value", "dtype", "fits"),
    [
        (65504.0, torch.float16, True),
        (-65536.0, torch.float16, False),
        (-65536.0, torch.bfloat16, True),
        (1e39, torch.bfloat16, False),
        (1e39, torch.float32, False),
    ],
)
def test_the_bundles_dtype_is_the_limit(value: float, dtype: torch.dtype, fits: bool) -> None:
    values = torch.tensor([1.0, value], dtype=torch.float64)
    if fits:
        check_values(values, dtype, "e", "x")
        return
    with pytest.raises(SourceError, match="too large for"):
        check_values(values, dtype, "e", "x")


def test_integers_and_empty_tensors_have_nothing_to_check() -> None:
    check_values(torch.tensor([10**9]), torch.float16, "e", "x")
    check_values(torch.empty(0, 4), torch.float16, "e", "x")


def test_the_digest_is_of_the_bytes() -> None:
    values = torch.arange(5, dtype=torch.float16)
    assert checked_digest(values, torch.float16, "e", "x") == hashlib.sha256(values.numpy().tobytes()).hexdigest()


def test_copies_are_the_same_up_to_the_coarser_rounding() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert same_numbers(values, values.bfloat16()) and same_numbers(values.half(), values)
    assert not same_numbers(values, values * (1 + 1e-5))
    assert not same_numbers(values.bfloat16(), values.bfloat16() * 1.02)
    assert same_numbers(torch.tensor([True, False]), torch.tensor([1, 0], dtype=torch.uint8))
    assert not same_numbers(torch.tensor([2**40]), torch.tensor([2**40 + 1]))
    assert same_numbers(torch.tensor([float("-inf")]), torch.tensor([float("-inf")]).half())
