"""polymerge's own rows: the recipe says the code and the rate, and the expert is named or found by the bundle's router.

Factors of the published code lie in the bundle's float32; they are rounded to 16 bits before anything is measured and
counted so, as every peer's. Embeddings are averaged, norms each expert's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from peer_methods.served import Served, greedy
from peer_methods.task import STORED, Task
from polymerge import load_model, merge
from polymerge.bundle.bundle import Bundle
from polymerge.bundle.inspect import inspect_bundle
from polymerge.demo.train import format_prompt
from polymerge.engine.local.engine import HFEngine
from polymerge.model.linear import MixedLinear
from polymerge.router.fit import fit_samples
from polymerge.router.router import Router
from polymerge.router.samples import Sample


def make(task_file: str, output: str, routed: bool, **recipe: Any) -> None:
    """Merges, and fits the router where one is asked for."""
    task = Task.load(task_file)
    common = {"experts": task.experts, "embeddings": "average", "compress_rate": task.rate}
    bundle = merge(common | recipe, Path(output) / "bundle")
    if routed:
        samples = [Sample(text, expert) for expert, texts in task.texts.items() for text in texts]
        fit_samples(bundle, HFEngine.from_bundle(bundle), samples).router.save(bundle)


def beside_one_model(folder: Path) -> int:
    """Bytes of the experts, factors at 16 bits, and of the router."""
    bundle = Bundle.open(folder / "bundle")
    experts = sum(bundle.sizes().experts.values())
    if bundle.code.peft_readable and bundle.manifest.dtype == "float32":
        experts -= sum(expert.residual_bytes for expert in inspect_bundle(bundle).experts) // 2
    return experts + sum(file.stat().st_size for file in (bundle.path / "router").rglob("*") if file.is_file())


class Ours(Served):
    """A bundle whose rows are named, or routed by their own text."""

    def __init__(self, folder: Path, routed: bool) -> None:
        self.model = load_model(folder / "bundle")
        self.tokenizer = self.model.tokenizer
        if self.model.bundle.code.peft_readable:
            for module in self.model.modules():
                if isinstance(module, MixedLinear):
                    module.stacked_a.copy_(module.stacked_a.to(STORED))
                    module.stacked_b.copy_(module.stacked_b.to(STORED))
        engine = HFEngine(self.model, self.tokenizer, fingerprint=self.model.bundle.digest)
        self.router = Router.load(folder / "bundle", engine) if routed else None

    def logits(self, ids: Tensor, prompt: int, expert: str) -> Tensor:
        logits: Tensor = self.model(ids, experts=self._experts(ids[:, :prompt], [expert])).logits
        return logits

    def generate(self, ids: Tensor, mask: Tensor, experts: Sequence[str], **options: Any) -> Tensor:
        return greedy(self.model, ids, mask, experts=self._experts(ids, experts), **options)

    def _experts(self, ids: Tensor, named: Sequence[str]) -> list[Any]:
        if self.router is None:
            return list(named)
        end = len(format_prompt(""))  # what the prompt's form adds to a request
        texts = [text[:-end] for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return [route.expert for route in self.router.route(texts)]
