"""What a newcomer reads in a terminal of 80 columns."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from polymerge.bundle.inspect import inspect_bundle
from polymerge.cli import console
from polymerge.cli.main import main
from polymerge.export.vllm.export import _Clock
from polymerge.merging.choices import bytes_of_codes
from polymerge.merging.plan import plan_merge
from polymerge.merging.run import Progress
from tests.conftest import Merged


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


def test_plan_says_what_other_codes_would_cost(narrow: Callable[..., str], merged: Merged) -> None:
    _, experts = merged("llama", compress_rate=0.6)
    words = [f"{name}={path}" for name, path in experts.items()]
    shown = narrow("plan", *words, "--compress-rate", "0.6")
    assert re.search(r"^residuals    of all experts: factors [\d.]+ kB, int8 [\d.]+ kB, int4 [\d.]+ kB$", shown, re.M)
    plan = plan_merge({name: str(path) for name, path in experts.items()}, compress_rate=0.6)
    costs = bytes_of_codes(plan)
    assert costs[plan.recipe.code] == sum(plan._expert_bytes(expert, "low_rank") for expert in experts)


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
