"""How far a base in fewer bits moves a bundle's answers: two loaded models read one short text.

Knows logits. Does not know how a base is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .mixed import MixedModel

# Read by the average and by every expert.
TEXT = (
    "Question: A train leaves the station at 9:40 and arrives at 11:05. How many minutes does it take?\n"
    "Answer: From 9:40 to 10:40 are 60 minutes, and 25 more until 11:05, so it takes 85 minutes."
)


@torch.no_grad()
def log_probabilities(model: MixedModel, text: str = TEXT) -> list[Tensor]:
    """[T, V] float32 on the CPU, of the average and of every expert after each token of a text."""
    names = [None, *model.experts]
    known = min(model.vocabularies.of(name) for name in names)
    ids = [token for token in model.tokenizer_of(None).encode(text) if token < known]
    row = torch.tensor([ids], device=model.device)
    return [torch.log_softmax(model(row, experts=name).logits[0].float(), -1).cpu() for name in names]


def divergence(exact: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """KL(exact || other) in nats, the mean over all tokens. What neither can say (-inf) counts nothing."""
    each = [
        torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1).mean() for p, q in zip(exact, other, strict=True)
    ]
    return float(torch.stack(each).mean())


def in_words(kl: float | None) -> str:
    """What a quantised base costs, on one line."""
    if kl is None:
        return "its distance from the 16-bit bundle was not measured, both do not fit the device's memory"
    return f"KL {kl:.2g} from the 16-bit bundle (nats a token, a short text, average and experts)"
