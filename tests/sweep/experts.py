"""Random tiny experts of any architecture, in which every tensor that is stored differs.

Knows how a model is changed and saved. Does not know merging.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from .configs import VOCAB, tiny_config

LENGTHS = (9, 5, 9, 7, 6)  # of the rows of a batch, padded on the left


MULTIMODAL = {
    f"{kind} (images)": kind
    for kind, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) != name
}  # architectures that read images as well -> the type of their configuration


def make_model(architecture: str) -> Any:
    """A tiny random model, in float32."""
    kind = MULTIMODAL.get(architecture, architecture)
    table = (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if architecture in MULTIMODAL else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    model, config = getattr(transformers, table[kind]), tiny_config(kind)
    if model.config_class and not isinstance(config, model.config_class):  # the text model of one that reads images
        config = config.get_text_config(decoder=True)
    torch.manual_seed(0)
    return model(config).float().eval()


def make_experts(
    architecture: str, folder: Path, *, count: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, Path]:
    """{"e0": folder, ...}: checkpoints near each other that differ in every parameter and every stored buffer."""
    model = make_model(architecture)
    _move(model, 0.1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    paths = {}
    for number in range(count):
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(start[name])
        _move(model, 0.05)
        paths[f"e{number}"] = folder / f"e{number}"
        cast = model.bfloat16 if dtype == torch.bfloat16 else model.float  # `to` would take complex buffers for real
        cast().save_pretrained(folder / f"e{number}")
        model.float()
    return paths


@torch.no_grad()
def _move(model: Any, by: float) -> None:
    """Adds noise to every tensor of the state that is a number, finite throughout; tied ones move once."""
    moved: set[int] = set()
    for value in model.state_dict().values():
        if value.is_floating_point() and bool(value.isfinite().all()) and value.data_ptr() not in moved:
            value.add_(by * torch.randn_like(value))
            moved.add(value.data_ptr())


def batch(model: Any) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the left, and their mask where the model takes one."""
    import inspect

    ids = torch.randint(5, VOCAB - 10, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, : max(LENGTHS) - length] = 0
    takes = inspect.signature(model.forward).parameters
    return {"input_ids": ids, "attention_mask": mask} if "attention_mask" in takes else {"input_ids": ids}
