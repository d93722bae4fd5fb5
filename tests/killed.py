"""Processes that are killed at a given moment, and what they leave."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import polymerge.merging.run
from polymerge.merging.proof import Proof

# The server below has all of this imported, down to what is imported only when it is used.
for module in (
    "polymerge.compete",
    "polymerge.export.dense",
    "polymerge.export.peft",
    "polymerge.merging.grow",
    "polymerge.merging.run",
    "polymerge.model.loading",
    "polymerge.router.training",
    "pytest",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
):
    importlib.import_module(module)

# Processes that start in milliseconds: copies of a server that has imported everything and computed nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.killed"])


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the statistics, which carry seconds."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "merge_stats.jsonl"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def started(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = FORKS.Process(target=_unproved, args=(target, *arguments))
    process.start()
    return process


def _unproved(target: Callable[..., None], *arguments: Any) -> None:
    """What is killed is the work on files; the proof before it would only add moments to kill at."""
    polymerge.merging.run.prove = lambda source, *_, **__: Proof(source.config["architectures"][0], True, "layers")
    target(*arguments)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def moves_until_death(work: Callable[[], object], call: int, after: bool, counted: Path) -> None:
    """Does the work and is killed just before or just after that rename or deletion of the whole run; with a number
    that is never reached it writes how many there are to `counted`."""
    calls = 0

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            mine = calls
            if mine == call and not after:
                die()
            result = real(*args, **kwargs)
            if mine == call:
                die()
            return result

        return called

    Path.rename = deadly(Path.rename)  # type: ignore[method-assign]
    shutil.rmtree = deadly(shutil.rmtree)  # type: ignore[assignment]
    torch.set_num_threads(1)
    work()
    counted.write_text(str(calls))


def assert_nothing_beside(out: Path) -> None:
    """But locks, which stay."""
    left = {path.name for path in out.parent.iterdir() if path.name.startswith((out.name, "."))}
    assert {name for name in left if not name.endswith(".polymerge.lock")} == {out.name}
