"""How near a model is to an original on given requests: the distance of next-token distributions, and right answers.

Knows examples and logits; does not know bundles, nor how what is compared was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.local.engine import HFEngine
from ..engine.local.forced import TOGETHER, Logits, batches, read_together
from ..errors import RecipeError
from ..recipe.source import Source
from .examples import Example


@dataclass(frozen=True)
class Agreement:
    """How near a model is to an original.

    An answer is right when greedy decoding would give exactly it: every token of the answer, and the end of the text,
    is the model's likeliest after the right ones before it. That needs no generation: one forward pass tells it. It is
    another question than `polymerge.data.score` answers, which takes a generated text and forgives its form.

    Attributes:
        kl: mean KL(original || model) of the next token, in nats a token.
        top1: share of tokens at which both have the same likeliest one.
        tokens: how many were compared.
        accuracy: share of the examples with an answer on which the model is right; None where none has an answer.
        original_accuracy: the original's.
    """

    kl: float
    top1: float
    tokens: int
    accuracy: float | None = None
    original_accuracy: float | None = None

    @property
    def kept(self) -> float | None:
        """The accuracy as a share of the original's; None where that is nothing."""
        return self.accuracy / self.original_accuracy if self.accuracy is not None and self.original_accuracy else None


@dataclass(frozen=True)
class ExampleAgreement:
    """One example of an `Agreement`, for whoever pairs examples.

    Attributes:
        kl: summed over the tokens, in nats. same: tokens at which both have the same likeliest one.
        right, original_right: whether greedy decoding gives the answer; None for an example without one.
    """

    kl: float
    same: int
    tokens: int
    right: bool | None
    original_right: bool | None


@dataclass(frozen=True)
class ComparedTokens:
    """Token ids of prompt and answer, and how many at the end are compared."""

    ids: list[int]
    compared: int
    has_answer: bool

    def is_greedy(self, log_probabilities: Tensor) -> bool:
        """Whether greedy decoding would give exactly the answer's tokens. [compared, vocabulary]"""
        return log_probabilities.argmax(-1).tolist() == self.ids[-self.compared :]


class Reference:
    """What an original says on its examples; other models are held against it.

    Attributes:
        accuracy: the original's own; None where no example has an answer.

    Raises:
        RecipeError: no example has two tokens. SourceError, ModelError: the original cannot be run.
    """

    def __init__(self, source: Source | str, examples: Sequence[Example], *, trust_remote_code: bool = False) -> None:
        engine = HFEngine.from_checkpoint(source, trust_remote_code=trust_remote_code)
        self._rows = [row for row in (compared_tokens(engine, example) for example in examples) if row.compared > 0]
        if not self._rows:
            name = source.source if isinstance(source, Source) else source
            raise RecipeError(f"{name}: none of its prompts has two tokens, so there is nothing to compare")
        self._original = list(self._log_probabilities(lambda ids: engine.model(ids).logits, engine.device))
        answered = [row.is_greedy(o) for row, o in zip(self._rows, self._original, strict=True) if row.has_answer]
        self.accuracy = sum(answered) / len(answered) if answered else None

    def against(self, logits: Logits, device: torch.device | None = None, together: int = TOGETHER) -> Agreement:
        """Compares a model that has the original's tokens.

        Args:
            device: where `logits` takes its ids.
            together: tokens in one call of `logits`, padding counted; 0 is one example a call, in their order.
        """
        return agreement(self.each(logits, device, together))

    def each(
        self, logits: Logits, device: torch.device | None = None, together: int = TOGETHER
    ) -> list[ExampleAgreement]:
        """As `against`, example by example."""
        others = self._log_probabilities(logits, device, together)
        return [_compared(row, one, other) for row, one, other in zip(self._rows, self._original, others, strict=True)]

    def _log_probabilities(
        self, logits: Logits, device: torch.device | None, together: int = TOGETHER
    ) -> Iterator[Tensor]:
        """[compared tokens, vocabulary] of every example, on the CPU."""
        for rows in batches(self._rows, lambda row: len(row.ids), together):
            for row, token_logits in zip(rows, read_together([r.ids for r in rows], logits, device), strict=True):
                yield torch.log_softmax(token_logits[-1 - row.compared : -1].float(), dim=-1).cpu()


def agreement(examples: Sequence[ExampleAgreement]) -> Agreement:
    """All examples together."""
    tokens, answered = sum(e.tokens for e in examples), [e for e in examples if e.right is not None]
    accuracy = sum(bool(e.right) for e in answered) / len(answered) if answered else None
    original = sum(bool(e.original_right) for e in answered) / len(answered) if answered else None
    kl, same = sum(e.kl for e in examples) / tokens, sum(e.same for e in examples) / tokens
    return Agreement(kl, same, tokens, accuracy, original)


def _compared(row: ComparedTokens, original: Tensor, whole: Tensor) -> ExampleAgreement:
    other = whole[:, : original.shape[-1]]  # a bundle may hold tokens that the original does not know
    return ExampleAgreement(
        kl=float((original.exp() * (original - other)).sum()),
        same=int((original.argmax(-1) == other.argmax(-1)).sum()),
        tokens=len(original),
        right=row.is_greedy(other) if row.has_answer else None,
        original_right=row.is_greedy(original) if row.has_answer else None,
    )


def compared_tokens(engine: HFEngine, example: Example) -> ComparedTokens:
    """An example as the original's chat template has it."""
    prompt = engine.chat_prompt([{"role": "user", "content": example.prompt}])
    if not example.answer:
        return ComparedTokens(prompt, len(prompt) - 1, False)
    end = engine.tokenizer.eos_token_id
    answer = engine.encode(example.answer, special=False) + ([end] if end is not None else [])
    return ComparedTokens(prompt + answer, len(answer), True)
