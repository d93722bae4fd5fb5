"""The report's sections on the router: none without one, and the samples' text is text, not HTML."""

import re
from pathlib import Path
from shutil import copytree

import pytest

from polymerge import Bundle
from polymerge.bundle.files import write_json
from polymerge.report.router import router_sections
from polymerge.router.evaluation import measure_router, save_evaluation
from polymerge.router.fit import fit_samples
from polymerge.router.picture import draw_samples
from polymerge.router.record import router_folder
from polymerge.router.samples import Sample
from polymerge.router.training import FIT_REPORT
from tests.conftest import Merged
from tests.router.scripted import ScriptedEngine, make_samples, strangers

pytest.importorskip("plotly")
EXPERTS = {"math": "e0", "shell": "e1", "json": "e2"}


def test_a_router_adds_its_sections_to_the_report(merged: Merged, tmp_path: Path) -> None:
    bundle = Bundle.open(copytree(merged("llama")[0].path, tmp_path / "bundle"))
    assert router_sections(bundle.path) == []
    training = [*make_samples(12), Sample("sum <script>alert(1)</script>", "math")]
    engine = ScriptedEngine(("e0", "e1", "e2"))
    fitted = fit_samples(bundle, engine, training, make_samples(6, seed=3), experts=EXPERTS)
    fitted.router.save(bundle)
    write_json(router_folder(bundle.path) / FIT_REPORT, {**fitted.report, "picture": draw_samples(fitted.router)})
    titles = re.findall(r"<h2>Router: ([^<]+)</h2>", "".join(router_sections(bundle.path)))
    assert titles == ["how many samples it takes", "where the samples lie"]
    save_evaluation(bundle, measure_router(fitted.router, [*make_samples(5, seed=4), *strangers(5)]))
    page = "".join(router_sections(bundle.path))
    titles = re.findall(r"<h2>Router: ([^<]+)</h2>", page)
    assert len(titles) == 5 and "right and wrong fields" in titles
    assert "<script>alert" not in page


def test_damaged_figures_are_left_out(tmp_path: Path) -> None:
    router_folder(tmp_path).mkdir()
    (router_folder(tmp_path) / FIT_REPORT).write_text("[")
    assert router_sections(tmp_path) == []
