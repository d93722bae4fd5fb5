"""An expert's dense tensors under the names of its checkpoint: matrices that are stored in one tensor are put together.

Knows which tensors a checkpoint of the bundle's architecture has. Does not know how an expert's are rebuilt
(`polymerge.bundle.expert`) or written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bundle import Bundle
from .layer import stored_layers, stored_shape


def dense_state(bundle: Bundle, expert: str | None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of an expert in float32, or of the average, as they are stored where they are; in memory.

    Args:
        dtype: of what is a number.
    """
    read = bundle.expert_reader(expert).read if expert else bundle.average_tensor
    state = {}
    for name, layers in stored_layers(bundle.manifest.layers).items():
        parts = [read(layer.tensor) for layer in layers]
        tensor = torch.stack(parts).view(stored_shape(layers)) if layers[0].slice else parts[0]
        state[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    return state
