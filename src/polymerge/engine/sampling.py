"""When an answer ends: stop texts and the budgets of single rows, for transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class StopTexts:
    """A stopping criterion of transformers: a row is done at one of its stop texts or at its own budget of tokens.

    Args:
        stops, budgets: of every row.
        start: tokens of the padded prompts.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[Sequence[str]], budgets: Sequence[int], start: int) -> None:
        self._tokenizer, self._stops, self._budgets, self._start = tokenizer, stops, budgets, start
        self._any = any(stops)

    def __call__(self, ids: Tensor, scores: Any = None, **_: Any) -> Tensor:
        """ids [B, T] -> bool [B]"""
        made = ids.shape[1] - self._start
        done = [made >= budget for budget in self._budgets]
        if self._any:
            for row, stops in enumerate(self._stops):
                if stops and not done[row]:
                    done[row] = first_stop(self._tokenizer.decode(ids[row, self._start :]), stops)[1]
        return torch.tensor(done, device=ids.device)


def first_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before its first stop text, and whether there was one."""
    found = [place for place in (text.find(stop) for stop in stops if stop) if place >= 0]
    return (text[: min(found)], True) if found else (text, False)
