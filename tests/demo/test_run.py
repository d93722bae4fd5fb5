"""The demo on the real SmolLM2-135M: the published figures' own checks. The experts are trained once and cached."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from polymerge import Bundle, merge
from polymerge.demo.run import DemoResult, DemoSettings, Listeners, demonstrate
from polymerge.demo.skills import demo_skills
from polymerge.method.rsvd import rsvd
from polymerge.report import write_report
from polymerge.sources.opening import open_checkpoint


def test_no_held_out_request_was_trained_on() -> None:
    for skill in demo_skills(train=320, test=64):
        trained, held_out = ({example.prompt for example in part} for part in (skill.train, skill.test))
        assert len(held_out) == 64 and not trained & held_out


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoResult]:
    yield demonstrate(DemoSettings(output=tmp_path_factory.mktemp("demo")), Listeners(say=print))


@pytest.mark.slow
def test_the_bundle_keeps_the_skills_and_the_average_does_not(result: DemoResult) -> None:
    right = sum(row.bundle for row in result.rows)
    assert right >= 0.98 * sum(row.original for row in result.rows)
    for row in result.rows:
        assert row.kept >= 0.96, row  # one answer of 64 is 1.6%: training rounds differently on other processors
        assert row.kl_bundle < row.kl_average / 10, row
    assert sum(row.average for row in result.rows) < 0.8 * right
    assert result.sizes["share_of_one_model"] < 1.2


@pytest.mark.slow
def test_every_real_matrix_is_within_two_percent_of_the_optimum(result: DemoResult, tmp_path: Path) -> None:
    experts = {name: record.source for name, record in Bundle.open(result.bundle).manifest.experts.items()}
    bundle = merge({"experts": experts, "method": "published"}, tmp_path / "published")
    sources = {name: open_checkpoint(source) for name, source in experts.items()}
    lines = bundle.stats()
    assert len(lines) == 210 * 3
    for line in lines:
        weight = sources[line["expert"]].read(line["tensor"])
        residual = weight - line["scale_ratio"] * bundle.base_tensor(line["tensor"])
        optimum = torch.linalg.svdvals(residual.double())[line["rank"] :].norm() / weight.norm()
        assert line["relative_error"] <= 1.02 * optimum, line
    u, v = rsvd(residual, line["rank"])
    assert (residual - u @ v).norm() / weight.norm() <= 1.02 * optimum


@pytest.mark.slow
def test_the_report_asks_the_network_for_nothing(result: DemoResult, tmp_path: Path) -> None:
    page = write_report(result.bundle, tmp_path / "report.html").read_text()
    scripts = re.findall(r'<script src="([^"]+)"', page)
    assert scripts and all((tmp_path / name).is_file() for name in scripts)  # plotly's file beside it
    for tag in ("<link", '<img src="http', "@import", "url(http"):
        assert tag not in page
    assert all(name in page for name in ("json", "math", "shell", "Energy kept"))
