"""mergekit, run in a virtual environment of its own because its pins are not ours.

Its decomposition (the class behind `mergekit-extract-lora`) is called on our matrix and timed there, so that imports
and the exchange of files do not count against it.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

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
