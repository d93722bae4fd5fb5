"""Answers that nobody has looked at: which are empty, cut off or going round."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from polymerge import load_model
from polymerge.cli.competing import compete_progress, print_summary
from polymerge.compete import compete
from polymerge.compete.flaws import flaw_of, words_of
from polymerge.compete.table import read_table
from polymerge.engine.base import GenerateRequest
from polymerge.engine.local.engine import HFEngine
from polymerge.staged import Pipeline
from polymerge.staged.lead import Lead
from tests.compete.test_run import make_input
from tests.conftest import Merged
from tests.staged.scripted import ScriptedEngine
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    ("text", "finish", "flaw"),
    [
        ("", "stop", "empty"),
        (" \n", "length", "empty"),
        ("It is so. " + "and on it goes " * 6, "length", "repeated"),
        ("no " * 9, "stop", "repeated"),
        ("no no no", "stop", None),
        ("1 2 3 4 5 6 7 8 9 10 11 12", "length", "cut"),
        ("We sell pens. We sell pens. Call us any day of the week.", "stop", None),
    ],
)
def test_the_first_flaw_that_holds_is_named(text: str, finish: str, flaw: str | None) -> None:
    assert flaw_of(text, finish) == flaw


def test_what_may_help_is_said_for_what_happened() -> None:
    assert words_of(50, {}, 64) == ""
    empty, cut = words_of(50, {"empty": 46}, 64), words_of(50, {"cut": 2}, 64)
    assert "of 50 generated answers: 46 empty" in empty and "--chat" in empty and "--max-new-tokens" not in empty
    assert "2 cut off at 64 tokens or by the clock" in cut and "--chat" not in cut
    assert "--max-new-tokens or --time-limit" in cut  # where the clock ended them, more tokens would not


def test_a_run_of_empty_answers_ends_with_a_warning_and_no_routing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = Pipeline(ScriptedEngine(lambda prompt, expert: ""), chat=False)
    summary = compete(used, make_input(tmp_path, 9), tmp_path / "out.csv", progress=compete_progress(quiet=False))
    assert (summary.written, summary.flaws) == (3, {"empty": 3})
    print_summary(summary, 64)
    said = capsys.readouterr().err
    assert "warning: of 3 generated answers: 3 empty" in said and "routing" not in said


def test_an_empty_target_is_no_target(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text(
        "id,input,eval_type,answer_choices,target\n1,q,generation,,\n2,q,generation,, \n3,q,generation,,yes\n"
    )
    assert [row.target for row in read_table(file).good] == [None, None, "yes"]


def test_it_is_said_how_many_rows_the_scores_are_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "in.csv"
    file.write_text("id,input,eval_type,answer_choices,target\n1,q,generation,,yes\n2,q,generation,, \n")
    used = Pipeline(ScriptedEngine(lambda prompt, expert: "yes"), chat=False)
    summary = compete(used, file, tmp_path / "out.csv")
    print_summary(summary, 64)
    assert summary.scores["rouge1"] == 1.0  # the row without a target draws nothing down
    assert "(scores are means over the rows with a target: 1 of 2)" in capsys.readouterr().out


def test_examples_and_a_system_text_are_turns_of_a_chat_or_text_before_the_text(tmp_path: Path) -> None:
    file = tmp_path / "shots.jsonl"
    file.write_text('{"prompt": "1+1", "answer": "2"}\n')
    lead = Lead.read("Be short.", file)
    assert [(m["role"], m["content"]) for m in lead.messages("2+2")] == [
        ("system", "Be short."), ("user", "1+1"), ("assistant", "2"), ("user", "2+2"),
    ]  # fmt: skip
    assert lead.before("2+2") == "Be short.\n\n1+1\n2\n\n2+2" and Lead().before("2+2") == "2+2"
    engine = ScriptedEngine(lambda prompt, expert: "4")
    compete(Pipeline(engine, chat=False, lead=lead), make_input(tmp_path, 3), tmp_path / "out.csv")
    assert all(prompt.startswith("Be short.\n\n1+1\n2\n\n") for prompt in engine.prompts)
    assert Pipeline(engine).identity() != Pipeline(engine, lead=lead).identity()


def test_the_clock_ends_a_text_with_what_it_has(merged: Merged) -> None:
    bundle, _ = merged("llama")
    engine = HFEngine(load_model(bundle), tiny_tokenizer(), fingerprint=bundle.digest)
    late = GenerateRequest([5, 6, 7], max_new_tokens=50, ignore_eos=True, deadline=time.monotonic())
    whole = GenerateRequest([5, 6, 7], max_new_tokens=50, ignore_eos=True, deadline=time.monotonic() + 600)
    cut, full = engine.generate([late, whole])
    assert (cut.tokens, cut.finish) == (1, "length") and full.tokens == 50
