"""PEFT's own files of adapters, and PEFT's own forward pass of them, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel

from polymerge.recipe.source import Source
from polymerge.sources.checkpoint import Checkpoint
from polymerge.sources.dense import dense_model
from polymerge.sources.opening import open_checkpoint
from tests.tiny import VOCAB


def write_adapter(
    folder: Path,
    base: Path,
    *,
    save_embedding_layers: Any = "auto",
    resize: int | None = None,
    seed: int = 7,
    **config: Any,
) -> Path:
    """PEFT's own file of an adapter whose every parameter is trained away from where it started."""
    torch.manual_seed(seed)
    settings = LoraConfig(**{"r": 4, "lora_alpha": 6, **config})
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if resize:
        model.resize_token_embeddings(resize)
    model = peft.get_peft_model(model, settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder


def by_peft(adapter: Path, base: Path, *, resize: int | None = None) -> Any:
    """The adapter on its base as PEFT loads it. Nothing of the adapter may be left over."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if resize:
        model.resize_token_embeddings(resize)
    return PeftModel.from_pretrained(model, adapter).eval()


def opened(adapter: Path, base: Path) -> Checkpoint:
    return open_checkpoint(Source(source=str(adapter), base=str(base)))


@torch.no_grad()
def logits(model: Any, vocabulary: int = VOCAB) -> torch.Tensor:
    ids = torch.randint(0, vocabulary, (3, 11), generator=torch.Generator().manual_seed(1))
    logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def assert_answers_as_peft(adapter: Path, base: Path, *, resize: int | None = None) -> Checkpoint:
    """A dense model of the checkpoint's tensors against PEFT's forward pass, which differs from the base's."""
    checkpoint = opened(adapter, base)
    expected = logits(by_peft(adapter, base, resize=resize), resize or VOCAB)
    actual = logits(dense_model(checkpoint, dtype=torch.float32).eval(), resize or VOCAB)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    untouched = logits(transformers.AutoModelForCausalLM.from_pretrained(base).eval())
    assert resize or float((expected - untouched).abs().max()) > 1e-3
    return checkpoint
