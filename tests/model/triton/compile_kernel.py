"""Compiles the Triton kernels ahead of time, for GPUs that need not be there. Run by test_kernel.py."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from polymerge.model.triton import kernel

TYPES = {
    "x": "*{}", "y": "*{}", "z": "*fp32", "numbers": "*u8", "scales": "*bf16", "order": "*i32", "table": "*i32",
    "starts": "*i32", "ratios": "*fp32", "width": "i32", "stride": "i32", "z_stride": "i32",
}  # fmt: skip
# dtype of x and y, of the products, tokens of a tile
WIDEST = [("bf16", tl.bfloat16, 64), ("fp32", tl.float32, 64)]


def compiled(function: Any, arch: int, bits: int, dtype: str, dot: Any, tokens: int) -> Any:
    constants = {"BITS": bits, "STEP": 128, "TOKENS": tokens, "RANK": kernel.BLOCK_RANK, "COLUMNS": 128, "DOT": dot}
    signature = {name: TYPES.get(name, "constexpr").format(dtype) for name in function.arg_names}
    if bits == 0:
        signature |= {"numbers": "*bf16", "scales": "*bf16"}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(function.arg_names) if name in TYPES}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32))


if __name__ == "__main__":
    kernels = [
        compiled(function, arch, bits, *kind)
        for function in (kernel._shrink, kernel._expand)
        for arch in (80, 90)
        for bits in (0, 4, 8)
        for kind in WIDEST
    ]
    print(sum("cubin" in one.asm for one in kernels))
