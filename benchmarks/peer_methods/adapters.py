"""mergekit-extract-lora's adapters, served by PEFT: told which expert answers (`adapter_names`), or by Arrow.

Arrow (Ostapenko et al. 2024, arXiv 2405.11157) is PEFT's own: every adapter's first right singular vector in a layer is
its prototype, and a token gets the adapters by a softmax over |prototype . token| among the top k. PEFT's settings are
its defaults (top 3, temperature 1).

Embeddings are averaged. The named adapters keep each expert's norms whole, as extract-lora stores them; Arrow takes
low-rank factors alone, so norms are averaged too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from peer_methods import mergekit
from peer_methods.served import OneModel, Served, greedy, load_shared
from peer_methods.task import Cost, Task, save_shared


def merge(task: Task, folder: Path) -> Cost:
    save_shared(task, folder, task.rest("embedding", "lm_head"))
    return mergekit.extract_lora(task, folder)


def merge_for_arrow(task: Task, folder: Path) -> Cost:
    save_shared(task, folder, task.rest())
    return mergekit.extract_lora(task, folder, "--skip-undecomposable")


class Named(Served):
    """One PEFT model with all adapters."""

    def __init__(self, task: Task, folder: Path) -> None:
        from peft import PeftModel

        base, self.tokenizer = load_shared(task.base, folder)
        first, *others = task.experts
        self.model: Any = PeftModel.from_pretrained(base, folder / "experts" / first, first)
        for name in others:
            self.model.load_adapter(folder / "experts" / name, name)
        self.model.eval()

    def logits(self, ids: Tensor, prompt: int, expert: str) -> Tensor:
        found: Tensor = self.model(ids, adapter_names=[expert]).logits
        return found

    def generate(self, ids: Tensor, mask: Tensor, experts: Sequence[str], **options: Any) -> Tensor:
        return greedy(self.model, ids, mask, adapter_names=list(experts), **options)


def serve(task: Task, folder: Path) -> Served:
    return Named(task, folder)


def serve_arrow(task: Task, folder: Path, top_k: int = 3) -> Served:
    from peft import ArrowConfig, create_arrow_model

    base, tokenizer = load_shared(task.base, folder)
    paths = [str(folder / "experts" / name) for name in task.experts]
    config = ArrowConfig(top_k=min(top_k, len(paths)), rng_seed=0)
    return OneModel(create_arrow_model(base, paths, config), tokenizer)
