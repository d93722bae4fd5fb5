"""A model that transformers has loaded, with its tokenizer: what the engine and the running batch share.

Knows how a bundle or a plain checkpoint is loaded, tokens, padding and the assignment of experts. Does not know
requests, answers or batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from ...bundle.bundle import Bundle
from ...errors import ModelError, PolymergeError
from ...host import DTYPES, free_memory, pick_device, pick_dtype
from ...model.loading import load_model
from ...model.mixed import MixedModel
from ...model.quantised import check_base, held_digest, quantization_config
from ...model.remembered import remembered
from ...model.vocabulary import tokens_of
from ...recipe.source import Source
from ...sources.checkpoint import Checkpoint
from ...sources.dense import dense_model
from ...sources.fingerprint import digest_beside
from ...sources.opening import open_checkpoint
from ..base import Prompt
from ..defaults import GenerationDefaults, checkpoint_defaults
from ..grammar import Grammars
from ..text import in_vocabulary
from ..voices import Speaking, Voice, Voices

if TYPE_CHECKING:
    from ...model.assignment import RowExpert

# Tokens of a batch, padding included: wide enough to keep two to sixteen cores busy, small enough for a laptop.
BATCH_TOKENS = 4096
# On a GPU as many more as this share of the memory that is free holds; nothing gains from more than this many.
BATCH_SHARE, MOST_TOKENS = 0.6, 131_072
# Where a model has a state a row, rows are taken to be of so many tokens.
SHORT_ROW = 64


class LoadedModel(Speaking):
    """A model and its tokenizer.

    Args:
        model: a MixedModel, or a transformers causal language model whose requests name no expert.
        fingerprint: changes with anything that the results depend on.
        batch_tokens: tokens of one batch at most, padding included; one request always fits. By default what the
            device's memory holds.

    Attributes:
        voices: each expert's tokenizer, end tokens, settings and context.
        grammars: the forms that answers are held to.
        steps: how a running batch decodes: "auto" captures its steps and replays them where the device and the model
            allow it, "eager" never does, and "fixed" runs steps of such shapes also where they are not captured.

    Raises:
        ModelError: generation_config.json says something that means nothing.
    """

    voices: Voices
    steps: Literal["auto", "eager", "fixed"] = "auto"

    def __init__(self, model: Any, tokenizer: Any, *, fingerprint: str, batch_tokens: int | None = None) -> None:
        self.model, self.fingerprint = model, fingerprint
        self._mixed = isinstance(model, MixedModel)
        self.hf: Any = model.hf if self._mixed else model
        self.batch_tokens = batch_tokens or tokens_that_fit(self.hf, free_memory(self.device))
        self._tokens = tokens_of(self.hf)
        self.grammars = Grammars(self._tokens)
        label = str(model.bundle.path if self._mixed else self.hf.config.name_or_path or "the model")
        defaults = checkpoint_defaults(self.hf.generation_config, tokenizer, label)
        average = Voice(tokenizer, defaults, _context(self.hf, tokenizer))
        self.voices = Voices(average, model.personas.with_groups if self._mixed else None)

    @classmethod
    def from_bundle(cls, bundle: Bundle | str | Path, *, batch_tokens: int | None = None, **load: Any) -> Self:
        """A bundle; further arguments are `load_model`'s."""
        model = load_model(bundle, **load)
        digest = held_digest(model.bundle.digest, model.base)
        return cls(model, model.tokenizer, fingerprint=digest, batch_tokens=batch_tokens)

    @classmethod
    def from_checkpoint(
        cls,
        source: Source | str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        batch_tokens: int | None = None,
        base: str = "16bit",
    ) -> Self:
        """A plain model: a folder, a hub id, a GGUF file, an adapter over its base or `package:NAME`, as in a recipe.

        Args:
            base: how its linear layers are held, as `load_model` takes it.

        Raises:
            SourceError: it cannot be read. ModelError: transformers cannot load it.
        """
        from transformers import AutoTokenizer

        checkpoint = open_checkpoint(source)
        place = pick_device(device)
        chosen = pick_dtype(dtype, place, _stored_dtype(checkpoint))
        check_base(base, place)
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        held: dict[str, Any] = {}
        if base != "16bit":
            held = {"quantization_config": quantization_config(base, chosen), "device_map": {"": place}}
        try:
            model = dense_model(checkpoint, dtype=chosen, **options, **held)
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, padding_side="left", **options)
        except PolymergeError:
            raise
        except Exception as error:  # transformers raises many types for one unusable folder
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{checkpoint.label}: transformers cannot load it ({reason})") from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.eval().requires_grad_(False)
        if not held:  # which is there already, and must not be moved
            model.to(place)
        parts = [*checkpoint.fingerprint(), digest_beside(checkpoint.folder)]
        digest = held_digest(hashlib.sha256(" ".join(parts).encode()).hexdigest(), base)
        return cls(model, tokenizer, fingerprint=digest, batch_tokens=batch_tokens)

    @property
    def is_mixed(self) -> bool:
        """Whether it is a bundle's."""
        return self._mixed

    @property
    def experts(self) -> list[str]:
        """Names of the bundle's experts; none for a plain model."""
        return list(self.model.experts) if self._mixed else []

    @property
    def tokenizer(self) -> Any:
        """The average's."""
        return self.voices.average.tokenizer

    @property
    def max_length(self) -> int:
        """The average's context, in tokens."""
        return self.voices.average.max_length

    @property
    def depth(self) -> int:
        """The average's layers."""
        return int(self.hf.config.get_text_config().num_hidden_layers)

    def max_length_of(self, expert: RowExpert = None) -> int:
        """An expert's context, in tokens."""
        return self.voices.of(expert).max_length

    def defaults_of(self, expert: RowExpert = None) -> GenerationDefaults:
        """What the generation_config.json of an expert's checkpoint says."""
        return self.voices.of(expert).defaults

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return torch.device(self.hf.device)

    def tokenizer_of(self, expert: RowExpert = None) -> Any:
        """An expert's own."""
        return self.voices.of(expert).tokenizer

    def decode(self, ids: Sequence[int], *, expert: RowExpert = None) -> str:
        """The text of token ids, without special tokens. Raises ModelError for ids outside the vocabulary."""
        return self.voices.of(expert).text(self.checked(ids, expert), False)

    def ids(self, prompt: Prompt, expert: RowExpert = None) -> list[int]:
        """Token ids of a prompt. Raises ModelError as `checked` does."""
        return self.checked(self.encode(prompt, expert=expert) if isinstance(prompt, str) else prompt, expert)

    def checked(self, ids: Sequence[int], expert: RowExpert = None) -> list[int]:
        """Token ids as they are. Raises ModelError for one outside the expert's vocabulary."""
        tokens = self.model.vocabularies.of(expert) if self._mixed else self._tokens
        return in_vocabulary(ids, tokens)

    def check_expert(self, expert: Any) -> None:
        """Raises ModelError for an expert that the model does not have."""
        if self._mixed:
            self.model.check_experts(expert)
        elif expert not in (None, "average"):
            raise ModelError(f"a plain model has no experts; the request asks for {expert!r}")

    def assigned(self, experts: Any, rows: int) -> AbstractContextManager[None]:
        """Everything that runs inside uses these experts, one a row. Raises ModelError as `generate` does."""
        return self.model.assigned(experts, rows) if self._mixed else nullcontext()

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """ids and attention mask [B, T], padded on the left."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), int(self.tokenizer.pad_token_id))
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :] = torch.tensor(row)
            mask[number, width - len(row) :] = 1
        return ids.to(self.device), mask.to(self.device)


def tokens_that_fit(model: Any, free: int | None) -> int:
    """How many tokens a batch may have: what is kept of them, activations, and the scores of every token.

    Args:
        model: transformers'.
        free: bytes of the device; None where that is not known.
    """
    text = model.config.get_text_config()
    hidden, words = getattr(text, "hidden_size", None), getattr(text, "vocab_size", None)
    if free is None or not isinstance(hidden, int) or not isinstance(words, int):
        return BATCH_TOKENS
    kept = remembered(type(model), model.config, model.dtype)
    if not kept.parts:
        return BATCH_TOKENS
    a_token = kept.each + kept.state / SHORT_ROW
    each = a_token + (16 * hidden + words) * model.dtype.itemsize + 4 * words  # scores are in float32
    return int(min(max(BATCH_TOKENS, BATCH_SHARE * free / each), MOST_TOKENS))


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the checkpoint's configuration, or else of its first tensor that a model computes with."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    stored = next((info.dtype for info in checkpoint.tensors.values() if info.dtype), torch.float32)
    return DTYPES.get(str(named), stored)


def _context(hf: Any, tokenizer: Any) -> int:
    text_config = hf.config.get_text_config()
    return int(getattr(text_config, "max_position_embeddings", 0) or tokenizer.model_max_length)


def positions(mask: Tensor) -> Tensor:
    """Positions that padding on the left does not shift. [B, T]"""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
