"""mergekit, run in a virtual environment of its own because its pins are not ours.

`MergekitFactors` calls its decomposition (the class behind `mergekit-extract-lora`) on our matrix and times it there,
so that imports and the exchange of files do not count against it. `merge_dense` and `extract_lora` are its two commands
as a user runs them.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from peer_methods.served import OneModel, Served, load_shared
from peer_methods.task import STORED, Cost, Task, run_apart

_CALL = """
import sys, time
from safetensors.torch import load_file, save_file
from mergekit.scripts.extract_lora import TaskVectorDecompositionTask as Task
matrix = load_file(sys.argv[1])["matrix"]
task = Task.model_construct(max_rank=int(sys.argv[3]), sv_epsilon=0.0, distribute_scale=True, transpose=False)
began = time.perf_counter()
right, left = task.execute(matrix)
print(time.perf_counter() - began)
save_file({"left": left.contiguous(), "right": right.contiguous()}, sys.argv[2])
"""


class MergekitFactors:
    """mergekit's factors of a matrix. `seconds` is what its own call took."""

    seconds: float

    def __init__(self, python: Path) -> None:
        self._python = python

    def __call__(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder) / "matrix.safetensors", Path(folder) / "factors.safetensors"
            save_file({"matrix": matrix.contiguous()}, given)
            command = [str(self._python), "-c", _CALL, str(given), str(made), str(rank)]
            called = subprocess.run(command, capture_output=True, text=True, check=False)
            if called.returncode:
                raise SystemExit(f"mergekit failed: {called.stderr.strip().splitlines()[-1]}")
            self.seconds = float(called.stdout)
            factors = load_file(made)
        left, right = factors["left"].float(), factors["right"].float()
        return (left, right) if left.shape[0] == matrix.shape[0] else (right, left)


def mergekit_version(python: Path | None) -> str | None:
    """The installed version, None without an environment."""
    if python is None:
        return None
    command = [str(python), "-c", "from importlib.metadata import version; print(version('mergekit'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def merge_dense(task: Task, folder: Path, method: str, each: dict[str, float], **shared: Any) -> Cost:
    """`mergekit-yaml`: one model of all experts.

    Args:
        each: parameters of every expert. shared: those of the method.
    """
    recipe = {
        "merge_method": method,
        "models": [{"model": path, "parameters": each} for path in task.experts.values()],
        "parameters": shared,
        "dtype": "float32",
        **({} if method == "linear" else {"base_model": task.base}),
    }
    file = folder / "mergekit.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    arguments = [str(file), str(folder / "model"), "--random-seed", "0", "--quiet"]
    return _mergekit(task, "mergekit.scripts.run_yaml:main", arguments)


def serve_dense(task: Task, folder: Path) -> Served:
    return OneModel(*load_shared(str(folder / "model")))


def extract_lora(task: Task, folder: Path, *options: str) -> Cost:
    """`mergekit-extract-lora` from the pre-trained base, one adapter an expert in `folder`/experts.

    It knows one rank for all matrices: the smallest that pays at least the bytes of polymerge's ranks. Embeddings are
    left out. The factors are then rounded to 16 bits.
    """
    cost = Cost(0.0, 0)
    for expert, path in task.experts.items():
        target = folder / "experts" / expert
        arguments = ["--model", path, "--base-model", task.base, "--out-path", str(target), "--quiet"]
        arguments += ["--max-rank", str(equal_rank(task)), "--exclude-regex", "embed_tokens|lm_head", *options]
        cost += _mergekit(task, "mergekit.scripts.extract_lora:main", arguments)
        file = target / "adapter_model.safetensors"
        rounded = {n: t.to(STORED) if ".lora_" in n else t for n, t in load_file(file).items()}
        save_file(rounded, file, metadata={"format": "pt"})
    return cost


def equal_rank(task: Task) -> int:
    """The one rank that costs what polymerge's ranks cost, rounded up."""
    shapes, ranks = task.linear(), task.ranks()
    sizes = {name: rows + columns for name, (rows, columns) in shapes.items()}
    return -(-sum(ranks[name] * size for name, size in sizes.items()) // sum(sizes.values()))


def _mergekit(task: Task, call: str, arguments: list[str]) -> Cost:
    if task.mergekit is None:
        raise ValueError("this peer needs mergekit")
    return run_apart(call, arguments, python=task.mergekit, standalone_mode=False)
