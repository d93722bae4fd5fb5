"""Two Triton kernels for a decoding step: rho y + B (A x), every row with the expert that a tensor names.

`_expand` adds B z to the base's output. z = A x comes from the base's own product where A stands below the base's
matrix, or from `_shrink`, which meets only the factors of experts that a row has, in parts of the columns, so that few
rows keep many multiprocessors busy. A program is one expert's and ends at once where no row has it: what is started
depends on shapes alone. Knows how tensors lie in memory; does not know batches or modules.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Components and columns of a step of either kernel, columns of an output block, and of a part at least.
RANK, COLUMNS = 32, 128
DEPTH, OUTPUTS = 64, 64
PART, MOST_PARTS = 1024, 4
# float32 on tensor cores, as three products: nearly as exact, and registers suffice, which they do not for "ieee".
PRECISION = tl.constexpr("tf32x3")
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _shrink(
    x, z, a, numbers, starts, rows, width, z_stride,
    ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """z [parts, rows, sum of r]. Grid: experts, blocks of the rank, parts of the columns."""
    expert = tl.program_id(0)
    begin = tl.load(starts + expert)
    rank = tl.load(starts + expert + 1) - begin
    row = tl.arange(0, ROWS)
    mine = tl.load(numbers + row, mask=row < rows, other=-1) == expert
    if (tl.program_id(1) * RANK < rank) & (tl.max(mine.to(tl.int32), axis=0) > 0):
        component = tl.program_id(1) * RANK + tl.arange(0, RANK)
        kept = component < rank
        factor = a + (begin + component).to(tl.int64)[None, :] * width
        total = tl.full((ROWS, RANK), 0.0, tl.float32)
        for step in range(0, SPAN, COLUMNS):
            column = tl.program_id(2) * SPAN + step + tl.arange(0, COLUMNS)
            inside = column < width
            part = tl.load(x + row[:, None] * width + column[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
            values = tl.load(factor + column[:, None], mask=kept[None, :] & inside[:, None], other=0.0)
            total += tl.dot(part.to(DOT), values.to(DOT), input_precision=PRECISION)
        target = z + (tl.program_id(2) * rows + row)[:, None] * z_stride + (begin + component)[None, :]
        tl.store(target, total, mask=mine[:, None] & kept[None, :])


@triton.jit
def _expand(
    y, out, z, b, numbers, starts, ratios, rows, width, y_stride, z_stride, part_stride,
    PARTS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out [rows, width]; it may be y. Grid: experts and the average, blocks of the output."""
    expert = tl.program_id(0)
    begin = tl.load(starts + expert)
    rank = tl.load(starts + expert + 1) - begin
    ratio = tl.load(ratios + expert)
    row = tl.arange(0, ROWS)
    mine = tl.load(numbers + row, mask=row < rows, other=-1) == expert
    if tl.max(mine.to(tl.int32), axis=0) > 0:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        mask = mine[:, None] & inside[None, :]
        base = tl.load(y + row[:, None] * y_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        for block in range(0, rank, RANK):
            component = block + tl.arange(0, RANK)
            kept = component < rank
            values = tl.load(
                b + (begin + component).to(tl.int64)[:, None] * width + column[None, :],
                mask=kept[:, None] & inside[None, :],
                other=0.0,
            )
            place = z + row[:, None] * z_stride + (begin + component)[None, :]
            shrunk = tl.load(place, mask=mine[:, None] & kept[None, :], other=0.0)
            for part in tl.static_range(1, PARTS):
                shrunk += tl.load(place + part * part_stride, mask=mine[:, None] & kept[None, :], other=0.0)
            total += tl.dot(shrunk.to(DOT), values.to(DOT), input_precision=PRECISION)
        target = out + row[:, None] * width + column[None, :]
        tl.store(target, (base * ratio + total).to(out.dtype.element_ty), mask=mask)


# Triton decides when a function is decorated whether it will be compiled or, with TRITON_INTERPRET=1, run by numpy.
INTERPRETED = not isinstance(_shrink, triton.JITFunction)


def shrink(x: Tensor, a: Tensor, starts: Tensor, numbers: Tensor, highest: int) -> Tensor:
    """A x in parts, whose sum it is: [parts, B, sum of r] float32, in which a row has its own expert's components.

    Args:
        x: [B, in]; float32, float16 or bfloat16. a: [sum of r, in], like x. Both contiguous.
        starts: [N + 2] int32, where each expert's components begin; the average, number N, has none.
        numbers: [B] int64, every row's expert. highest: the largest rank.
    """
    rows, width = x.shape
    span = COLUMNS * triton.cdiv(max(PART, triton.cdiv(width, MOST_PARTS)), COLUMNS)
    parts = triton.cdiv(width, span)
    z = torch.empty(parts, rows, len(a), dtype=torch.float32, device=x.device)
    grid = (len(starts) - 2, triton.cdiv(highest, RANK), parts)
    if highest:
        with torch.cuda.device_of(x):
            _shrink[grid](
                x, z, a, numbers, starts, rows, width, z.stride(1), **_shape(x), RANK=RANK, COLUMNS=COLUMNS, SPAN=span
            )
    return z


def expand(y: Tensor, out: Tensor, z: Tensor, b: Tensor, starts: Tensor, ratios: Tensor, numbers: Tensor) -> None:
    """out := rho y + B z.

    Args:
        y: [B, out], the base's product; its rows may lie apart. out: the same, contiguous; it may be y.
        z: [parts, B, sum of r], as `shrink` gives it or one part like y; its rows may lie apart.
        b: [sum of r, out], contiguous. starts, numbers: as `shrink`'s. ratios: [N + 1] float32.
    """
    rows, width = y.shape
    grid = (len(starts) - 1, triton.cdiv(width, OUTPUTS))
    with torch.cuda.device_of(y):
        _expand[grid](
            y, out, z, b, numbers, starts, ratios, rows, width, y.stride(0), z.stride(1), z.stride(0),
            PARTS=len(z), **_shape(y), RANK=DEPTH, COLUMNS=OUTPUTS,
        )  # fmt: skip


def _shape(rows: Tensor) -> dict[str, Any]:
    return {
        "ROWS": max(16, triton.next_power_of_2(len(rows))),
        "DOT": tl.float32 if INTERPRETED else DTYPES[rows.dtype],  # the interpreter has no products of bfloat16
    }
