"""Who chooses, and how many of the chosen models answer rightly; on a tiny bundle of two experts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import routed
from polymerge import merge
from polymerge.demo.train import format_prompt
from polymerge.engine import ScoreRequest
from polymerge.engine.local.engine import HFEngine
from shift import Draw, Judged, Row
from tests.tiny import text_model, text_tokenizer

ROWS = [
    Row(f"number {n}", field, kind, "yes") for field in ("e0", "e1") for kind in ("new", "greeting") for n in range(3)
]


def draw_of(likeliest: list[int], asked: list[bool], labels: list[int]) -> Draw:
    return Draw(["e0", "e1"], np.array(labels), Judged(np.array(likeliest), np.ones(len(labels)), np.array(asked)))


def test_rows_without_an_answer_are_left_out_and_the_others_are_few() -> None:
    rows = routed.few_of([Row("?", "e0", "new"), *ROWS], 2)
    assert len(rows) == 8 and all(row.answer for row in rows)


def test_accuracy_is_that_of_the_model_that_was_chosen() -> None:
    draw = draw_of([0, 1, 1, 0], [True, False, True, True], [0, 0, 1, -1])
    assert routed.needed([draw]) == {"e0": [0, 1], "e1": [1, 2], "average": [0, 1, 2]}
    right = {"e0": [1, 1, np.nan, np.nan], "e1": [np.nan, 0, 0, np.nan], "average": [0, 0, 1, np.nan]}
    shares = {name: mean for name, (mean, _) in routed.accuracies([draw], right).items()}
    assert shares == pytest.approx(
        {"oracle": 2 / 3, "routed": 1 / 3, "never abstaining": 1 / 3, "the average alone": 1 / 3}
    )


def test_a_model_is_asked_for_the_rows_it_is_sent_and_no_others(tmp_path: Path) -> None:
    tokenizer = text_tokenizer()
    for seed in range(2):
        text_model(tokenizer, seed).save_pretrained(tmp_path / f"e{seed}")
        tokenizer.save_pretrained(tmp_path / f"e{seed}")
    merge({"experts": {name: str(tmp_path / name) for name in ("e0", "e1")}}, tmp_path / "bundle")
    engine = HFEngine.from_bundle(tmp_path / "bundle")
    wanted: Any = {"e0": [1, 4], "average": [0]}
    right = routed.outcomes(engine, ROWS, wanted)
    assert {name: np.flatnonzero(~np.isnan(column)).tolist() for name, column in right.items()} == wanted
    end = engine.tokenizer.eos_token_id
    request = ScoreRequest(format_prompt(ROWS[4].text), [*engine.encode("yes", special=False), end], "e0")
    assert right["e0"][4] == engine.loglikelihood([request])[0].is_greedy
