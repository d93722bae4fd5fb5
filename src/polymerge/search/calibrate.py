"""What counts of an expert's residuals, seen while the expert itself reads its texts: what its layers are given, and
how the log-probability of its own answers changes with what they give.

Each expert is loaded alone, as its original; nothing of the bundle is needed. Of every layer some tokens' rows are
kept, in files. Knows models and their modules; what rows do to factors is `polymerge.method.weights`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.local.engine import HFEngine
from ..errors import DataError, ModelError, RecipeError
from ..merging.calibration import Calibration, write_seen
from ..merging.plan import MergePlan
from .agreement import ComparedTokens, compared_tokens
from .examples import Example, read_examples

# Texts of a file, and tokens of a text, that are read.
TEXTS, LONGEST = 128, 1024
# Sums of tokens' rows that are kept of a module.
SUMS = 1024


@contextmanager
def calibrated(
    plan: MergePlan, measured: Mapping[str, Sequence[Example]], say: Callable[[str], None] = lambda text: None
) -> Iterator[Calibration | None]:
    """What counts of a plan's residuals, in a folder of its own while this is open; None where its recipe has no texts.

    Args:
        measured: expert -> examples that it will be held against, none of which may calibrate.
        say: called with what comes next.

    Raises:
        RecipeError: nothing of an expert is stored as a residual from the average. DataError: a file that cannot be
        used, or all of it is measured. SourceError, ModelError: an expert cannot be run.
    """
    texts = {name: _texts(name, file, measured.get(name, ())) for name, file in plan.recipe.calibration.items()}
    if not texts:
        yield None
        return
    linear = [task for task in plan.tasks if task.record.role == "linear" and task.base == "average"]
    modules = [task.record.module for task in linear if task.treatment == "low_rank"]
    if not modules:
        raise RecipeError(
            f"{plan.recipe.place_of_key('calibration')}no expert has residuals from an average; leave it out"
        )
    with tempfile.TemporaryDirectory(prefix="polymerge-calibration-") as folder:
        files, digests, notes = {}, {}, []
        for name, examples in texts.items():
            say(f"calibration {name}: {len(examples)} texts")
            files[name] = Path(folder) / f"{name}.safetensors"
            digests[name], found = _write(plan, name, examples, modules, files[name])
            notes.append(
                f"{name}: residuals of {found} of {len(modules)} matrices are weighted by what {len(examples)} texts "
                f"of {Path(plan.recipe.calibration[name]).name} show (their tokens' sha256 {digests[name][:16]})"
            )
        yield Calibration(files, digests, tuple(notes))


def _texts(name: str, file: str, measured: Sequence[Example]) -> list[Example]:
    texts = read_examples(file, TEXTS + len(measured))
    left = [text for text in texts if text not in measured][:TEXTS]
    if not left:
        raise DataError(f"{file}: every row of it is measured for {name!r}, none is left to calibrate; see --limit")
    return left


def _write(
    plan: MergePlan, name: str, examples: Sequence[Example], modules: Collection[str], file: Path
) -> tuple[str, int]:
    """One expert's rows to a file: the digest of its texts' tokens, and how many modules a text came to."""
    recipe = plan.recipe
    engine = HFEngine.from_checkpoint(
        recipe.experts[name], device=recipe.device, trust_remote_code=recipe.trust_remote_code
    )
    rows = [_shortened(row) for row in (compared_tokens(engine, e) for e in examples) if row.compared > 0]
    if not rows:
        raise RecipeError(f"{plan.checkpoints[name].label}: none of its texts has two tokens, so nothing is calibrated")
    seen = _seen(engine.model, rows, [module for module in modules if _has(engine.model, module)], recipe.seed)
    for module, sides in seen.items():
        if not all(bool(torch.isfinite(side).all()) for side in sides if side is not None):
            raise ModelError(f"{plan.checkpoints[name].label}: what {module} is given for its texts is not finite")
    write_seen(file, seen)
    tokens = json.dumps([(row.ids, row.compared) for row in rows])
    return hashlib.sha256(tokens.encode()).hexdigest(), len(seen)


def _shortened(row: ComparedTokens) -> ComparedTokens:
    """With the end of a long text alone."""
    return replace(row, ids=row.ids[-LONGEST:], compared=min(row.compared, LONGEST - 1))


def _has(model: nn.Module, module: str) -> bool:
    """Block experts that are fused in one tensor are no modules."""
    try:
        model.get_submodule(module)
    except AttributeError:
        return False
    return True


def _seen(
    model: Any, rows: Sequence[ComparedTokens], modules: Sequence[str], seed: int
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Module -> rows [k, in] of what it was given, and [k, out] of the gradients of what it gave. A module that no text
    comes to is in none."""
    watch = _Watch(seed)
    hooks = [model.get_submodule(name).register_forward_hook(partial(watch.look, name)) for name in modules]
    hooks.append(model.get_input_embeddings().register_forward_hook(_with_gradient))
    draw = torch.Generator().manual_seed(seed)
    try:
        for row in rows:
            watch.begin(len(row.ids))
            torch.autograd.backward(_answered(model, row, draw))
    finally:
        for hook in hooks:
            hook.remove()
    return watch.seen()


def _with_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """What is looked up is where the way back ends: the parameters have no gradients."""
    return output.detach().requires_grad_(True)


def _answered(model: Any, row: ComparedTokens, draw: torch.Generator) -> Tensor:
    """Minus the log-probability of tokens that the expert itself would say where they are compared: the gradients'
    second moment is then the Fisher information."""
    with torch.enable_grad():
        logits = model(torch.tensor([row.ids], device=model.device), use_cache=False).logits[0]
        likely = logits[-1 - row.compared : -1].float().log_softmax(-1)
        said = torch.multinomial(likely.detach().exp().cpu(), 1, generator=draw).to(likely.device)
        loss: Tensor = -likely.gather(1, said).sum()
        return loss


class _Watch:
    """Adds up rows of tokens, each with a random sign, in as many sums as are kept: S with E[SᵀS] = Σ x xᵀ, and exactly
    that of no more tokens than there are sums (CountSketch; Charikar, Chen and Farach-Colton 2002)."""

    def __init__(self, seed: int) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._read = 0
        self._last: tuple[Any, str] = (None, "")

    def begin(self, tokens: int) -> None:
        """Another text."""
        self._places = torch.arange(self._read, self._read + tokens) % SUMS
        self._signs = torch.randint(0, 2, (tokens, 1), generator=self._draw) * 2.0 - 1.0
        self._read += tokens
        self._last = None, ""

    def look(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        """A hook."""
        if not inputs:
            return
        last, owner = self._last
        if inputs[0] is last:  # a neighbour was given it too
            self._inputs[name] = self._inputs[owner]
        else:
            self._last = inputs[0], name
            self._add(self._inputs, name, inputs[0])
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: self._add(self._outputs, name, gradient))  # type: ignore[no-untyped-call]

    def _add(self, sums: dict[str, Tensor], name: str, of_tokens: Tensor) -> None:
        rows = of_tokens.detach().flatten(0, -2).to("cpu", torch.float32)
        if name not in sums:
            sums[name] = torch.zeros(SUMS, rows.shape[1])
        count = min(len(rows), len(self._places))  # of a module that not every token comes to, fewer
        sums[name].index_add_(0, self._places[:count], rows[:count] * self._signs[:count])

    def seen(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """What modules were given, in one tensor where they share it, and the gradients of what they gave."""
        return {name: (rows, self._outputs.get(name)) for name, rows in self._inputs.items()}
