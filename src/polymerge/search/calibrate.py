"""What counts of an expert's residuals, seen while the expert itself reads its texts: what its layers are given, and
how the log-probability of its own answers changes with what they give.

Each expert is loaded alone, as its original; nothing of the bundle is needed. Of every layer some tokens' rows are
kept, in files. Knows models and their modules; what rows do to factors is `polymerge.method.weights`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..engine.local.engine import HFEngine
from ..engine.local.forced import batches, tokens_there
from ..errors import DataError, ModelError, RecipeError
from ..merging.calibration import Calibrated, Calibration, write_seen
from ..merging.plan import MergePlan
from ..merging.treatment import TensorTask
from ..method.weights import Side, Weights, joined
from ..recipe.source import Source
from .agreement import ComparedTokens, compared_tokens
from .examples import Example, read_examples

# Texts of a file, and tokens of a text, that are read.
TEXTS, LONGEST = 128, 1024
# Tokens that are read at once: the way back keeps all that the layers made of them.
TOGETHER = 512
# Stands for the head of a model whose embedding is its head, too.
TIED = "the head that is the table"
# Sums of tokens' rows that are kept of a module.
SUMS = 1024


@dataclass(frozen=True)
class Original:
    """An expert as it is found, and how it is run."""

    name: str
    source: Source
    device: str
    trust_remote_code: bool
    seed: int


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
    recipe = plan.recipe
    texts = {name: _texts(name, file, measured.get(name, ())) for name, file in recipe.calibration.items()}
    if not texts:
        yield None
        return
    if not _stored(plan.tasks):
        raise RecipeError(f"{recipe.place_of_key('calibration')}no expert has residuals from an average; leave it out")
    with tempfile.TemporaryDirectory(prefix="polymerge-calibration-") as folder:
        made = []
        for name, examples in texts.items():
            say(f"calibration {name}: {len(examples)} texts")
            original = Original(name, recipe.experts[name], recipe.device, recipe.trust_remote_code, recipe.seed)
            made.append(_write(original, examples, recipe.calibration[name], plan.tasks, Path(folder)))
        yield Calibration(made)


@contextmanager
def calibrated_alone(original: Original, file: str, tasks: Sequence[TensorTask]) -> Iterator[Calibration]:
    """As `calibrated`, of one expert that is added to a bundle."""
    examples = _texts(original.name, file, ())
    if not _stored(tasks):
        raise RecipeError(f"calibration: {original.name!r} has no residuals from an average here; leave it out")
    with tempfile.TemporaryDirectory(prefix="polymerge-calibration-") as folder:
        yield Calibration([_write(original, examples, file, tasks, Path(folder))])


def _stored(tasks: Sequence[TensorTask]) -> list[str]:
    """The modules that have residuals from the average."""
    return [task.record.module for task in tasks if task.treatment == "low_rank" and task.base == "average"]


def _weighted(tasks: Sequence[TensorTask]) -> list[str]:
    """The modules whose residuals are weighted, at this rate or another that a search tries. A table of which experts
    have other rows is none of them."""
    may = (task for task in tasks if task.against_base and task.treatment != "copy" and task.tables is None)
    return [task.record.module for task in may if task.base == "average"]


def _texts(name: str, file: str, measured: Sequence[Example]) -> list[Example]:
    texts = read_examples(file, TEXTS + len(measured))
    left = [text for text in texts if text not in measured][:TEXTS]
    if not left:
        raise DataError(f"{file}: every row of it is measured for {name!r}, none is left to calibrate; see --limit")
    return left


def _write(
    original: Original, examples: Sequence[Example], texts: str, tasks: Sequence[TensorTask], folder: Path
) -> Calibrated:
    """What counts for one expert, in a file.

    Args:
        texts: the file that the examples come from.
    """
    engine = HFEngine.from_checkpoint(
        original.source, device=original.device, trust_remote_code=original.trust_remote_code
    )
    label, longest = original.source.source, min(LONGEST, engine.max_length)
    rows = [_shortened(row, longest) for row in (compared_tokens(engine, e) for e in examples) if row.compared > 0]
    if not rows:
        raise RecipeError(f"{label}: none of its texts has two tokens, so nothing is calibrated")
    try:
        seen = _seen(engine.model, rows, [m for m in _weighted(tasks) if _has(engine.model, m)], original.seed)
    except Exception as error:  # each architecture has its own where it has no way back
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{label}: cannot be calibrated ({type(error).__name__}: {reason}); leave it out") from error
    stored = _stored(tasks)
    if not (found := sum(module in seen for module in stored)):
        raise ModelError(f"{label}: its texts come to no matrix that has residuals; leave {original.name!r} out")
    for module, weights in seen.items():
        sides = (side for side in (weights.inputs, weights.outputs) if side)
        if not all(bool(torch.isfinite(side.rows).all()) for side in sides):
            raise ModelError(f"{label}: what {module} is given for its texts is not finite; leave it out")
    file = folder / f"{original.name}.safetensors"
    write_seen(file, seen)
    digest = hashlib.sha256(json.dumps([(row.ids, row.compared) for row in rows]).encode()).hexdigest()
    note = (
        f"{original.name}: residuals of {found} of {len(stored)} matrices are weighted by what {len(examples)} "
        f"texts of {Path(texts).name} show (their tokens' sha256 {digest[:16]})"
    )
    return Calibrated(original.name, file, digest, note)


def _shortened(row: ComparedTokens, longest: int) -> ComparedTokens:
    """With the end of a long text alone."""
    return replace(row, ids=row.ids[-longest:], compared=min(row.compared, longest - 1))


def _has(model: nn.Module, module: str) -> bool:
    """Block experts that are fused in one tensor are no modules."""
    try:
        model.get_submodule(module)
    except AttributeError:
        return False
    return True


def _seen(model: Any, rows: Sequence[ComparedTokens], modules: Sequence[str], seed: int) -> dict[str, Weights]:
    """Module -> what counts at its sides. A module that no text comes to is left out."""
    watch = _Watch(seed)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(model.get_submodule(name)): name for name in modules}
    looked_up = names.pop(id(table), None)
    hooks = [table.register_forward_hook(partial(watch.look_up, looked_up))]
    tied = looked_up and head is not None and head.weight is table.weight
    if head is not None and (name := names.pop(id(head), TIED if tied else None)):
        hooks.append(head.register_forward_hook(partial(watch.look, name, of_tokens=True)))
    hooks += [model.get_submodule(name).register_forward_hook(partial(watch.look, name)) for name in names.values()]
    draw = torch.Generator().manual_seed(seed)
    try:
        for batch in batches(rows, lambda row: len(row.ids), TOGETHER):
            watch.begin([len(row.ids) for row in batch])
            torch.autograd.backward(_answered(model, batch, draw))
            watch.end()
    finally:
        for hook in hooks:
            hook.remove()
    return watch.seen()


def _answered(model: Any, rows: Sequence[ComparedTokens], draw: torch.Generator) -> Tensor:
    """Minus the log-probability of tokens that the expert itself would say where they are compared: the gradients'
    second moment is then the Fisher information."""
    padded = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    total = torch.zeros((), device=model.device)
    with torch.enable_grad():
        logits = model(padded.to(model.device), use_cache=False).logits
        for row, of_row in zip(rows, logits, strict=True):
            last = len(row.ids) - 1
            likely = of_row[last - row.compared : last].float().log_softmax(-1)
            said = torch.multinomial(likely.detach().exp().cpu(), 1, generator=draw).to(likely.device)
            total = total - likely.gather(1, said).sum()
    return total


class _Watch:
    """Adds up rows of tokens, each with a random sign, in as many sums as are kept: S with E[SᵀS] = Σ x xᵀ, and exactly
    that of no more tokens than there are sums (CountSketch; Charikar, Chen and Farach-Colton 2002). Of tokens of a
    vocabulary squares are added up alone."""

    def __init__(self, seed: int) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._read = 0
        self._last: tuple[Any, str] = (None, "")
        self._came: set[str] = set()  # modules that this batch came to
        self._twice: set[str] = set()  # those that one came to twice, whose rows would be added up with one sign
        self._table: str | None = None

    def begin(self, lengths: Sequence[int]) -> None:
        """Further texts, which lie in rows as long as the longest."""
        tokens = sum(lengths)
        self._there = tokens_there(lengths)
        self._places = torch.arange(self._read, self._read + tokens) % SUMS
        self._signs = torch.randint(0, 2, (tokens, 1), generator=self._draw) * 2.0 - 1.0
        self._read += tokens

    def end(self) -> None:
        """What they left, such as the way back, may go."""
        self._last = None, ""
        self._came.clear()

    def look(
        self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Any, of_tokens: bool = False
    ) -> None:
        """A hook of what multiplies; what it gives may be a number a token of the vocabulary."""
        if not inputs or name in self._twice:
            return
        if name in self._came:
            self._twice.add(name)
            return
        self._came.add(name)
        last, owner = self._last
        if inputs[0] is last and owner in self._inputs:  # a neighbour was given it too
            self._inputs[name] = self._inputs[owner]
        else:
            self._last = inputs[0], name
            self._add(self._inputs, name, inputs[0])
        if isinstance(output, Tensor) and output.requires_grad:
            add = self._add_squares if of_tokens else self._add
            output.register_hook(lambda gradient: add(self._outputs, name, gradient))  # type: ignore[no-untyped-call]

    def look_up(self, name: str | None, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A hook of the table of tokens, whose rows are its tokens' and whose columns what it gives. There the way back
        ends, too: the parameters have no gradients."""
        found = output.detach().requires_grad_(True)
        if name and inputs[0].numel() == len(self._there):
            self._table = name
            counts = self._outputs.setdefault(name, torch.zeros(module.get_parameter("weight").shape[0]))
            counts += torch.bincount(inputs[0].cpu().flatten()[self._there], minlength=len(counts))
            found.register_hook(lambda gradient: self._add(self._inputs, name, gradient))  # type: ignore[no-untyped-call]
        return found.clone()  # which may be changed in place

    def _add(self, sums: dict[str, Tensor], name: str, given: Tensor) -> None:
        if (rows := self._rows(given)) is not None:
            if name not in sums:
                sums[name] = torch.zeros(SUMS, rows.shape[1])
            sums[name].index_add_(0, self._places, rows * self._signs)

    def _add_squares(self, sums: dict[str, Tensor], name: str, given: Tensor) -> None:
        if (rows := self._rows(given)) is not None:
            squares = rows.square_().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

    def _rows(self, of_tokens: Tensor) -> Tensor | None:
        """[tokens, n] without padding; None where not every token comes there, or not once."""
        rows = of_tokens.detach().flatten(0, -2)
        there = len(rows) == len(self._there) and rows.is_floating_point()
        return rows.to("cpu", torch.float32)[self._there] if there else None

    def seen(self) -> dict[str, Weights]:
        """What counts in every module. Those that are given the same share it, as do two uses of one table."""
        sides = {id(rows): Side(rows) for rows in (*self._inputs.values(), *self._outputs.values())}
        seen = {
            name: Weights(sides[id(rows)], sides[id(self._outputs[name])] if name in self._outputs else None)
            for name, rows in self._inputs.items()
            if name not in self._twice
        }
        if (head := seen.pop(TIED, None)) and self._table:
            seen[self._table] = joined([head, seen[self._table]])
        return seen
