"""The two ends of a tied model under an adapter: whether one table still serves both.

Knows what PEFT does to a shared table when it loads an adapter. Knows nothing of the factors' arithmetic.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import SourceError
from .adapter_base import AdapterBase
from .adapter_changes import Changes
from .checkpoint import read_tensor
from .lora import Change, LowRank, Replaced


def part_the_ends(base: AdapterBase, changes: Changes, file: Path) -> bool:
    """Does to a tied head what PEFT does when it loads the adapter; True where the ends are no longer one.

    A base's table is one parameter, so what is loaded into it changes both ends, and rows of it are replaced at both.
    Factors, and modules of the adapter's own, change the end that they name; an adapter that was trained with both
    tied holds the same for each.
    """
    table, head = base.embedding, base.head
    if not base.tied or table is None:
        return False
    if head is None:
        _refuse_unknown_head(base, changes, table, file)
        return False
    _load_into_both(changes, table, head, file)
    tokens, others = changes.changed.get(table), changes.changed.get(head)
    if isinstance(tokens, Replaced) and _same_rows(tokens, others):
        changes.changed[head] = tokens
    if not _same_table(changes, table, head, file) or not _same_change(changes, table, head):
        return True
    changes.drop(head)
    return False


def _refuse_unknown_head(base: AdapterBase, changes: Changes, table: str, file: Path) -> None:
    change = changes.changed.get(table)
    if table in changes.apart or (change is not None and not isinstance(change, Replaced)):
        raise SourceError(
            f"{file}: changes {table!r}, which may be the head of {base.checkpoint.label} too: transformers does not "
            "know its architecture; merge the adapter into its base first"
        )


def _load_into_both(changes: Changes, table: str, head: str, file: Path) -> None:
    loaded = [target for target in (table, head) if target in changes.whole and target not in changes.apart]
    if len(loaded) == 2 and not _same_table(changes, table, head, file):
        raise SourceError(
            f"{file}: {changes.whole[table]!r} and {changes.whole[head]!r} differ, but the base has one table for "
            "both; untie the base first"
        )
    for target in (table, head):
        if loaded and target not in changes.apart:
            changes.whole[target] = changes.whole[loaded[0]]


def _same_table(changes: Changes, table: str, head: str, file: Path) -> bool:
    one, other = changes.whole.get(table), changes.whole.get(head)
    if one == other or one is None or other is None:
        return one == other
    return torch.equal(read_tensor(file, one), read_tensor(file, other))


def _same_change(changes: Changes, table: str, head: str) -> bool:
    one, other = changes.changed.get(table), changes.changed.get(head)
    if not isinstance(one, LowRank) or not isinstance(other, LowRank):
        return one is other
    factors = (one.b.T, other.a), (one.a.T, other.b)  # a table's are the other way round
    plain = one.magnitude is None and other.magnitude is None and one.scaling == other.scaling
    return plain and all(a.shape == b.shape and torch.equal(a, b) for a, b in factors)


def _same_rows(tokens: Replaced, others: Change | None) -> bool:
    return others is None or (isinstance(others, Replaced) and others.indices == tokens.indices)
