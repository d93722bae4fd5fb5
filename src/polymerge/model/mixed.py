"""The loaded bundle: a Hugging Face model that takes one more argument, `experts`.

Knows how an assignment is set for the time of one call. Does not know layers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .assignment import Assignment, Experts, RowExpert, entries_of
from .generating import settings_of_rows
from .personas import AVERAGE, Personas
from .step import FixedStep

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from .base_weights import BaseWeights
    from .holders import Placed
    from .vocabulary import Vocabularies


class MixedModel(nn.Module):
    """One base and the residuals of all experts. For inference. Calls from several threads wait for each other.

    `experts` names, for a batch: None (every row the average), one name or mixture for all rows, or a sequence with
    one entry a row: a name, None for the average, or a mixture {name: weight} (weights are normalised to sum to 1;
    a mixture is one of weights: the layer's matrix is the weighted mean of the experts' matrices).

    Attributes:
        hf: the transformers model with its layers replaced.
        vocabularies: how many tokens each expert knows; the logits of others are -inf.
        bundle: where it came from.
        base: how the average's linear layers are held in memory, as `load_model` takes it.
        base_divergence: KL of the 16-bit bundle's answers from these, measured when a quantised base was loaded; None
            where the memory did not hold both.
        base_weights: the average's, for another model beside this one; None where they are held otherwise.
        strategy: how a batch of several experts is run: through all "layers" once, or in "groups", once for every
            expert, where an architecture allows nothing finer.
    """

    def __init__(
        self,
        hf: Any,
        state: Assignment,
        bundle: Bundle,
        placed: Placed,
        vocabularies: Vocabularies,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.vocabularies = vocabularies
        self.hf, self._state, self.bundle = hf, state, bundle
        self.stand_ins = nn.ModuleList(placed.modules)  # what stands in the place of a forward is no part of the tree
        self.strategy = placed.strategy
        self.base = "16bit"
        self.base_divergence: float | None = 0.0
        self.base_weights: BaseWeights | None = None
        self.personas = Personas(bundle, trust_remote_code=trust_remote_code)
        self._turn = threading.RLock()  # the rows of a call are one state that all layers read
        hf.save_pretrained = _not_saved  # its layers have other parameters than transformers' (GPT-2, mixtures)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises ModelError: layers of a copy would read the rows of the first."""
        raise ModelError(
            "a loaded bundle is not copied or pickled; load it again, with `beside` for one copy of the base"
        )

    def forward(self, input_ids: Tensor | None = None, *args: Any, experts: Experts = None, **kwargs: Any) -> Any:
        """The transformers model's own forward. input_ids [B, T] (or `inputs_embeds` [B, T, H]). Logits have a place
        for every token of the bundle's tables; those of tokens that a row's expert does not know are -inf.

        Raises:
            ModelError: a token that its row's expert does not know.
        """
        entries = entries_of(experts, _rows(input_ids, kwargs))
        with self._turn:
            self._check_tokens(entries, input_ids, kwargs)
            with self.assigned(entries, len(entries)):
                return self.hf(input_ids, *args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        experts: Experts = None,
        **kwargs: Any,
    ) -> Any:
        """The transformers model's own `generate`. inputs [B, T] (or `input_ids`), left-padded. What the caller does
        not say is as the generation settings of the rows' experts have it, end tokens too.

        Raises:
            ModelError: as `forward`; or settings of two rows' experts that cannot hold in one batch.
        """
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        entries = entries_of(experts, _rows(inputs, kwargs))
        with self._turn:
            self._check_tokens(entries, inputs, kwargs)
            with (
                self.assigned(entries, len(entries)),
                settings_of_rows(self.hf, self.personas, entries, generation_config, kwargs) as options,
            ):
                return self.hf.generate(inputs, generation_config, *args, **options)

    @contextmanager
    def assigned(self, experts: Experts, rows: int) -> Iterator[None]:
        """Everything that runs inside uses these experts, for batches of `rows` rows (or their beams)."""
        self._state.set(experts, rows)
        try:
            self._check_mixtures()
            yield
        finally:
            self._state.set(None, 1)

    def _check_tokens(self, entries: list[RowExpert], ids: Tensor | None, kwargs: dict[str, Any]) -> None:
        if ids is None or not self.vocabularies.differ:
            return
        self.check_experts(entries, len(ids))
        self.vocabularies.check(entries, ids, kwargs.get("attention_mask"))

    def _check_mixtures(self) -> None:
        names = [*self._state.names, AVERAGE]
        for weights, _ in self._state.groups:
            if 1.0 not in weights:
                members = {name: weight for name, weight in zip(names, weights, strict=True) if weight}
                self.personas.check_mixture(members)

    def check_experts(self, experts: Experts, rows: int = 1) -> None:
        """Raises ModelError for what `forward` and `generate` would refuse."""
        with self.assigned(experts, rows):
            pass

    @property
    def experts(self) -> list[str]:
        """The experts' names, in the recipe's order."""
        return list(self._state.names)

    @property
    def assignment(self) -> Assignment:
        """What its layers read of a batch."""
        return self._state

    def step_objection(self) -> str | None:
        """Why a decoding step cannot have fixed shapes (`polymerge.model.step`); None where it can."""
        if self.vocabularies.differ:
            return "its experts have vocabularies of their own"
        return FixedStep.objection([*self.hf.modules(), *self.stand_ins.modules()])

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.hf.config

    @property
    def generation_config(self) -> Any:
        """The transformers generation configuration."""
        return self.hf.generation_config

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self._state.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        dtype: torch.dtype = self.hf.dtype
        return dtype

    @property
    def tokenizer(self) -> Any:
        """The average's tokenizer, padding on the left as generation needs it."""
        return self.tokenizer_of(None)

    def tokenizer_of(self, expert: RowExpert) -> Any:
        """An expert's own tokenizer, with its chat template. Raises ModelError where it has none that can be used."""
        return self.personas.tokenizer(expert)

    def to(self, *args: Any, **kwargs: Any) -> MixedModel:
        """As torch's; the assignment moves along.

        Raises:
            ModelError: the base is quantised.
        """
        if self.base != "16bit":
            raise ModelError(f"a base in {self.base} stays where it was loaded, and in its dtype; load it anew")
        super().to(*args, **kwargs)
        self._state.device = next(self.hf.parameters()).device
        self._state.set(None, 1)
        return self


def _not_saved(*_: Any, **__: Any) -> None:
    raise ModelError(
        "a loaded bundle is not saved: its folder is a checkpoint of the average already, and `polymerge export --to "
        "dense` makes one of an expert"
    )


def _rows(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    embeds = kwargs.get("inputs_embeds")
    if inputs is not None:
        return int(inputs.shape[0])
    return int(embeds.shape[0]) if embeds is not None else 1
