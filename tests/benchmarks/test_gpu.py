"""`benchmarks/gpu.py` runs with torch, transformers, safetensors and triton alone, and tells what it found at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu

ROOT = Path(__file__).parents[2]
# What polymerge itself imports for it: files that need torch alone.
ALONE = """
import sys, gpu, pathlib
gpu.run(pathlib.Path(sys.argv[1]), 5, gpu.SMALL, ["logits", "decode", "graphs", "merge"])
parts = {name.split(".")[1] for name in sys.modules if name.startswith("polymerge.")}
more = parts - {"errors", "version", "host", "naming", "method", "model"}
assert not more, more
assert "polymerge.model.loading" not in sys.modules
"""


def test_it_needs_no_other_package_and_no_part_fails(tmp_path: Path) -> None:
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "benchmarks")))
    subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}, check=True, timeout=600
    )
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert " failed" not in (tmp_path / "gpu.txt").read_text()
    assert all(line["worst"] < 1e-5 for line in (*found["logits"], *found["graphs"]))
    assert {(line["rows"], line["experts"]) for line in found["decode"]} == {
        (1, 0),
        (1, 3),
        (1, 8),
        (8, 0),
        (8, 3),
        (8, 8),
    }
    assert all(line["seconds"] > 0 for line in (*found["decode"], *found["merge"]))


def test_a_part_that_fails_says_why_and_the_next_one_runs(tmp_path: Path) -> None:
    report = gpu.Report(tmp_path, end=float("inf"))
    with gpu.told(report, "first"):
        raise RuntimeError("no such kernel")
    report.add("second", "fine", ok=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["first"][0]["failed"] == "RuntimeError: no such kernel" and found["second"] == [{"ok": True}]


def test_what_has_no_time_left_is_said(tmp_path: Path) -> None:
    report = gpu.run(tmp_path, -1, gpu.SMALL, ["merge"])
    assert any("no time left" in line for line in report.lines)
