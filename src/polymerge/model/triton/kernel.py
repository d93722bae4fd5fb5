"""Triton kernels that add coded residuals to the base's output: y = rho y + B (A x), every token with its expert's.

`_shrink` makes z = A x and `_expand` adds B z. Factors are read in their code and become numbers in registers. A level
is a whole number and a half, which 16-bit floats hold exactly: products are of levels, in steps of one group, whose
scale is then applied in float32 (to the sum over a group of A's columns; to z for a group of B's rows). Where a byte
has two levels of one group it is loaded once, and even columns are multiplied apart from odd ones.

Imported only where the kernel is asked for. Knows how tensors lie in memory; does not know modules or bundles.
`_decode` writes numbers out, for a prompt, whose many tokens would decode them again and again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...method.quantised import GROUP, group_size
from .grouped import Residuals, Rows, Tiles

# Components of a step. A tensor core takes 16 at least.
BLOCK_RANK = 32
# Components that are decoded together.
DECODED_ROWS = 8
LAUNCH = {"num_warps": 4, "num_stages": 3}
# float32 on tensor cores, as three products: nearly as exact, and registers suffice, which they do not for "ieee".
PRECISION = tl.constexpr("tf32x3")
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _levels(numbers, row, column, inside, stride, BITS: tl.constexpr):
    """Levels at these rows and columns, in float32; for BITS 0 the numbers themselves."""
    if BITS == 0:
        levels = tl.load(numbers + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    elif BITS == 8:
        levels = tl.load(numbers + row * stride + column, mask=inside, other=0).to(tl.float32) - 127.5
    else:
        byte = tl.load(numbers + row * stride + column // 2, mask=inside, other=0).to(tl.int32)
        levels = ((byte >> (column % 2 * 4)) & 15).to(tl.float32) - 7.5
    return levels


@triton.jit
def _pairs(numbers, row, place, inside, stride):
    """Levels of 4 bits in these bytes of rows: those of even columns and those of odd ones, in float32."""
    byte = tl.load(numbers + row * stride + place, mask=inside, other=0)
    return (byte & 15).to(tl.float32) - 7.5, (byte >> 4).to(tl.float32) - 7.5


@triton.jit
def _shrink(
    x, z, numbers, scales, order, table, starts, width, stride, z_stride,
    BITS: tl.constexpr, STEP: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
    DOT: tl.constexpr, PAIRED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """z [M, ranks] float32, in the order of the tiles. Grid: tiles, blocks of the rank."""
    tile = table + 3 * tl.program_id(0)
    expert, first = tl.load(tile), tl.load(tile + 1)
    begin = tl.load(starts + expert)
    rank = tl.load(starts + expert + 1) - begin
    component = tl.program_id(1) * RANK + tl.arange(0, RANK)
    if tl.program_id(1) * RANK < rank:
        place = first + tl.arange(0, TOKENS)
        real = place < tl.load(tile + 2)
        token = tl.load(order + place, mask=real, other=0).to(tl.int64)
        row = (begin + component).to(tl.int64)
        kept = component < rank
        groups = (width + STEP - 1) // STEP
        total = tl.full((TOKENS, RANK), 0.0, tl.float32)
        for group in range(groups):
            if PAIRED:
                within = tl.arange(0, COLUMNS // 2)
                byte = group * (STEP // 2) + within
                inside = within < STEP // 2
                odd = inside
                if not WHOLE:
                    inside = inside & (2 * byte < width)
                    odd = inside & (2 * byte + 1 < width)
                source = x + token[:, None] * width + 2 * byte[None, :]
                low, high = _pairs(numbers, row[None, :], byte[:, None], kept[None, :] & inside[:, None], stride)
                part = tl.load(source, mask=real[:, None] & inside[None, :], other=0.0)
                product = tl.dot(part.to(DOT), low.to(DOT), input_precision=PRECISION)
                part = tl.load(source + 1, mask=real[:, None] & odd[None, :], other=0.0)
                product += tl.dot(part.to(DOT), high.to(DOT), input_precision=PRECISION)
            else:
                within = tl.arange(0, COLUMNS)
                column = group * STEP + within
                inside = (within < STEP) & (column < width)
                part = tl.load(
                    x + token[:, None] * width + column[None, :], mask=real[:, None] & inside[None, :], other=0.0
                )
                levels = _levels(
                    numbers, row[None, :], column[:, None], kept[None, :] & inside[:, None], stride, BITS
                )  # [COLUMNS, RANK]
                product = tl.dot(part.to(DOT), levels.to(DOT), input_precision=PRECISION)
            if BITS != 0:
                scale = tl.load(scales + row * groups + group, mask=kept, other=0.0).to(tl.float32)
                product = product * scale[None, :]
            total += product
        target = z + place.to(tl.int64)[:, None] * z_stride + component[None, :]
        tl.store(target, total, mask=real[:, None] & kept[None, :])


@triton.jit
def _scaled(z, scales, place, real, component, kept, row, groups, z_stride, BITS: tl.constexpr):
    """z of these tokens and components, times the scale that a component has for this group of columns."""
    part = tl.load(
        z + place.to(tl.int64)[:, None] * z_stride + component[None, :],
        mask=real[:, None] & kept[None, :],
        other=0.0,
    )
    if BITS != 0:
        scale = tl.load(scales + row * groups + tl.program_id(1), mask=kept, other=0.0).to(tl.float32)
        part = part * scale[None, :]
    return part


@triton.jit
def _put(y, token, column, real, inside, width, ratio, total):
    """y := rho y + the total, at these tokens and columns."""
    target = y + token[:, None] * width + column[None, :]
    mask = real[:, None] & inside[None, :]
    base = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (base * ratio + total).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _expand(
    y, z, numbers, scales, order, table, starts, ratios, width, stride, z_stride,
    BITS: tl.constexpr, STEP: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
    DOT: tl.constexpr, PAIRED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """y [tokens, width] in place. Grid: tiles, groups of the output."""
    tile = table + 3 * tl.program_id(0)
    expert, first = tl.load(tile), tl.load(tile + 1)
    begin = tl.load(starts + expert)
    rank = tl.load(starts + expert + 1) - begin
    ratio = tl.load(ratios + expert)
    place = first + tl.arange(0, TOKENS)
    real = place < tl.load(tile + 2)
    token = tl.load(order + place, mask=real, other=0).to(tl.int64)
    groups = (width + STEP - 1) // STEP
    if PAIRED:
        within = tl.arange(0, COLUMNS // 2)
        byte = tl.program_id(1) * (STEP // 2) + within
        inside = within < STEP // 2
        last = inside
        if not WHOLE:
            inside = inside & (2 * byte < width)
            last = inside & (2 * byte + 1 < width)
        even = tl.full((TOKENS, COLUMNS // 2), 0.0, tl.float32)
        odd = tl.full((TOKENS, COLUMNS // 2), 0.0, tl.float32)
        for block in range(0, rank, RANK):
            component = block + tl.arange(0, RANK)
            row = (begin + component).to(tl.int64)
            kept = component < rank
            part = _scaled(z, scales, place, real, component, kept, row, groups, z_stride, BITS).to(DOT)
            low, high = _pairs(numbers, row[:, None], byte[None, :], kept[:, None] & inside[None, :], stride)
            even += tl.dot(part, low.to(DOT), input_precision=PRECISION)
            odd += tl.dot(part, high.to(DOT), input_precision=PRECISION)
        _put(y, token, 2 * byte, real, inside, width, ratio, even)
        _put(y, token, 2 * byte + 1, real, last, width, ratio, odd)
    else:
        within = tl.arange(0, COLUMNS)
        column = tl.program_id(1) * STEP + within
        inside = (within < STEP) & (column < width)
        total = tl.full((TOKENS, COLUMNS), 0.0, tl.float32)
        for block in range(0, rank, RANK):
            component = block + tl.arange(0, RANK)
            row = (begin + component).to(tl.int64)
            kept = component < rank
            part = _scaled(z, scales, place, real, component, kept, row, groups, z_stride, BITS).to(DOT)
            levels = _levels(
                numbers, row[:, None], column[None, :], kept[:, None] & inside[None, :], stride, BITS
            )  # [RANK, COLUMNS]
            total += tl.dot(part, levels.to(DOT), input_precision=PRECISION)
        _put(y, token, column, real, inside, width, ratio, total)


@triton.jit
def _decode(
    out, numbers, scales, first, out_rows, width, stride,
    BITS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [rows, width], the numbers of rows from `first` on. Grid: blocks of rows, groups."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = (first + place).to(tl.int64)
    groups = (width + STEP - 1) // STEP
    within = tl.arange(0, COLUMNS)
    column = tl.program_id(1) * STEP + within
    inside = (place < out_rows)[:, None] & ((within < STEP) & (column < width))[None, :]
    levels = _levels(numbers, row[:, None], column[None, :], inside, stride, BITS)
    scale = tl.load(scales + row * groups + tl.program_id(1), mask=place < out_rows, other=0.0).to(tl.float32)
    target = out + place.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(target, (levels * scale[:, None]).to(out.dtype.element_ty), mask=inside)


# Triton decides when a function is decorated whether it will be compiled or, with TRITON_INTERPRET=1, run by numpy.
INTERPRETED = not isinstance(_shrink, triton.JITFunction)


def runs_on(device: torch.device) -> bool:
    """Whether the kernels can be started on tensors of this device."""
    return INTERPRETED or device.type == "cuda"


def add_fused(y: Tensor, x: Tensor, residuals: Residuals, tiles: Tiles) -> None:
    """y := rho y + B (A x), in place.

    Args:
        y: [M, out], the base's product. float32, float16 or bfloat16, as x.
        x: [M, in]. Both contiguous.
    """
    if not len(tiles.table):
        return
    a, b = residuals.a, residuals.b
    highest = max(residuals.ranks[expert] for expert in tiles.experts)
    blocks = triton.cdiv(highest, BLOCK_RANK)
    z = torch.empty(len(tiles.order), max(blocks, 1) * BLOCK_RANK, dtype=torch.float32, device=x.device)
    places = (tiles.order, tiles.table, residuals.starts)
    with torch.cuda.device_of(y):
        if blocks:
            _shrink[(len(tiles.table), blocks)](
                x, z, a.numbers, _scales(a), *places, a.width, a.numbers.stride(0), z.stride(0),
                **_settings(a.bits, a.width, x.dtype, tiles.size),
            )  # fmt: skip
        shape = _settings(b.bits, b.width, x.dtype, tiles.size)
        _expand[(len(tiles.table), triton.cdiv(b.width, shape["STEP"]))](
            y, z, b.numbers, _scales(b), *places, residuals.ratios, b.width, b.numbers.stride(0), z.stride(0), **shape
        )


def decoded(rows: Rows, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """As `Rows.decoded`, in one pass."""
    if rows.scales is None:
        return rows.decoded(first, last, dtype)
    out = torch.empty(last - first, rows.width, dtype=dtype, device=rows.numbers.device)
    step = group_size(rows.width)
    grid = triton.cdiv(len(out), DECODED_ROWS), triton.cdiv(rows.width, step)
    with torch.cuda.device_of(out):
        _decode[grid](
            out, rows.numbers, rows.scales, first, len(out), rows.width, rows.numbers.stride(0),
            BITS=rows.bits, STEP=step, ROWS=DECODED_ROWS, COLUMNS=triton.next_power_of_2(step),
        )  # fmt: skip
    return out


@functools.lru_cache
def _settings(bits: int, width: int, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    step = group_size(width) if bits else GROUP
    paired = bits == 4 and step % 2 == 0
    return {
        "BITS": bits,
        "STEP": step,
        "TOKENS": tokens,
        "RANK": BLOCK_RANK,
        "COLUMNS": max(32 if paired else 16, triton.next_power_of_2(step)),
        "DOT": tl.float32 if INTERPRETED else DTYPES[dtype],  # the interpreter multiplies bfloat16 as whole numbers
        "PAIRED": paired,
        "WHOLE": width % step == 0,  # no group ends early: then loads are wide ones
        **LAUNCH,
    }


def _scales(rows: Rows) -> Tensor:
    return rows.numbers if rows.scales is None else rows.scales  # a pointer that no kernel with BITS 0 follows
