"""The merge's speed, memory and error on the shapes of Llama-3-8B, against its peers in the same run.

Two tables. "merge": synthetic bfloat16 checkpoints (benchmarks/shapes.py) merged in a process of its own, with the peak
memory that the kernel counts for it. "matrices": one residual of every shape, factorised at the same rank by

    polymerge             rsvd of the method
    polymerge, int4       krylov at the larger rank that int4 has for the same bytes, rounded and decoded
    torch.linalg.svd      exact: the optimum, and what it costs
    torch.svd_lowrank     the same sketch width, at torch's own number of power iterations and at ours
    mergekit              mergekit-extract-lora's decomposition, called in mergekit's own virtual environment

`--layers 32` is the whole model: three checkpoints of 16 GB each and the bundle need 67 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from peer_methods.mergekit import MergekitFactors, mergekit_version
from polymerge.method.krylov import krylov
from polymerge.method.quantised import Quantised
from polymerge.method.rsvd import OVERSAMPLING_SHARE, rank_for_rate, rsvd
from shapes import LINEAR, checkpoint_bytes, tensor, write_checkpoint

RATE = 0.95
MATRICES = ("self_attn.k_proj", "self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
MERGE = """
import sys
import time
from pathlib import Path
from polymerge.host import peak_memory
from polymerge.search.merge import merge
def written():
    counts = Path("/proc/self/io")  # Linux alone counts what a process gives to write()
    return int(counts.read_text().split()[3]) if counts.exists() else 0
before = written()
merge(sys.argv[1], sys.argv[2], overwrite=True)
print(peak_memory(), written() - before, time.process_time())
"""
Factorise = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def run_merge(workdir: Path, experts: int, layers: int, embeddings: str) -> dict[str, Any]:
    """Writes the checkpoints, merges them with the command line, and cleans up."""
    sources = {}
    for expert in range(experts):
        source = workdir / f"expert-{expert % 3}"
        if not source.exists():
            write_checkpoint(source, layers, expert)
        sources[f"e{expert}"] = str(source if expert < 3 else _linked(source, workdir / f"expert-{expert}"))
    recipe = workdir / "recipe.json"  # JSON is YAML
    rows = {"embeddings": embeddings, "lm_head": embeddings}
    recipe.write_text(json.dumps({"experts": sources, "compress_rate": RATE, "code": "factors", **rows}))
    output = workdir / "bundle"
    command = [sys.executable, "-c", MERGE, str(recipe), str(output)]
    began = time.perf_counter()
    merged = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if merged.returncode:
        raise SystemExit(f"the merge failed: {merged.stderr.strip().splitlines()[-1]}")
    peak, written, processor = (float(number) for number in merged.stdout.split())
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    shutil.rmtree(output)
    read = experts * checkpoint_bytes(layers)
    return {
        "experts": experts,
        "layers": layers,
        "embeddings": embeddings,
        "source_bytes": read,
        "bundle_bytes": size,
        "written_bytes": written,
        "seconds": seconds,
        "processor_seconds": processor,
        "bytes_per_second": read / seconds,
        "peak_rss": peak,
    }


def _linked(source: Path, target: Path) -> Path:
    """The same files under another name: the merge's memory cannot know, and the disk holds them once."""
    shutil.copytree(source, target, copy_function=os.link, dirs_exist_ok=True)
    return target


def run_matrices(names: tuple[str, ...], mergekit: Path | None) -> list[dict[str, Any]]:
    """Every factorisation of every matrix: seconds, and the error in units of the optimum's."""
    lines = []
    for module in names:
        residual = residual_of(module)
        rows, columns = residual.shape
        rank = rank_for_rate(rows, columns, RATE)
        optimum = 0.0
        for name, factorise in factorisations(mergekit, residual):
            seconds, processor, (left, right) = _timed(factorise, residual, rank)
            error = float(torch.linalg.matrix_norm(residual - left @ right, dtype=torch.float64))
            optimum = optimum or error  # the exact one comes first
            lines.append(
                {
                    "matrix": module,
                    "shape": list(residual.shape),
                    "rank": rank,
                    "system": name,
                    "seconds": seconds,
                    "processor_seconds": processor,
                    "error_over_optimum": error / optimum,
                }
            )
            print(f"{module} {name}: {seconds:.2f} s, {error / optimum:.4f} of the optimum", file=sys.stderr)
    return lines


def _timed(factorise: Factorise, matrix: Tensor, rank: int) -> tuple[float, float, tuple[Tensor, Tensor]]:
    """Seconds, those of the processor, and the result; the best of three where a call is short enough for noise to
    matter. What another process measured itself is counted as both."""
    taken: list[float] = []
    processors: list[float] = []
    while not taken or (len(taken) < 3 and sum(taken) < 5):
        began, worked = time.perf_counter(), time.process_time()
        factors = factorise(matrix, rank)
        seconds, processor = time.perf_counter() - began, time.process_time() - worked
        taken.append(float(getattr(factorise, "seconds", seconds)))
        processors.append(float(getattr(factorise, "seconds", processor)))
    return min(taken), min(processors), factors


def residual_of(module: str) -> Tensor:
    """The first expert's residual in one layer, as the method takes it (DESIGN: normalised, averaged, scaled back)."""
    weights = [tensor(f"model.layers.0.{module}.weight", expert).float() for expert in range(3)]
    norms = [weight.norm() for weight in weights]
    average = torch.stack([weight / norm for weight, norm in zip(weights, norms, strict=True)]).mean(0)
    return weights[0].sub_(average.mul_(norms[0]))


def factorisations(mergekit: Path | None, residual: Tensor) -> list[tuple[str, Factorise]]:
    """The peers, the exact one first."""

    def exact(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank] * s[:rank], vh[:rank]

    def lowrank(n_iter: int) -> Factorise:
        def factorise(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
            width = min(rank + max(16, int(OVERSAMPLING_SHARE * rank)), *matrix.shape)
            u, s, v = torch.svd_lowrank(matrix, q=width, niter=n_iter)
            return u[:, :rank] * s[:rank], v[:, :rank].T

        return factorise

    def coded(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        code, (rows, columns) = Quantised(4), matrix.shape
        b, a = krylov(matrix, code.rank(rows, columns, RATE))
        return code.decode(code.encode(b, a), rows, columns)

    methods: list[tuple[str, Factorise]] = [
        ("torch.linalg.svd", exact),
        ("polymerge", rsvd),
        ("polymerge, int4", coded),
        ("torch.svd_lowrank, niter 1", lowrank(1)),
        ("torch.svd_lowrank, niter 2", lowrank(2)),
    ]
    return [*methods, ("mergekit", MergekitFactors(mergekit))] if mergekit else methods


def merge_table(lines: list[dict[str, Any]]) -> Table:
    columns = (
        "experts",
        "layers",
        "embeddings",
        "sources",
        "bundle",
        "written",
        "seconds",
        "of processor",
        "GB/s",
        "peak memory",
    )
    shown = Table(*columns, title="merge, Llama-3-8B shapes")
    for line in lines:
        shown.add_row(
            str(line["experts"]),
            str(line["layers"]),
            line["embeddings"],
            f"{line['source_bytes'] / 1e9:.1f} GB",
            f"{line['bundle_bytes'] / 1e9:.2f} GB",
            f"{line['written_bytes'] / line['bundle_bytes']:.3f}",
            f"{line['seconds']:.0f}",
            f"{line['processor_seconds']:.0f}",
            f"{line['bytes_per_second'] / 1e9:.3f}",
            f"{line['peak_rss'] / 2**30:.2f} GiB",
        )
    return shown


def matrix_table(lines: list[dict[str, Any]]) -> Table:
    columns = ("matrix", "rank", "system", "seconds", "of processor", "times faster than exact", "error / optimum")
    shown = Table(*columns)
    for line in lines:
        exact = next(x for x in lines if x["matrix"] == line["matrix"])["seconds"]
        rows, columns = line["shape"]
        shown.add_row(
            f"{rows} x {columns}",
            str(line["rank"]),
            line["system"],
            f"{line['seconds']:.2f}",
            f"{line['processor_seconds']:.2f}",
            f"{exact / line['seconds']:.1f}",
            f"{line['error_over_optimum']:.4f}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the checkpoints; 32 is the 8B model")
    parser.add_argument("--experts", type=int, nargs="*", default=[3, 6], help="a merge for each number")
    parser.add_argument(
        "--embeddings", nargs="*", default=["average"], choices=["average", "keep"], help="what becomes of them"
    )
    parser.add_argument("--matrices", nargs="*", default=list(MATRICES), choices=[*LINEAR], help="shapes to factorise")
    parser.add_argument("--mergekit", type=Path, help="python of a virtual environment that holds mergekit")
    parser.add_argument("--workdir", type=Path, help="where the checkpoints go; a temporary folder by default")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/merge.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.workdir) as scratch:
        # Three checkpoints; a bundle of one and its residuals, and at most three tables of embeddings and three heads.
        needed, free = int(4.9 * checkpoint_bytes(options.layers)), shutil.disk_usage(scratch).free
        if options.experts and free < needed:
            parser.error(f"{scratch}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free; say --workdir")
        runs = [(experts, embeddings) for experts in options.experts for embeddings in options.embeddings]
        merges = [run_merge(Path(scratch), experts, options.layers, embeddings) for experts, embeddings in runs]
    lines = run_matrices(tuple(options.matrices), options.mergekit)
    console = Console(width=120)
    console.print(merge_table(merges))
    console.print(matrix_table(lines))
    if options.mergekit is None:
        console.print("mergekit was left out: say --mergekit PYTHON (docs/benchmarks.md says how to install it)")
    packages = {"torch": version("torch"), "mergekit": mergekit_version(options.mergekit)}
    report = {"cores": os.cpu_count(), "versions": packages, "merges": merges, "matrices": lines}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
