"""What a newcomer reads in a terminal of 80 columns."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig

from polymerge import merge
from polymerge.bundle.inspect import inspect_bundle
from polymerge.cli import competing, console, demonstrating
from polymerge.cli import main as command
from polymerge.cli.main import main
from polymerge.demo.run import DemoResult, SkillRow
from polymerge.export.vllm.export import _Clock
from polymerge.merging.choices import bytes_of_codes
from polymerge.merging.footprint import footprint
from polymerge.merging.plan import plan_merge
from polymerge.merging.run import Progress
from tests.conftest import Merged
from tests.tiny import COMMON, make_experts, text_tokenizer


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def shown(*words: str) -> str:
        monkeypatch.setattr(console, "out", Console(highlight=False, width=80))
        monkeypatch.setattr("sys.argv", ["polymerge", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    return shown


def test_inspect_keeps_units_and_names_sources_whole(narrow: Callable[..., str], merged: Merged) -> None:
    bundle, experts = merged("llama", compress_rate=0.6)
    shown = narrow("inspect", str(bundle.path))
    for name, path in experts.items():
        assert f"{name}: from {path}\n" in shown
        assert re.search(rf"^ +{name} +[\d.]+ kB +\d+ +1 ± \S+ +[\d.]+% ", shown, re.MULTILINE), shown
    assert not re.search(r"_proj *$", shown, re.MULTILINE)  # a share stays beside its kind
    assert inspect_bundle(bundle).worst[0]["tensor"] in shown and "…" not in shown


def test_a_folders_name_is_told_whole_and_the_next_command_can_be_typed(
    narrow: Callable[..., str], merged: Merged, tmp_path: Path
) -> None:
    _, experts = merged("llama", compress_rate=0.6)
    bundle = tmp_path / f"[b] {'long' * 20}"
    shown = narrow("merge", *(f"{name}={path}" for name, path in experts.items()), "-o", str(bundle))
    assert shown.startswith(f"{bundle}: {len(experts)} experts in ")
    assert shown.endswith(f"\nnext: polymerge inspect {shlex.quote(str(bundle))}\n")
    assert narrow("inspect", str(bundle)).startswith(f"{bundle}: {len(experts)} experts of ")


def test_plan_says_what_other_codes_would_cost(narrow: Callable[..., str], merged: Merged) -> None:
    _, experts = merged("llama", compress_rate=0.6)
    words = [f"{name}={path}" for name, path in experts.items()]
    shown = narrow("plan", *words, "--compress-rate", "0.6")
    assert re.search(r"^residuals    of all experts: factors [\d.]+ kB, int8 [\d.]+ kB, int4 [\d.]+ kB$", shown, re.M)
    plan = plan_merge({name: str(path) for name, path in experts.items()}, compress_rate=0.6)
    costs = bytes_of_codes(plan)
    assert costs[plan.recipe.code] == sum(plan._expert_bytes(expert, "low_rank") for expert in experts)


def test_plan_says_what_memory_holds_of_coded_residuals(narrow: Callable[..., str], merged: Merged) -> None:
    _, experts = merged("llama", compress_rate=0.6)
    words = [*(f"{name}={path}" for name, path in experts.items()), "--compress-rate", "0.6"]
    shown = narrow("plan", *words, "--code", "int4")
    said = re.search(r"residuals decoded, (\S+) times what they take in files; with --residuals packed (.+B)", shown)
    assert said, shown
    times, packed = said.groups()
    plan = plan_merge({n: str(p) for n, p in experts.items()}, compress_rate=0.6, code="int4", residuals="packed")
    assert 6 < float(times) < 8 and packed == console.size(footprint(plan).bundle)  # float32 for four bits and scales
    assert "residuals of linear layers packed" in narrow("plan", *words, "--code", "int4", "--residuals", "packed")
    assert "decoded" not in narrow("plan", *words, "--code", "factors")
    entropy = narrow("plan", *words, "--code", "entropy", "--residuals", "packed")  # is decoded all the same
    assert "residuals decoded, " in entropy and "packed" not in entropy


def test_plan_says_when_the_model_reads_less_than_was_asked_for(narrow: Callable[..., str], merged: Merged) -> None:
    _, experts = merged("llama", compress_rate=0.6)
    words = [f"{name}={path}" for name, path in experts.items()]
    longest = json.loads((next(iter(experts.values())) / "config.json").read_text())["max_position_embeddings"]
    shown = narrow("plan", *words, "--context", str(longest + 1), "--requests", "3")
    assert f"             the model reads {longest} tokens at most, not {longest + 1}\n" in shown
    assert "at most, not" not in narrow("plan", *words, "--context", str(longest))
    shown = narrow("plan", *words, "--gpu", "1kB")
    assert "\n             fewer experts or tokens; there is room for 0 tokens\n" in shown


def test_the_time_left_of_an_export_is_told_once_a_factor_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the bundle, which comes first, says nothing of how long a factor takes."""
    now = [0.0]
    monkeypatch.setattr("polymerge.export.vllm.export.time.monotonic", lambda: now[0])
    plan = SimpleNamespace(adapter_bytes=1000, experts={"e": []}, dtype=SimpleNamespace(itemsize=1))
    told: list[Progress] = []
    clock = _Clock(plan, told.append)  # type: ignore[arg-type]
    now[0] = 100.0  # so long it took to load
    for seconds in (100.0, 101.0, 102.0):
        now[0] = seconds
        clock.factored("e", SimpleNamespace(module="m", numel=100))  # type: ignore[arg-type]
    assert [step.seconds_left is None for step in told] == [True, False, False]
    assert told[-1].seconds_left == pytest.approx(8.01, abs=0.02)


def test_the_harness_asks_no_git(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator")
    from polymerge.evaluate.run import _no_git

    monkeypatch.chdir(tmp_path)
    asked = evaluator.get_git_commit_hash
    with _no_git():
        assert evaluator.get_git_commit_hash() is None
    assert evaluator.get_git_commit_hash is asked and capfd.readouterr().err == ""


def test_a_sentence_is_broken_between_words_in_a_terminal_and_not_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        f"math: may not answer as before: rank is short in {'k_proj, ' * 6}v_proj and /a/{'long-path' * 9} of 12.5 MB"
    )
    for terminal in (False, True):
        made = Console(highlight=False, width=80, force_terminal=terminal)
        monkeypatch.setattr(console, "out", made)
        console.tell(text)
    piped, *shown = capsys.readouterr().out.splitlines()
    assert piped == text and " ".join(line.strip() for line in shown) == text
    assert all(len(line) <= 80 or "/" in line for line in shown) and all(line.startswith("  ") for line in shown[1:])
    assert not any(line.endswith("12.5") for line in shown)


def test_an_error_is_broken_between_words_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "err", Console(stderr=True, highlight=False, width=80, force_terminal=True))
    monkeypatch.setattr("sys.argv", ["polymerge", "verify", "no-such-place-of-mine"])
    with pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "polymerge: no-such-place-of-mine: no such folder; make one with `polymerge merge",
        "  recipe.yaml -o no-such-place-of-mine`",
    ]


def test_a_line_that_is_written_over_is_never_wider_than_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "err", Console(stderr=True, highlight=False, width=80, force_terminal=True))
    console.over("answers: 32 of 807 rows, " * 8, last=False)
    console.over("done", last=True)
    first, second = capsys.readouterr().err.removesuffix("\n").split("\r")
    assert len(first) == len(second) == 79 and first.endswith("…") and second.strip() == "done"


@pytest.mark.parametrize(("found", "command"), [("/usr/bin/polymerge", "polymerge"), (None, ".venv/bin/polymerge")])
def test_the_demo_ends_with_a_line_that_can_be_typed(
    found: str | None, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After `make demo` too, whose environment no shell has entered; of own skills it makes no question up."""
    monkeypatch.setattr("shutil.which", lambda name: found)
    monkeypatch.setattr("sys.argv", [".venv/bin/polymerge", "demo"])
    monkeypatch.setattr(demonstrating, "out", Console(highlight=False, width=80))
    for skill, question in (("json", "An order for Olga: 12 stamps."), ("mine", "...")):
        row = SkillRow(skill, 1, 1.0, 1.0, 1.0, 0.0, 0.0)
        sizes = {"total": 1, "share_of_one_model": 1.0, "separate_models": 1}
        demonstrating.print_demo(DemoResult([row], sizes, {}, 1, Path("demo-output/bundle"), Path("report.html")))
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == f'try: {command} generate demo-output/bundle --expert {skill} "{question}"'


def test_a_warning_of_flawed_answers_is_broken_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(competing, "err", Console(stderr=True, highlight=False, width=80, force_terminal=True))
    nothing: dict[str, int] = {}
    summary: Any = SimpleNamespace(
        rows=1, seconds=1.0, time_limit=60.0, peak_memory=1, experts=nothing, staged=0, asked=nothing, direct=nothing,
        scores=nothing, scored=0, written=1, flaws={"empty": 1}, skipped=[],
    )  # fmt: skip
    competing.print_summary(summary, 64)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("warning: ") and len(lines) > 1 and all(len(line) <= 80 for line in lines)


def test_the_mistakes_of_the_first_hour_read_as_its_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], merged: Merged
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "first-hour.md").read_text(encoding="utf-8")
    block = page.split("## What mistakes read like")[1].split("```text\n")[1].split("```")[0].splitlines()
    bundle, experts = merged("llama", compress_rate=0.6)
    monkeypatch.chdir(tmp_path)
    recipes = {
        "typo": "experts:\n  math: {source: ./math-lora}\n  shell: ./shell-full\ncompres_rate: 0.9\n",
        "notdict": "experts: ./a\n",
        "missing": "experts:\n  math: ./nothing\n  shell: ./shell-full\n",
        "recipe": "experts:\n" + "".join(f"  {name}: {path}\n" for name, path in experts.items()),
    }
    for name, text in recipes.items():
        Path(f"{name}.yaml").write_text(text)
    shutil.copytree(bundle.path, "bundle")
    assert len(block) == 10
    for typed, read in zip(block[::2], block[1::2], strict=True):
        monkeypatch.setattr("sys.argv", shlex.split(typed.removeprefix("$ ")))
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and capsys.readouterr().err == f"{read}\n", typed


@pytest.fixture
def passing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merged: Merged) -> Path:
    """What the page's second block of mistakes is about: experts without a tokenizer, empty and cut answers."""
    experts = list(merged("llama")[1].values())
    (tmp_path / "tokenless.yaml").write_text(f"experts:\n  math: {experts[0]}\n  shell: {experts[1]}\n")
    (tmp_path / "math-full").symlink_to(experts[0])
    tokenizer = text_tokenizer()
    config = LlamaConfig(**COMMON | {"vocab_size": len(tokenizer), "max_position_embeddings": 8192})
    made = make_experts("llama", tmp_path / "made", count=2, config=config)
    for name, ends in (("kept", list(range(2, len(tokenizer)))), ("wordy", [])):
        for path in made.values():
            tokenizer.save_pretrained(path)
            (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        sources = dict(zip(("math", "shell"), map(str, made.values()), strict=True))
        merge({"experts": sources, "embeddings": "keep", "lm_head": "keep"}, tmp_path / name)
    rows = "".join(f"{n},{n} plus {n},generation,,{2 * n if n else ''}\n" for n in range(50))
    (tmp_path / "comp.csv").write_text("id,input,eval_type,answer_choices,target\n" + rows)
    (tmp_path / "one.csv").write_text("id,input,eval_type,answer_choices\n0,tell me all,generation,\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_told_in_passing_reads_as_the_page_says(
    passing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "first-hour.md").read_text(encoding="utf-8")
    block = page.split("What is told in passing")[1].split("```text\n")[1].split("```")[0]
    for typed, *shown in (part.splitlines() for part in block.split("$ ")[1:]):
        monkeypatch.setattr("sys.argv", shlex.split(typed))
        with pytest.raises(SystemExit):
            main()
        heard = capsys.readouterr()
        lines = [_numberless(line) for line in (heard.out + heard.err).splitlines()]
        assert not [line for line in map(_numberless, shown) if line not in [*lines, "..."]], (typed, heard)
        assert "..." in shown or len(lines) == len(shown), typed


def _numberless(line: str) -> str:
    """Progress without how far and how fast it is."""
    return re.sub(r" +[\d.]+(?:%| [kMG]?B)", " #", line) if line.startswith("exporting") else line
