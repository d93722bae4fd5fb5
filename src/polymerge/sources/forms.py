"""Where the rows of every stored tensor lie in a model's parameters.

A checkpoint may store a parameter in pieces, several parameters as one, rows in another order, or a matrix the other
way round. transformers' own rules say how; here they are run on the numbers of the rows, so that nothing needs to know
them. Knows names and rows; does not know experts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .slices import Slice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Rows of a stored tensor that are rows of one parameter. Rows are counted over all dimensions but the last.

    Attributes:
        parameter: its name in the model.
        source: rows of the stored tensor, [n]; of its transpose, where `transposed`.
        target: the rows of the parameter that they are.
    """

    parameter: str
    source: Tensor
    target: Tensor
    transposed: bool = False


def forms_of(model: PreTrainedModel) -> dict[str, list[Part]]:
    """Stored name -> its parts, for every tensor of the state. A tensor that is stored as it is has one part."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    starts, names, total = [], [], 0
    numbers: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        count = rows_of(shape)
        numbers[name] = (
            torch.arange(total, total + count, dtype=torch.float64).view(*shape[:-1], 1)
            if shape[1:]
            else (torch.arange(total, total + count, dtype=torch.float64).view(shape))
        )
        starts.append(total)
        names.append(name)
        total += count
    bounds = torch.tensor(starts)
    stored = stored_as(model, numbers)
    stored |= {name: numbers[name] for name in _turned_for_their_shape(model, stored, numbers, shapes)}
    return {name: _parts(value, names, bounds) for name, value in stored.items() if value.numel()}


def _turned_for_their_shape(
    model: PreTrainedModel,
    stored: Mapping[str, Tensor],
    numbers: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Tensors that a rule turns round only where they do not have the parameter's shape already (Qwen3-VL-MoE): those
    of row numbers do not, the tensors themselves do, and are stored as they are."""
    names = [n for n, value in stored.items() if n in numbers and value.shape != numbers[n].shape and value.dim() > 1]
    if not names:
        return []
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    real = stored_as(model, empty)
    return [name for name in names if real.get(name) is empty[name]]


def parts_of_slices(part: Part, first: Slice) -> list[Part]:
    """What every matrix of a stored tensor has in a part of that tensor; perhaps no rows.

    Args:
        first: of the matrices.
    """
    height = first.matrix_shape[1 if part.transposed else 0]
    owner = part.source // height
    order = owner.argsort(stable=True)
    sizes = owner.bincount(minlength=first.count).tolist()
    rows = zip(*(torch.split(numbers[order], sizes) for numbers in (part.source, part.target)), strict=True)
    return [Part(part.parameter, s - n * height, t, part.transposed) for n, (s, t) in enumerate(rows)]


def in_order(stored: Tensor | None, order: Tensor | None) -> Tensor | None:
    """A stored tensor with its rows as the parameter has them, `order` saying which stored row each one is."""
    if stored is None or order is None:
        return stored
    rows = stored.reshape(-1, stored.shape[-1]) if stored.dim() > 1 else stored
    return rows[order.to(stored.device)].view(stored.shape)


def rows_of(shape: tuple[int, ...]) -> int:
    """Rows of a tensor: all dimensions but the last; the numbers of a vector."""
    count = 1
    for size in shape[:-1] if len(shape) > 1 else shape:
        count *= size
    return count


def stored_as(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state as a checkpoint stores it, by transformers' own rules; where one does not work, as it is."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        stored: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
        return stored
    except Exception as error:  # a rule that cannot take these tensors
        log.debug("transformers' rules are tried one by one: %s", error)
    stored = {}
    for name, tensor in state.items():
        try:
            stored |= revert_weight_conversion(model, {name: tensor})
        except Exception as error:
            log.debug("no stored form for %s: %s", name, error)
            stored[name] = tensor
    return stored


def _parts(numbers: Tensor, names: list[str], starts: Tensor) -> list[Part]:
    transposed = numbers.dim() > 1 and numbers.shape[-1] != 1
    flat = (numbers.transpose(-1, -2) if transposed else numbers).flatten().long()
    owners = torch.searchsorted(starts, flat, right=True) - 1
    return [
        Part(names[owner], at, flat[at] - starts[owner], transposed)
        for owner in sorted(set(owners.tolist()))
        for at in [(owners == owner).nonzero().squeeze(1)]
    ]
