"""mergekit-extract-lora's adapters, served by PEFT: told which expert answers, or by Arrow.

Arrow (Ostapenko et al. 2024, arXiv 2405.11157) is PEFT's own: every adapter's first right singular vector in a layer is
its prototype, and a token gets the adapters by a softmax over |prototype . token| among the top k. PEFT's settings are
its defaults (top 3, temperature 1).

Embeddings are averaged. extract-lora stores each expert's norms whole, and PEFT then runs one expert's rows after the
other's: it mixes adapters in a batch (`adapter_names`) where they hold no norms. So there are adapters without them
too, over averaged norms; Arrow takes no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from peer_methods import mergekit
from peer_methods.served import InTurn, OneModel, Served, greedy, load_shared
from peer_methods.task import Cost, Task, save_shared


def merge(task: Task, folder: Path) -> Cost:
    save_shared(task, folder, task.rest("embedding", "lm_head"))
    return mergekit.extract_lora(task, folder)


def merge_without_norms(task: Task, folder: Path) -> Cost:
    save_shared(task, folder, task.rest())
    return mergekit.extract_lora(task, folder, "--skip-undecomposable")


def load_adapters(task: Task, folder: Path) -> tuple[Any, Any]:
    """One PEFT model with all adapters, and its tokenizer."""
    from peft import PeftModel

    base, tokenizer = load_shared(task.base, folder)
    first, *others = task.experts
    model = PeftModel.from_pretrained(base, folder / "experts" / first, first)
    for name in others:
        model.load_adapter(folder / "experts" / name, name)
    return model.eval(), tokenizer


class Active:
    """One adapter of a PEFT model, made the active one for every call."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def __call__(self, ids: Tensor) -> Any:
        self.model.set_adapter(self.name)
        return self.model(ids)

    def generate(self, ids: Tensor, **options: Any) -> Any:
        self.model.set_adapter(self.name)
        return self.model.generate(ids, **options)


class Named(Served):
    """All adapters in one batch."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.model, self.tokenizer = load_adapters(task, folder)

    def logits(self, ids: Tensor, prompt: int, expert: str) -> Tensor:
        logits: Tensor = self.model(ids, adapter_names=[expert]).logits
        return logits

    def generate(self, ids: Tensor, mask: Tensor, experts: Sequence[str], **options: Any) -> Tensor:
        return greedy(self.model, ids, mask, adapter_names=list(experts), **options)


def serve(task: Task, folder: Path) -> Served:
    model, tokenizer = load_adapters(task, folder)
    return InTurn({name: Active(model, name) for name in task.experts}, tokenizer)


def serve_without_norms(task: Task, folder: Path) -> Served:
    return Named(task, folder)


def serve_arrow(task: Task, folder: Path, top_k: int = 3) -> Served:
    from peft import ArrowConfig, create_arrow_model

    base, tokenizer = load_shared(task.base, folder)
    paths = [str(folder / "experts" / name) for name in task.experts]
    config = ArrowConfig(top_k=min(top_k, len(paths)), rng_seed=0)
    return OneModel(create_arrow_model(base, paths, config), tokenizer)
