"""The rows of benchmarks/peers.py: what each makes of the experts, measured by teacher forcing, and its bytes.

Four kinds. A `Peer` codes every linear weight of every expert, and its dense result is run. `Ours` is a recipe, and its
bundle is run as it is. A `Router` is a method of benchmarks/peers_served.py that finds the expert itself. `Plain` takes
the experts' own tensors or their averages.

Norms are each expert's own, as in the papers' code, but for one model for all. Embeddings: `own`, as the papers' code
leaves them, or `averaged`, so that codes of linear weights can be compared.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peer_methods import apart, table
from peer_methods.deltacome import delta_come
from peer_methods.deltas import CALIBRATION, Coded, ExpertDeltas, Method
from peer_methods.dqrelo import bit_delta, d_qrelo
from peer_methods.impart import im_part
from peer_methods.loraquant import lora_quant
from peer_methods.lowrank_delta import split_merge, truncated
from peer_methods.prinmix import prin_mix
from peer_methods.served import load_shared, put
from peer_methods.sizes import Sizes, bundle_sizes, in_half
from peer_methods.task import Task
from polymerge import load_model, merge, quantize_bundle
from polymerge.demo.skills import Skill
from polymerge.demo.train import encode
from polymerge.export.packing import BASE_WAYS
from polymerge.host import pick_device
from polymerge.model.mixed import MixedModel
from polymerge.search.agreement import ExampleAgreement, Reference
from polymerge.search.examples import Example

TABLES = ("embedding", "lm_head")
Measured = dict[str, list[ExampleAgreement]]


class Run:
    """Experts, what is asked of them, and what is computed once for all rows.

    Attributes:
        model: the base in float32, into which dense results are put; on the GPU where there is one, as all that is run.
    """

    def __init__(self, task: Task, skills: Sequence[Skill], work: Path) -> None:
        self.task, self.work, self.skills = task, work, {skill.name: skill for skill in skills}
        model, self.tokenizer = load_shared(task.base)
        self.model = model.to(pick_device())

    @cached_property
    def references(self) -> dict[str, Reference]:
        return {
            name: Reference(self.task.experts[name], [Example(e.prompt, e.answer) for e in skill.test])
            for name, skill in self.skills.items()
        }

    @cached_property
    def calibration(self) -> dict[str, list[Example]]:
        """Training requests with their answers, of every expert."""
        return {
            name: [Example(e.prompt, e.answer) for e in skill.train[:CALIBRATION]]
            for name, skill in self.skills.items()
        }

    @cached_property
    def deltas(self) -> dict[str, ExpertDeltas]:
        return {name: ExpertDeltas(self.task, name, self.work, skill.train) for name, skill in self.skills.items()}

    def dense(self, expert: str, tensors: Mapping[str, Tensor]) -> list[ExampleAgreement]:
        """The model with these tensors, held against an expert."""
        put(self.model, tensors)
        return self.references[expert].each(lambda ids: self.model(ids).logits, self.model.device)

    def read(self, expert: str, *roles: str) -> dict[str, Tensor]:
        """An expert's own tensors of some roles, all but linear weights by default."""
        return {name: self.task.checkpoints[expert].read(name).float() for name in self.task.rest(*roles)}

    def averages(self, *roles: str) -> dict[str, Tensor]:
        return {name: self.task.average(name) for name in self.task.rest(*roles)}

    def numbers(self, *roles: str) -> int:
        return sum(self.task.pretrained.tensors[name].numel for name in self.task.rest(*roles))

    @property
    def one_model(self) -> int:
        """Numbers of one model."""
        return sum(info.numel for info in self.task.pretrained.tensors.values())


@dataclass(frozen=True)
class Row(ABC):
    """One line. `tables` says what becomes of embeddings and heads, in the table's words."""

    name: str
    tables: str

    @abstractmethod
    def measure(self, run: Run) -> tuple[Measured, Sizes]:
        """Everything that is kept of the experts, and the bytes of all of them."""


@dataclass(frozen=True)
class Peer(Row):
    """Attributes: code: a method of one matrix."""

    code: Method

    def measure(self, run: Run) -> tuple[Measured, Sizes]:
        measured, own = {}, self.tables == "own"
        sizes = in_half(run.one_model)
        for expert, deltas in run.deltas.items():
            tensors, coded = _coded(deltas, self.code)
            tables = run.read(expert, *TABLES) if own else run.averages(*TABLES)
            norms = run.read(expert, *(set(_roles(run)) - {*TABLES}))
            measured[expert] = run.dense(expert, tensors | tables | norms)
            # norms are a thousandth of a percent, and are folded where a GGUF has no place for them
            sizes += coded + in_half(run.numbers(*TABLES) if own else 0, gguf=not own)
            sizes += in_half(sum(norm.numel() for norm in norms.values()))
        return measured, sizes


@dataclass(frozen=True)
class Apart(Row):
    """N models of their own. Attributes: code: of a linear weight. table: of an embedding; None leaves it whole."""

    code: Method
    table: Callable[[Tensor], Coded] | None = None

    def measure(self, run: Run) -> tuple[Measured, Sizes]:
        measured, sizes = {}, Sizes(0, 0, 0)
        for expert, deltas in run.deltas.items():
            tensors, coded = _coded(deltas, self.code)
            sizes += coded
            for name, tensor in run.read(expert).items():
                if self.table and tensor.dim() == 2:
                    made = self.table(tensor)
                    tensors[name], sizes = made.weight, sizes + _sizes(made)
                else:
                    tensors[name], sizes = tensor, sizes + in_half(tensor.numel())
            measured[expert] = run.dense(expert, tensors)
        return measured, sizes


@dataclass(frozen=True)
class Plain(Row):
    """Attributes: linear: whether each expert has its own linear weights and norms, or all the average."""

    linear: bool

    def measure(self, run: Run) -> tuple[Measured, Sizes]:
        measured = {}
        rest = [name for name, record in run.task.records.items() if record.role not in TABLES]
        for expert, checkpoint in run.task.checkpoints.items():
            tensors = run.averages(*TABLES) if self.tables == "averaged" else run.read(expert, *TABLES)
            for name in rest:
                tensors[name] = checkpoint.read(name).float() if self.linear else run.task.average(name)
            measured[expert] = run.dense(expert, tensors)
        whole, shared = in_half(run.one_model), run.numbers(*TABLES) if self.tables == "averaged" else 0
        if not self.linear:
            return measured, whole
        others = (len(run.task.experts) - 1) * (run.one_model - shared)
        return measured, whole + in_half(others, gguf=not shared)


@dataclass(frozen=True)
class Ours(Row):
    """Attributes: recipe: what it says beside the experts. residuals: how the loaded model holds them. base: how the
    average is stored, as `polymerge quantize` names it; 8 bits are held in memory too, 4 are not."""

    recipe: tuple[tuple[str, Any], ...]
    residuals: str = "decoded"
    base: str | None = None

    def measure(self, run: Run) -> tuple[Measured, Sizes]:
        with tempfile.TemporaryDirectory(dir=run.work) as folder:
            bundle = merge({"experts": run.task.experts, **dict(self.recipe)}, Path(folder) / "bundle")
            if self.base:
                bundle = quantize_bundle(bundle, Path(folder) / "small", base=self.base, prompts=run.calibration).bundle
            held = "int8" if bundle.manifest.base_code == "int8" else "16bit"
            measured, sizes = self._of(load_model(bundle, residuals=self.residuals, base=held), run.references)
        gc.collect()
        return measured, replace(sizes, gguf=None) if self.base else sizes

    def _of(self, model: MixedModel, references: Mapping[str, Reference]) -> tuple[Measured, Sizes]:
        measured = {
            name: reference.each(lambda ids, name=name: model(ids, experts=name).logits, model.device)  # type: ignore[misc]
            for name, reference in references.items()
        }
        return measured, bundle_sizes(model.bundle, model, own_tables=self.tables == "own")


@dataclass(frozen=True)
class Router(Row):
    """Attributes: method: of the other table."""

    method: table.Method

    def measure(self, run: Run) -> tuple[Measured, Sizes]:
        folder = run.work / self.method.folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        run.task.save(run.work / "task.json")
        self.method.merge(run.task, folder)
        served = self.method.serve(run.task, folder)
        measured = {}
        with torch.no_grad():
            for name, skill in run.skills.items():
                prompts = iter([len(encode(served.tokenizer, example)[0]) for example in skill.test])
                measured[name] = run.references[name].each(
                    lambda ids, p=prompts, n=name: served.logits(ids, next(p), n),  # type: ignore[misc]
                    together=0,
                )
        beside = 2 * run.one_model + self.method.stored(run.task, folder)
        shutil.rmtree(folder)
        return measured, Sizes(beside, beside, None)


def _roles(run: Run) -> set[str]:
    return {record.role for record in run.task.records.values() if record.role != "linear"}


def _coded(deltas: ExpertDeltas, code: Method) -> tuple[dict[str, Tensor], Sizes]:
    """Every linear weight of an expert as a method has it, and their bytes."""
    tensors, sizes = {}, Sizes(0, 0, 0)
    for name, delta in deltas:
        coded = code(delta)
        tensors[name], sizes = coded.weight, sizes + _sizes(coded)
    return tensors, sizes


def _sizes(coded: Coded) -> Sizes:
    return Sizes(coded.disk, coded.resident, coded.gguf)


def at_budgets(name: str, method: Callable[..., Coded], budgets: Sequence[float], **settings: Any) -> list[Row]:
    """A method with a budget, embeddings averaged: a row for each."""
    return [Peer(f"{name}, {b:.0%}", "averaged", partial(method, budget=b, **settings)) for b in budgets]


def ours(name: str, tables: str, residuals: str = "decoded", base: str | None = None, **recipe: Any) -> Row:
    keys = {"averaged": "average", "compressed": "compress", "own": "keep"}
    both = {"embeddings": keys[tables], "lm_head": keys[tables]}
    return Ours(f"polymerge, {name}", tables, tuple((both | recipe).items()), residuals, base)


def _llama_cpp(kind: str) -> Row:
    code = partial(apart.llama_cpp, kind=kind)
    return Apart(f"models apart, {kind}", "own", lambda delta: code(delta.weight), code)


BUDGETS = (0.05, 0.1)
ROWS: list[Row] = [
    Plain("models apart, 16 bits", "own", linear=True),
    Plain("their embeddings averaged", "averaged", linear=True),
    Plain("one model: the average", "averaged", linear=False),
    ours("published, 0.95", "averaged", compress_rate=0.95, code="factors"),
    ours("published, 0.9", "averaged", compress_rate=0.9, code="factors"),
    ours("int4, 0.95", "averaged", compress_rate=0.95, code="int4"),
    ours("int4, 0.95", "compressed", compress_rate=0.95, code="int4"),
    ours("int4, 0.95, packed", "compressed", "packed", compress_rate=0.95, code="int4"),
    *(
        ours(f"int4, 0.95, packed, base in {base}", "compressed", "packed", base, compress_rate=0.95, code="int4")
        for base in BASE_WAYS
    ),
    ours("int4, 0.95", "own", compress_rate=0.95, code="int4"),
    ours("int4, 0.9", "averaged", compress_rate=0.9, code="int4"),
    ours("int4, 0.9", "compressed", compress_rate=0.9, code="int4"),
    ours("entropy, 0.95", "averaged", compress_rate=0.95, code="entropy"),
    ours("entropy, 0.95", "compressed", compress_rate=0.95, code="entropy"),
    ours("entropy, 0.9", "averaged", compress_rate=0.9, code="entropy"),
    ours("entropy, 0.9", "compressed", compress_rate=0.9, code="entropy"),
    *at_budgets("Delta-CoMe", delta_come, BUDGETS),
    Peer("Delta-CoMe, as published", "own", partial(delta_come, count_scales=False)),
    *at_budgets("PrinMix", prin_mix, BUDGETS),
    Peer("PrinMix, as published", "own", partial(prin_mix, count_scales=False)),
    *at_budgets("D-QReLO", d_qrelo, BUDGETS[1:]),
    *at_budgets("Split-Merge", split_merge, BUDGETS),
    *at_budgets("LoRAQuant of the delta", lora_quant, BUDGETS),
    Peer("LoRAQuant of rank 16", "own", lora_quant),
    *at_budgets("ImPart", im_part, BUDGETS[:1]),
    Peer("ImPart, as published", "own", im_part),
    *at_budgets("ImPart-Qt", im_part, BUDGETS[:1], quantised=True),
    *at_budgets("SVD of the delta", truncated, BUDGETS),
    Peer("BitDelta", "averaged", bit_delta),
    Peer("BitDelta, as published", "own", bit_delta),
    _llama_cpp("Q8_0"),
    _llama_cpp("Q4_0"),
    Apart("models apart, GPTQ 4 bits", "own", apart.by_gptq),
    Apart("models apart, NF4", "own", apart.by_nf4),
    *(Router(method.name, "averaged", method) for method in table.METHODS if method.name.startswith(("SMILE", "Twin"))),
]
