"""What the manifest and the statistics say of experts, gathered from the notes of their finished tensors.

For a merge's experts and for one that is added alike. Knows tasks and notes; does not know how they came about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from ..bundle.kept import ROW_NUMBERS
from ..bundle.layer import Borrowed, BundleLayer
from ..bundle.manifest import ExpertRecord
from ..host import dtype_name
from ..method.code import Code
from ..method.nearest import NUMBERS
from ..sources.checkpoint import Checkpoint
from ..sources.persona import Group
from .journal import Note
from .precision import main_dtype
from .treatment import TensorTask
from .vocabulary import Ranges


def bundle_layer(task: TensorTask, note: Note, code: Code) -> BundleLayer:
    """The manifest's line for a finished tensor of a bundle with this code."""
    record = task.record
    return BundleLayer(
        tensor=record.tensor,
        module=record.module,
        parameter=record.parameter,
        role=record.role,
        transposed=record.transposed,
        shape=task.shape,
        rank=task.rank,
        mean_scale=note.stats[0].mean_scale if note.stats and task.against_base and not task.tables else None,
        dtype=dtype_name(task.dtype) if task.dtype else None,
        slice=record.slice,
        base=task.base,
        ranks=other_ranks(task, note),
        borrowed={expert: Borrowed(of=lender, times=times) for expert, (lender, times) in note.borrowed.items()},
        rows=kept_rows(note),
        numbers=as_numbers(note, code),
    )


def kept_rows(note: Note) -> dict[str, int]:
    """Expert -> how many rows it keeps of a table, where these alone are stored; also of one that has another's."""
    rows = {p.owner: p.shape[0] for p in note.pieces if p.owner and p.key.endswith(ROW_NUMBERS)}
    return rows | {expert: rows[lender] for expert, (lender, _) in note.borrowed.items() if lender in rows}


def as_numbers(note: Note, code: Code) -> tuple[str, ...]:
    """Experts whose residual is stored as numbers because these are nearer than the code's; also those that have
    another's."""
    if code.peft_readable:
        return ()
    few = {piece.owner for piece in note.pieces if piece.owner and piece.key.endswith(NUMBERS[0])}
    few |= {expert for expert, (lender, _) in note.borrowed.items() if lender in few}
    return tuple(sorted(few))


def numbers_in(expert: str, tasks: Sequence[TensorTask], notes: Sequence[Note], code: Code) -> set[str]:
    """Tensors of which an expert's residual is stored as numbers in a bundle with this code."""
    return {task.name for task, note in zip(tasks, notes, strict=True) if expert in as_numbers(note, code)}


def other_ranks(task: TensorTask, note: Note) -> dict[str, int]:
    """Expert -> rank of its residual, where it has one. From the average, one that has all that the compress rate pays
    for is not listed."""
    said = task.rank if task.base == "average" else 0
    return {line.expert: line.rank for line in note.stats if line.rank and line.rank != said}


def with_tables(
    layers: Sequence[BundleLayer], tasks: Sequence[TensorTask], experts: Iterable[ExpertRecord], average: int | None
) -> tuple[BundleLayer, ...]:
    """The manifest's lines, with what has a row a token marked where experts, or the average, have other rows."""
    if not average and not any(record.vocabulary or record.rows for record in experts):
        return tuple(layers)
    tables = {task.name for task in tasks if task.tables}
    return tuple(layer.model_copy(update={"table": layer.tensor in tables}) for layer in layers)


def expert_record(
    expert: str,
    checkpoint: Checkpoint,
    tasks: Sequence[TensorTask],
    notes: Sequence[Note],
    persona: tuple[Group, ...] = (),
) -> ExpertRecord:
    """Where an expert came from, and the hash over the names and bytes of its tensors."""
    lines = (f"{task.sources[expert]} {note.digests[expert]}\n" for task, note in zip(tasks, notes, strict=True))
    return ExpertRecord(
        **asdict(checkpoint.whence),
        sha256=hashlib.sha256("".join(lines).encode()).hexdigest(),
        dtype=dtype_name(main_dtype(expert, checkpoint, tasks)),
        persona=persona,
        vocabulary=next((task.tables.narrow(expert) for task in tasks if task.tables), None),
        rows=own_rows_of(expert, tasks, notes),
    )


def own_rows_of(expert: str, tasks: Sequence[TensorTask], notes: Sequence[Note]) -> Ranges:
    """Which rows of tables an expert has of its own, where that is not said by whole tables that it has anyway."""
    for task, note in zip(tasks, notes, strict=True):
        pieces = [piece for piece in note.pieces if piece.owner == expert] if task.tables else []
        if task.tables and any(task.treatment == "average" or piece.shape != task.shape for piece in pieces):
            return task.tables.ranges.get(expert, ())
    return ()


def scales_of(expert: str, tasks: Sequence[TensorTask], notes: Sequence[Note]) -> dict[str, float]:
    """Tensor -> rho_i, where the expert has one."""
    return {task.name: n.scales[expert] for task, n in zip(tasks, notes, strict=True) if expert in n.scales}


def ranks_of(expert: str, tasks: Sequence[TensorTask], notes: Sequence[Note]) -> dict[str, int]:
    """Tensor -> rank of an expert's residual, where that is not the layer's."""
    ranks = {task.name: other_ranks(task, note) for task, note in zip(tasks, notes, strict=True)}
    return {tensor: its[expert] for tensor, its in ranks.items() if expert in its}


def ratios_of(notes: Sequence[Note]) -> list[float]:
    """Every rho of every expert."""
    return [ratio for note in notes for ratio in note.scales.values()]
