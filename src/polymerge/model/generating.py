"""Whose generation settings hold for a batch: transformers' `generate` has one set for all rows, experts their own.

Rows end at their own expert's tokens; of what else differs one set cannot be right. Knows personas and transformers'
loop; does not know layers.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..sources.persona import spoken_settings
from .assignment import RowExpert
from .personas import AVERAGE, Personas, speaker_of

ENDS = "eos_token_id"
# What an answer is begun and filled up with: of the whole batch.
OF_THE_BATCH = ("bos_token_id", "pad_token_id")
LENGTHS = ("max_length", "max_new_tokens")
# What holds only where tokens are drawn.
OF_DRAWING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# What looks at one list of end tokens for the whole batch -> the value that does nothing.
OF_ONE_END = {"num_beams": 1, "min_length": 0, "min_new_tokens": 0}


@contextmanager
def settings_of_rows(
    hf: Any, personas: Personas, experts: Sequence[RowExpert], config: Any, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Inside, the model's own generation settings are those of the rows' experts; the options to generate with.

    Args:
        config, options: what the caller says; it goes before the experts' own.

    Raises:
        ModelError: two rows' settings differ in what the caller does not say; names both and the setting.
    """
    said = {key: value for key, value in config.to_dict().items() if value is not None} if config is not None else {}
    said = {**said, **options}
    names = list(dict.fromkeys(speaker_of(expert) for expert in experts)) or [None]
    spoken = {name: spoken_settings(personas.of(name).generation) for name in names}
    key = next((key for key in _apart(list(spoken.values()), said) if key != ENDS), None)
    if key is not None:
        raise _contradiction(spoken, key, f"say {key}=")
    settings = _with(hf.generation_config, spoken_settings(personas.of(None).generation), spoken[names[0]])
    made = dict(options)
    if ENDS not in said and len({tuple(own[ENDS]) for own in spoken.values()}) > 1:
        by_one = next(
            (key for key, idle in OF_ONE_END.items() if _resolved(key, said, spoken) not in (None, idle)), None
        )
        if by_one is not None:
            raise _contradiction(spoken, ENDS, f"{by_one} looks at one list for all rows: say {ENDS}=")
        ends = [spoken[speaker_of(expert)][ENDS] for expert in experts]
        made["stopping_criteria"] = [*(options.get("stopping_criteria") or []), _RowsEnd(ends)]
        settings.eos_token_id = None
        if settings.pad_token_id is None:
            settings.pad_token_id = next(row[0] for row in ends if row)
    before, hf.generation_config = hf.generation_config, settings
    try:
        yield made
    finally:
        hf.generation_config = before


class _RowsEnd:
    """A stopping criterion of transformers: every row at its own tokens.

    Attributes:
        eos_token_id: that there is one tells transformers to fill up rows that have ended.
    """

    def __init__(self, ends: Sequence[Sequence[int]]) -> None:
        self._ends, self.eos_token_id = ends, sorted({token for row in ends for token in row})

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """ids [B * n, T] -> bool [B * n]"""
        repeats = len(ids) // len(self._ends)
        last = ids[:, -1].tolist()
        return torch.tensor([t in self._ends[n // repeats] for n, t in enumerate(last)], device=ids.device)


def _with(settings: Any, bundles: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """The model's settings, of which the user may have changed some, with what is an expert's and not the bundle's."""
    made = copy.deepcopy(settings)
    for key in {*bundles, *own}:
        if bundles.get(key) != own.get(key):
            setattr(made, key, own.get(key))
    return made


def _apart(spoken: Sequence[Mapping[str, Any]], said: Collection[str]) -> list[str]:
    """The settings that differ and count."""
    idle = {*said, *OF_THE_BATCH, *(LENGTHS if any(key in said for key in LENGTHS) else ())}
    if not _resolved("do_sample", said, dict(enumerate(spoken))):
        idle |= {*OF_DRAWING}
    keys = dict.fromkeys(key for own in spoken for key in own if key not in idle)
    return [key for key in keys if any(own.get(key) != spoken[0].get(key) for own in spoken)]


def _resolved(key: str, said: Any, spoken: Mapping[Any, Mapping[str, Any]]) -> Any:
    """What the caller says, or else the first of the experts that says anything."""
    if key in said:
        return said[key]
    return next((own[key] for own in spoken.values() if own.get(key)), None)


def _contradiction(spoken: Mapping[str | None, Mapping[str, Any]], key: str, way: str) -> ModelError:
    (one, first), *others = spoken.items()
    other, second = next((name, own) for name, own in others if own.get(key) != first.get(key))
    values = f"{first.get(key)} and {second.get(key)}"
    return ModelError(
        f"generate: {one or AVERAGE!r} and {other or AVERAGE!r} differ in {key} ({values}); {way}, or ask them apart"
    )
