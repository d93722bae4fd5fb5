"""Which file of a bundle each finished tensor goes to, and the room that the file's header gets, from the tasks alone.

Knows tasks and the bundle's files; writes nothing. The same tasks give the same layout, whoever does them in whatever
order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..bundle.files import header_room
from ..bundle.kept import ROW_NUMBERS
from ..bundle.peft import BIASED_PAIR, PEFT_PREFIX
from ..bundle.write import shards_of
from ..method.code import Code
from ..method.nearest import NUMBERS
from .plan import MergePlan
from .treatment import TensorTask


@dataclass(frozen=True)
class Layout:
    """Paths are relative to the bundle's folder.

    Attributes:
        base: tensor of the average -> its file; empty where the average is there already.
        experts: expert -> its file.
        rooms: file -> bytes of its header.
    """

    base: Mapping[str, str]
    experts: Mapping[str, str]
    rooms: Mapping[str, int]

    def file_of(self, owner: str | None, key: str) -> str:
        return self.base[key] if owner is None else self.experts[owner]

    def owner_of(self, file: str) -> str | None:
        return next((expert for expert, its in self.experts.items() if its == file), None)


def layout_of(plan: MergePlan) -> Layout:
    """Of a merge: the average's shards and every expert's file."""
    sizes: Counter[str] = Counter()
    for task in plan.tasks:
        sizes[_stored_in(task)] += task.stored_bytes(plan.dtype)
    shards = shards_of(sizes.items())
    places = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    base = {task.name: places[_stored_in(task)] for task in plan.tasks}
    rooms = {file: header_room(tensors) for file, tensors in shards.items()}
    adding = layout_of_experts(list(plan.checkpoints), plan.tasks, plan.code)
    return Layout(base, adding.experts, {**rooms, **adding.rooms})


def _stored_in(task: TensorTask) -> str:
    """The base's tensor that holds the task's: itself, or one of many matrices."""
    return task.record.slice.tensor if task.record.slice else task.name


def layout_of_experts(experts: Sequence[str], tasks: Sequence[TensorTask], code: Code) -> Layout:
    """Of experts over an average that is there."""
    biases = any(task.as_difference for task in tasks)
    files = {expert: f"experts/{expert}/{code.file_name}" for expert in experts}

    def room(expert: str) -> int:
        return header_room(PEFT_PREFIX + key for task in tasks for key in _keys_of(task, expert, code, biases))

    return Layout({}, files, {file: room(expert) for expert, file in files.items()})


def _keys_of(task: TensorTask, expert: str, code: Code, biases: bool) -> Iterator[str]:
    """All that an expert's file may hold for a tensor: its own, its factors, and what PEFT wants beside a bias."""
    record = task.record
    if expert in task.adapters and not task.adapters[expert][0] and not biases:
        return
    if task.treatment != "low_rank" or task.tables:
        yield f"{record.module}.{record.parameter}"
        if task.treatment == "keep" and task.record.role == "embedding":
            yield f"{record.module}.{record.parameter}{ROW_NUMBERS}"
    if task.against_base:
        pair = BIASED_PAIR if biases else ()
        yield from (f"{record.module}.{suffix}" for suffix in dict.fromkeys((*code.suffixes, *NUMBERS, *pair)))
