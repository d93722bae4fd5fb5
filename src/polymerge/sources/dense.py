"""A checkpoint as a transformers model, whatever it is made of.

The folder of a plain checkpoint holds its weights, and transformers reads it. An adapter over its base, or a quantised
checkpoint, is only whole when it is read tensor by tensor. Knows nothing of bundles.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import SourceError
from .checkpoint import Checkpoint
from .classes import opener_of


def dense_model(checkpoint: Checkpoint, *, dtype: torch.dtype, **options: Any) -> Any:
    """The model of a checkpoint, on the CPU.

    Args:
        options: of `from_pretrained`.

    Raises:
        SourceError: a parameter of the model is not in the checkpoint.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.folder, **options)
    opener = opener_of(config)
    if checkpoint.in_folder:
        return opener.from_pretrained(checkpoint.folder, dtype=dtype, **options)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.device("meta"):
        kind: Any = type(opener.from_config(config, trust_remote_code=options.get("trust_remote_code")))
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    model, info = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, **options
    )
    missing = [name for kind in ("missing_keys", "mismatched_keys") for name in info[kind]]
    if missing:
        raise SourceError(f"{checkpoint.label}: has no tensor for {missing[0]!r} of {type(model).__name__}")
    return model
