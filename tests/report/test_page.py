"""The report is a page that asks the network for nothing and answers in words before it draws."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from polymerge.bundle.inspect import inspect_bundle
from polymerge.bundle.verdict import SAID
from polymerge.report import write_report
from polymerge.report.merge import merge_plots
from tests.conftest import Merged

pytest.importorskip("plotly")


def test_a_bundles_page_answers_in_words_then_shows_three_plots_and_folds_the_rest(
    merged: Merged, tmp_path: Path
) -> None:
    bundle, _ = merged("llama")
    page = write_report(bundle, tmp_path / "report.html").read_text()
    seen, folded = page.split("<details>", 1)
    assert re.findall(r"<h2>([^<]+)</h2>", seen) == [
        "Do they answer as before?", "Size", "What each expert kept", "Error by layer",
    ]  # fmt: skip
    for expert in inspect_bundle(bundle).experts:
        assert f"<b>{expert.name}</b>{SAID[expert.verdict.answers]}" in seen
    assert "Tensors that lost most" in folded and bundle.digest[:16] in page
    main = page.split("<main>")[1].split("</main>")[0]  # what those who listen to a page are led to
    assert "<table>" in main and main.count("<table>") == main.count(
        '<div class="scroll" tabindex="0"><table>'
    )  # by keys
    assert "<h1>" in main and "Tensors that lost most" in main and "<footer>" not in main


def test_a_page_is_small_and_asks_no_network_for_its_script(merged: Merged, tmp_path: Path) -> None:
    bundle, _ = merged("llama")
    page = write_report(bundle, tmp_path / "report.html").read_text()
    write_report(bundle, tmp_path / "again.html")
    assert len(page) < 300_000
    (script,) = tmp_path.glob("*.js")
    assert re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="([^"]+)"', page) == [script.name]


@pytest.mark.parametrize(
    ("code", "said"),
    [("factors", "A loaded bundle holds as much"), ("int4", "In memory more is taken by the residuals")],
)
def test_the_size_says_what_of_it_memory_holds(merged: Merged, tmp_path: Path, code: str, said: str) -> None:
    bundle, _ = merged("llama", code=code)
    assert said in write_report(bundle, tmp_path / "report.html").read_text()


def test_a_base_in_fewer_bits_takes_more_in_memory_whatever_the_residuals_are(merged: Merged) -> None:
    inspection = replace(inspect_bundle(merged("llama")[0]), base_code="int8")
    said = " ".join(merge_plots(inspection, []))
    assert "more is taken by the base, stored in int8, where it is loaded in 16 bits." in said
    assert "holds as much" not in said
    both = " ".join(merge_plots(replace(inspection, code="int4", coded=True), []))
    assert "loaded in 16 bits, and by the residuals: those of int4" in both


def test_what_a_demo_measured_goes_before_what_is_predicted(merged: Merged, tmp_path: Path) -> None:
    bundle, _ = merged("llama")
    shares = {"original": 1.0, "average": 0.2, "bundle": 0.9, "kept": 0.9, "kl_average": 0.5, "kl_bundle": 0.1}
    page = write_report(bundle, tmp_path / "r.html", demo=[{"skill": "a<b", "examples": 4, **shares}]).read_text()
    seen, folded = page.split("<details>", 1)
    assert "Measured on held-out requests." in seen and "keeps 90.0% of its accuracy" in seen
    assert "a&lt;b" in seen and "What the experts keep" in seen and "Predicted from the energy kept" in folded
