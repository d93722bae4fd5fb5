"""The report is one page that asks the network for nothing and shows the bundle it was written of."""

import re
from pathlib import Path

import pytest

from polymerge.report import write_report
from tests.conftest import Merged

pytest.importorskip("plotly")


def test_a_bundles_page_has_every_section_of_the_merge_and_no_address(merged: Merged, tmp_path: Path) -> None:
    bundle, _ = merged("llama")
    page = write_report(bundle, tmp_path / "report.html").read_text()
    titles = re.findall(r"<h2>([^<]+)</h2>", page)
    assert titles[:3] == ["Size", "Experts", "Error by layer"] and "Tensors that lost most" in titles
    assert bundle.digest[:16] in page
    assert not re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?https?:', page)


def test_a_demos_table_stands_first(merged: Merged, tmp_path: Path) -> None:
    bundle, _ = merged("llama")
    shares = {"original": 1.0, "average": 0.2, "bundle": 0.9, "kept": 0.9, "kl_average": 0.5, "kl_bundle": 0.1}
    page = write_report(bundle, tmp_path / "r.html", demo=[{"skill": "a<b", "examples": 4, **shares}]).read_text()
    assert re.findall(r"<h2>([^<]+)</h2>", page)[0] == "What the experts keep"
    assert "a&lt;b" in page
