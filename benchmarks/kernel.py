"""Milliseconds of one linear layer under a batch that mixes experts: the base alone; factors of the published rank;
a code's factors, decoded when they were loaded; and the same packed: read by the Triton kernels on a GPU, on a CPU
decoded at every step.

Factors are random, of the rank that a compress rate pays for; rows take the experts in turn. The two ways to hold a
code must agree before they are timed.

    OMP_NUM_THREADS=1 python benchmarks/kernel.py --shapes 576x1536 --rows 1 12 --tokens 1 64 --dtype float32
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from polymerge.method.codes import CODES, code_of
from polymerge.method.rsvd import rank_for_rate
from polymerge.model.assignment import Assignment
from polymerge.model.linear import ExpertLinear, MixedLinear
from polymerge.model.triton.check import objection
from polymerge.model.triton.linear import CodedLinear

# q and o, gate and up, down of Llama-3-8B.
WAYS = ("published", "decoded", "packed")
SHAPES = ("4096x4096", "14336x4096", "4096x14336")


def layers(
    shape: tuple[int, int], code_name: str, rate: float, experts: int, state: Assignment, dtype: torch.dtype
) -> dict[str, ExpertLinear]:
    """The same layer with factors of the published rank, with the code's decoded, and with the code's packed."""
    out_features, in_features = shape
    code, device = code_of(code_name, dtype), state.device
    rank = code.rank(out_features, in_features, rate)
    weight = torch.randn(shape, device=device, dtype=dtype) / in_features**0.5

    def pair(out: int, inner: int, rank: int) -> tuple[Tensor, Tensor]:
        a = torch.randn(rank, inner, device=device) / inner**0.5
        return a.to(dtype), (torch.randn(out, rank, device=device) / rank**0.5).to(dtype)

    stored = []
    for _ in range(experts):
        a, b = pair(out_features, in_features, rank)
        stored.append(code.encode(b.float(), a.float()))
    decoded = [(a.to(dtype), b.to(dtype)) for b, a in (code.decode(tensors, *shape) for tensors in stored)]
    ratios, biases = [1.1] * experts, [None] * experts
    published = [pair(out_features, in_features, rank_for_rate(out_features, in_features, rate)) for _ in stored]
    return {
        "published": MixedLinear(state, weight, None, published, ratios, biases).to(device),
        "decoded": MixedLinear(state, weight, None, decoded, ratios, biases).to(device),
        "packed": CodedLinear(state, weight, None, stored, code, ratios, biases, fused=device.type == "cuda").to(
            device
        ),
    }


def milliseconds(run: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    """Median of `repeats`, after a third as many and one to warm up."""
    taken = []
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # of a CPU others may have a part
    for number in range(repeats + repeats // 3 + 1):
        began = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number > repeats // 3:
            taken.append((clock() - began) * 1000)
    return statistics.median(taken)


def measure(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    dtype, lines = getattr(torch, options.dtype), []
    state = Assignment([f"e{n}" for n in range(options.experts)], device)
    for text in options.shapes:
        out_features, in_features = map(int, text.split("x"))
        shape = (out_features, in_features)
        reason = objection([shape], code_of(options.code, dtype), device, dtype)
        if reason and device.type == "cuda":
            raise SystemExit(f"the kernel cannot be used: {reason}")
        both = layers(shape, options.code, options.rate, options.experts, state, dtype)
        held = {name: sum(buffer.nbytes for buffer in layer.buffers()) for name, layer in both.items()}
        for rows in options.rows:
            state.set([f"e{n % options.experts}" for n in range(rows)], rows)
            for tokens in options.tokens:
                x = torch.randn(rows, tokens, shape[1], device=device, dtype=dtype)
                plain, packed = (both[way](x).float() for way in ("decoded", "packed"))
                apart = float((plain - packed).norm() / plain.norm())
                if not apart < 0.02:
                    raise SystemExit(f"{text}: the two ways differ by {apart:.2g} of the output")
                times = {name: milliseconds(run, device, options.repeats) for name, run in _runs(both, x).items()}
                lines.append({"shape": text, "rows": rows, "tokens": tokens, "bytes": held, "milliseconds": times})
    return lines


def _runs(both: dict[str, ExpertLinear], x: Tensor) -> dict[str, Callable[[], Tensor]]:
    base = partial(F.linear, x, both["decoded"].weight)
    return {"base": base} | {name: partial(layer, x) for name, layer in both.items()}


def table(lines: list[dict[str, Any]], title: str) -> Table:
    """One line a shape, batch and length."""
    shown = Table("shape", "rows", "tokens", "base", *WAYS, *(f"{way} MB" for way in WAYS), title=title)
    for line in lines:
        times = [f"{line['milliseconds'][name]:.3f}" for name in ("base", *WAYS)]
        sizes = [f"{line['bytes'][name] / 1e6:.1f}" for name in WAYS]
        shown.add_row(line["shape"], str(line["rows"]), str(line["tokens"]), *times, *sizes)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="OUTxIN")
    parser.add_argument("--code", choices=list(CODES), default="int4")
    parser.add_argument("--rate", type=float, default=0.95)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 256], help="of a row")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernel.json"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, without the kernel"
    with torch.no_grad():
        lines = measure(options, device)
    title = f"milliseconds, {options.code} at {options.rate}, {options.experts} experts, {options.dtype}; {where}"
    Console(width=120).print(table(lines, title))
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    versions = {name: version(name) for name in ("torch", "triton")}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = {"device": where, "versions": versions, "settings": settings, "results": lines}
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
