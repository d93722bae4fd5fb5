"""How a merged result answers: rows of all experts in one call, whatever the method makes of that.

Knows transformers' models; does not know how they were merged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from polymerge.demo.train import load_base


class Served(ABC):
    """One method's result, loaded.

    Attributes:
        tokenizer: pads on the left.
        one_batch: whether rows of different experts run in one batch.
    """

    tokenizer: Any
    one_batch = True

    @abstractmethod
    def logits(self, ids: Tensor, prompt: int, expert: str) -> Tensor:
        """ids [1, T], of which the first `prompt` are the request -> [1, T, vocabulary]."""

    @abstractmethod
    def generate(self, ids: Tensor, mask: Tensor, experts: Sequence[str], **options: Any) -> Tensor:
        """Greedy continuation. ids, mask [B, T], padded on the left; `experts` names each row's. [B, T + new]"""


class OneModel(Served):
    """A model that is not told which expert a row belongs to."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def logits(self, ids: Tensor, prompt: int, expert: str) -> Tensor:
        logits: Tensor = self.model(ids).logits
        return logits

    def generate(self, ids: Tensor, mask: Tensor, experts: Sequence[str], **options: Any) -> Tensor:
        return greedy(self.model, ids, mask, **options)


class InTurn(Served):
    """A dense model an expert, each run on its own rows."""

    one_batch = False

    def __init__(self, models: Mapping[str, Any], tokenizer: Any) -> None:
        self.models, self.tokenizer = models, tokenizer

    def logits(self, ids: Tensor, prompt: int, expert: str) -> Tensor:
        logits: Tensor = self.models[expert](ids).logits
        return logits

    def generate(self, ids: Tensor, mask: Tensor, experts: Sequence[str], **options: Any) -> Tensor:
        parts, width = {}, 0
        for name in dict.fromkeys(experts):
            rows = [number for number, expert in enumerate(experts) if expert == name]
            parts[name] = rows, greedy(self.models[name], ids[rows], mask[rows], **options)
            width = max(width, parts[name][1].shape[1])
        answers = torch.full((len(ids), width), int(self.tokenizer.pad_token_id))
        for rows, new in parts.values():
            answers[rows, : new.shape[1]] = new
        return answers


@torch.no_grad()
def greedy(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """transformers' own greedy search."""
    tokens: Tensor = model.generate(ids, attention_mask=mask, do_sample=False, **options)
    return tokens


def load_shared(base: str, folder: Path | None = None) -> tuple[Any, Any]:
    """The pre-trained model with the tensors of `folder`/shared.safetensors in their places, and its tokenizer."""
    model, tokenizer = load_base(Path(base))
    file = folder / "shared.safetensors" if folder else None
    if file and file.exists():
        put(model, load_file(file))
    return model.eval().requires_grad_(False), tokenizer


def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replaces parameters by name. Raises KeyError for a name that the model does not have."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
