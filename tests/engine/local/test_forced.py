from __future__ import annotations

import torch

from polymerge.engine.local.forced import batches, read_together


def test_rows_that_run_together_stay_within_the_tokens_padding_counted() -> None:
    rows = [[1] * n for n in (3, 3, 5, 20, 1)]
    assert [[len(r) for r in batch] for batch in batches(rows, len, 10)] == [[3, 3], [5], [20], [1]]
    assert [len(batch) for batch in batches(rows, len, 0)] == [1] * 5
    assert list(batches([], len)) == []


def test_every_row_gets_the_logits_of_its_own_tokens_alone() -> None:
    calls: list[torch.Size] = []

    def logits(ids: torch.Tensor) -> torch.Tensor:
        calls.append(ids.shape)
        return torch.nn.functional.one_hot(ids, 8).float()

    said = read_together([[5, 6, 7], [3]], logits)
    assert calls == [(2, 3)]
    assert [row.argmax(-1).tolist() for row in said] == [[5, 6, 7], [3]]
