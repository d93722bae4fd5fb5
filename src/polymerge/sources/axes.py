"""Which tensors share an axis whose units may change places: the neurons of an MLP, the heads of an attention.

Found by the names that transformers' models use for the ends of such an axis, and by shapes. A name does not prove that
a permutation leaves the function as it is; `polymerge.merging.align` proves it on a small model before it is relied on.
Reads no weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SourceError
from .checkpoint import Checkpoint, architecture_of, read_json
from .layers import LayerRecord

NEURONS_OUT = ("down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "w2")
NEURONS_IN = (
    "gate_proj", "up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "w1", "w3",
)  # fmt: skip
HEADS_OUT = ("o_proj", "out_proj", "dense", "c_proj")
QUERIES = ("q_proj", "q_b_proj", "g_proj")
KEYS_AND_VALUES = ("k_proj", "v_proj")
# Of every query head, in attention with a compressed cache.
KEYS_OF_QUERIES = "kv_b_proj"
# All queries, then all keys, then all values.
CHUNKED = ("qkv_proj", "c_attn", "Wqkv", "qkv")
# Group by group: its queries, its key, its value.
INTERLEAVED = ("query_key_value",)
NORMS = {"q": ("q_norm", "q_layernorm"), "k": ("k_norm", "k_layernorm")}


@dataclass(frozen=True)
class Member:
    """A tensor with the axis.

    Attributes:
        tensor: its name in the checkpoint.
        dim: along which the units lie.
        places: int64 [units, width]: where along it each unit's numbers lie.
    """

    tensor: str
    dim: int
    places: Tensor


@dataclass(frozen=True)
class Axis:
    """Units that may change places, in all of these tensors alike.

    Attributes:
        name: of the module that has them.
        units: how many neurons, or query heads.
        members: the tensors with an axis of them.
        groups: how many key-value heads, each read by as many query heads; 0 for neurons.
        group_members: the tensors with an axis of key-value heads.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    groups: int = 0
    group_members: tuple[Member, ...] = ()


# tensor -> its shape
Shapes = Mapping[str, tuple[int, ...]]
# leaf module -> parameter -> its record
Leaves = dict[str, dict[str, LayerRecord]]


def axes_of(records: Mapping[str, LayerRecord], shapes: Shapes, folder: Path) -> tuple[Axis, ...]:
    """The axes of a checkpoint, in the order of its modules.

    Args:
        records: of every tensor.
        folder: where its config.json lies.

    Raises:
        SourceError: it has fused mixtures of experts, or no axis is known.
    """
    name = architecture_of(read_json(folder / "config.json"))
    fused = next((n for n, r in records.items() if r.slice or (len(shapes[n]) == 3 and "expert" in n)), None)
    if fused:
        raise SourceError(f"align: {fused!r} of {name} is a fused mixture of experts, which cannot be aligned")
    heads, groups = _heads(folder)
    axes = []
    for module, leaves in _modules(records.values()).items():
        axes += [*_neurons(module, leaves, shapes), *_attention(module, leaves, shapes, heads, groups)]
    if not axes:
        raise SourceError(f"align: no axis is known of {name}; leave `align` out")
    return tuple(axes)


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Of all its tensors."""
    return {name: info.shape for name, info in checkpoint.tensors.items()}


def renamed(axis: Axis, names: Mapping[str, str]) -> Axis:
    """The axis in a checkpoint that calls its tensors otherwise."""
    members = [tuple(replace(m, tensor=names[m.tensor]) for m in group) for group in (axis.members, axis.group_members)]
    return replace(axis, members=members[0], group_members=members[1])


def _heads(folder: Path) -> tuple[int, int]:
    """Query heads and key-value heads; 0 where the configuration does not say them."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except Exception:  # code of its own
        return 0, 0
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    return (heads, groups) if type(heads) is int and type(groups) is int and heads and groups else (0, 0)


def _modules(records: Iterable[LayerRecord]) -> dict[str, Leaves]:
    """Module -> its modules of the last floor; parameters of its own stand under their own names."""
    parents: dict[str, Leaves] = {}
    for record in records:
        parent, _, leaf = record.module.rpartition(".")
        parents.setdefault(parent, {}).setdefault(leaf, {})[record.parameter] = record
        if record.parameter not in ("weight", "bias"):
            parents.setdefault(record.module, {}).setdefault(record.parameter, {})["weight"] = record
    return parents


def _neurons(module: str, leaves: Leaves, shapes: Shapes) -> Iterator[Axis]:
    out, inside = _first(leaves, NEURONS_OUT), [leaves[name] for name in NEURONS_IN if name in leaves]
    if out is None or not inside:
        return
    dim = _side(out["weight"], 1)
    units = shapes[out["weight"].tensor][dim]
    members = [Member(out["weight"].tensor, dim, torch.arange(units)[:, None])]
    for leaf in inside:
        for record in leaf.values():
            rows = shapes[record.tensor][_side(record, 0)]
            if rows % units:
                return
            places = torch.arange(rows).reshape(-1, units).T.contiguous()  # a fused gate comes before its ups
            members.append(Member(record.tensor, _side(record, 0), places))
    yield Axis(module, units, tuple(members))


def _attention(module: str, leaves: Leaves, shapes: Shapes, heads: int, groups: int) -> Iterator[Axis]:
    out = _first(leaves, HEADS_OUT)
    if out is None or not heads or heads % groups:
        return
    dim = _side(out["weight"], 1)
    width = shapes[out["weight"].tensor][dim]
    groups = heads if KEYS_OF_QUERIES in leaves else groups
    queries, keys = [_split(out["weight"], dim, width, heads)], []
    for name, leaf in leaves.items():
        for record in leaf.values():
            side = _side(record, 0)
            shape = shapes[record.tensor]
            rows = shape[side] if shape else 0
            if name in QUERIES:
                queries.append(_split(record, side, rows, heads))
            elif name in KEYS_AND_VALUES or name == KEYS_OF_QUERIES:
                keys.append(_split(record, side, rows, groups))
            elif name in CHUNKED or name in INTERLEAVED:
                both = _fused(record, side, rows, heads, groups, interleaved=name in INTERLEAVED)
                queries.append(both and both[0])
                keys.append(both and both[1])
            elif name == "sinks" or (name in NORMS["q"] and (rows == width or (rows == heads and len(shape) == 2))):
                queries.append(_split(record, 0, rows, heads))
            elif name in NORMS["k"] and (rows == width * groups // heads or (rows == groups and len(shape) == 2)):
                keys.append(_split(record, 0, rows, groups))
    if len(queries) < 2 or not keys or None in queries or None in keys:
        return
    yield Axis(module, heads, tuple(m for m in queries if m), groups, tuple(m for m in keys if m))


def _split(record: LayerRecord, dim: int, size: int, units: int) -> Member | None:
    """A tensor whose units lie one after the other, all of one width."""
    return None if size % units else Member(record.tensor, dim, torch.arange(size).reshape(units, -1))


def _fused(
    record: LayerRecord, dim: int, rows: int, heads: int, groups: int, *, interleaved: bool
) -> tuple[Member, Member] | None:
    """A tensor of queries, keys and values: the places of its query heads, and those of its key-value heads."""
    if rows % (heads + 2 * groups):
        return None
    width = rows // (heads + 2 * groups)
    if interleaved:
        by_group = torch.arange(rows).reshape(groups, heads // groups + 2, width)
        queries, keys = by_group[:, :-2].reshape(heads, width), by_group[:, -2:].reshape(groups, -1)
    else:
        queries = torch.arange(heads * width).reshape(heads, width)
        pairs = torch.arange(heads * width, rows).reshape(2, groups, width)
        keys = pairs.transpose(0, 1).reshape(groups, -1)
    return Member(record.tensor, dim, queries), Member(record.tensor, dim, keys)


def _first(leaves: Leaves, names: tuple[str, ...]) -> dict[str, LayerRecord] | None:
    """The leaf of the first of these names that has a matrix."""
    return next((leaves[name] for name in names if name in leaves and "weight" in leaves[name]), None)


def _side(record: LayerRecord, dim: int) -> int:
    """Where an axis of a [out, in] matrix lies in the tensor as it is stored."""
    return 1 - dim if record.transposed else dim
