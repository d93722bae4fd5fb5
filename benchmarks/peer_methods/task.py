"""What every peer is given, and what a merge costs: experts, their base, and texts to fit a router on.

A merge runs in a process of its own, so that its peak memory is its own too. Seconds are those of the whole process,
the start of the interpreter included, for every method alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from polymerge.method.rsvd import rank_for_rate
from polymerge.sources.checkpoint import Checkpoint
from polymerge.sources.layers import LayerRecord, map_layers
from polymerge.sources.opening import open_checkpoint

WORKER = Path(__file__).parent / "worker.py"
# What is stored beside the one model has 16 bits a number, for all methods alike.
STORED = torch.bfloat16


@dataclass(frozen=True)
class Cost:
    """Seconds of one or more processes, and the largest peak resident size among them, in bytes."""

    seconds: float
    peak: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, max(self.peak, other.peak))


@dataclass(frozen=True)
class Task:
    """The merge that every peer does.

    Attributes:
        experts: name -> the expert's folder.
        base: folder of the pre-trained model that the experts come from.
        rate: polymerge's compress rate, which sets the bytes.
        texts: expert -> requests from its training data, for routers that learn.
        mergekit: python of an environment that has mergekit.
    """

    experts: dict[str, str]
    base: str
    rate: float
    texts: dict[str, list[str]]
    mergekit: str | None = None

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> Task:
        return cls(**json.loads(Path(file).read_text(encoding="utf-8")))

    @cached_property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """The experts, opened."""
        return {name: open_checkpoint(folder) for name, folder in self.experts.items()}

    @cached_property
    def pretrained(self) -> Checkpoint:
        return open_checkpoint(self.base)

    @cached_property
    def records(self) -> dict[str, LayerRecord]:
        """Checkpoint name -> what the tensor is."""
        return map_layers(self.pretrained).records

    def linear(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the weights of linear layers, by name. Architectures that store them transposed are refused."""
        shapes = {}
        for name, record in self.records.items():
            if record.role == "linear":
                if record.transposed:
                    raise SystemExit(f"{name} is stored transposed; the peers are written for [out, in]")
                rows, columns = self.pretrained.tensors[name].shape
                shapes[name] = (rows, columns)
        return shapes

    def ranks(self) -> dict[str, int]:
        """The rank that `rate` pays for, by the name of the weight."""
        return {name: rank_for_rate(*shape, self.rate) for name, shape in self.linear().items()}

    def average(self, name: str) -> Tensor:
        """One tensor's mean over the experts, float32."""
        total = sum(checkpoint.read(name).float() for checkpoint in self.checkpoints.values())
        assert isinstance(total, Tensor)
        return total / len(self.experts)

    def rest(self, *roles: str) -> list[str]:
        """Names of the tensors that are no linear weights, or of some of their roles."""
        return [n for n, r in self.records.items() if (r.role in roles if roles else r.role != "linear")]


def save_shared(task: Task, folder: Path, names: list[str]) -> None:
    """Stores averages in the place of the base's tensors: part of the one model, not beside it."""
    save_tensors({name: task.average(name) for name in names}, folder / "shared.safetensors")


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def stored_bytes(folder: Path) -> int:
    """Bytes of every weight file in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def run_apart(call: str, *args: Any, python: str = sys.executable, **options: Any) -> Cost:
    """Calls `module:function` in a process of its own. Raises SystemExit with its last line where it fails."""
    request = json.dumps({"call": call, "args": args, "options": options})
    paths = [str(WORKER.parent.parent), *(os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    python_path = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)} if python == sys.executable else {}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | python_path
    began = time.perf_counter()
    done = subprocess.run(
        [python, "-P", str(WORKER), request], capture_output=True, text=True, check=False, env=environment
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{call} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return Cost(seconds, json.loads(done.stdout.strip().splitlines()[-1])["peak"])
