"""The competition's starter kit itself, with our client listed in its main.py, in an environment of its own:

git clone https://github.com/llm-merging/LLM-Merging
python3.10 -m venv /tmp/kit
/tmp/kit/bin/pip install torch==2.2.2 numpy==1.26.4 pandas==2.2.1 transformers==4.39.3 peft==0.10.0 evaluate==0.4.1
POLYMERGE_KIT=LLM-Merging POLYMERGE_KIT_PYTHON=/tmp/kit/bin/python pytest -m clients tests/clients/test_kit.py
"""

import csv
import importlib.util
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Merged
from tests.tiny import tiny_tokenizer

KIT, PYTHON = os.environ.get("POLYMERGE_KIT"), os.environ.get("POLYMERGE_KIT_PYTHON")
FILE = Path(__file__).parents[2] / "benchmarks" / "kit.py"

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not KIT or not PYTHON, reason="POLYMERGE_KIT and POLYMERGE_KIT_PYTHON name no kit"),
]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("kit", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kit", module)
    spec.loader.exec_module(module)
    return module


def test_the_kits_main_writes_competes_csv_and_exact_is_its_own_decoding(
    compared: Any, merged: Merged, tmp_path: Path
) -> None:
    bundle = shutil.copytree(merged("llama", compress_rate=0)[0].path, tmp_path / "bundle")
    tiny_tokenizer().save_pretrained(bundle)
    draw = random.Random(17)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(5, 90)}" for _ in range(count))

    source = tmp_path / "rows.csv"
    with source.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "input", "eval_type", "answer_choices", "target"])
        for number in range(12):
            choices = str([words(draw.randrange(1, 5)) for _ in range(4)]) if number % 3 else ""
            writer.writerow([number, words(20), "multiple_choice" if choices else "generation", choices, ""])
    (tmp_path / "work").mkdir()
    [line] = compared.compare(bundle, "e1", Path(str(KIT)), str(PYTHON), [source], 12, tmp_path / "work")
    assert line.rows == 12 and line.served_is_compete and line.exact_is_kit
    rows = (tmp_path / "work" / "served" / "rows.csv").read_text()
    assert len(set(rows.splitlines())) == 13 and rows != (tmp_path / "work" / "exact" / "rows.csv").read_text()
