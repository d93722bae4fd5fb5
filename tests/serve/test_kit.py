"""The kit's client needs nothing but an old Python, and its answers are those of `polymerge compete`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

from polymerge.compete import compete
from polymerge.compete.kit_client import ServedMerges
from polymerge.compete.merges import PolymergeMerges
from polymerge.compete.table import read_table, submission
from polymerge.staged import Pipeline
from tests.serve.conftest import KEY, Server

FILE = Path(sys.modules[ServedMerges.__module__].__file__ or "")


@pytest.fixture
def client(server: Server) -> ServedMerges:
    made = ServedMerges()
    made.url, made.key = server.url, KEY
    made.merge()
    return made


def test_it_is_one_file_of_an_old_python_and_its_standard_library() -> None:
    tree = ast.parse(FILE.read_text(), feature_version=(3, 8))
    named = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    named |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in named} <= {*sys.stdlib_module_names, "torch"}


def test_its_csv_is_that_of_compete_to_the_byte(client: ServedMerges, server: Server, tmp_path: Path) -> None:
    client.model, client.max_gen_len = "e1", 12
    source = tmp_path / "in.csv"
    lines = ["id,input,eval_type,answer_choices"]
    lines += [f"{n},w{10 + n} w20 w{30 + n},generation," for n in range(4)]
    lines += [f"{n},w{10 + n} w21,multiple_choice,\"['w5 w6', 'w7', 'w8 w9 w10']\"" for n in range(4, 8)]
    source.write_text("\n".join(lines) + "\n")
    pipeline = Pipeline(server.engine, chat=False, expert="e1")
    compete(pipeline, source, tmp_path / "out.csv", max_new_tokens=12)
    predictions = []
    for row in read_table(source).good:  # the kit sends one row at a time
        if row.choices:
            best, _ = client.predict_multiple_choice({"input": [row.text], "answer_choices": [list(row.choices)]})
            predictions.append((row.id, str(int(best[0]))))
        else:
            ids, texts = client.generate({"input": [row.text]})
            assert ids[0] == server.engine.encode(f"{row.text} {texts[0]}", expert="e1")
            predictions.append((row.id, texts[0]))
    assert submission(predictions) == (tmp_path / "out.csv").read_bytes()


def test_exact_scores_are_those_of_the_drop_in(client: ServedMerges, server: Server) -> None:
    here = PolymergeMerges()
    here.exact, here._pipeline = True, Pipeline(server.engine, chat=False, expert="e2")
    client.exact, client.model = True, "e2"
    batch = {"input": ["w10 w11", "w12"], "answer_choices": ["['w5 w6', 'w7 w8 w9']", "['w6']"]}
    mine, its = here.predict_multiple_choice(batch), client.predict_multiple_choice(batch)
    assert mine[0].tolist() == its[0].tolist()
    torch.testing.assert_close(mine[1], its[1], atol=1e-5, rtol=0)


def test_what_is_wrong_is_one_line(client: ServedMerges) -> None:
    client.model = "nobody"
    with pytest.raises(RuntimeError, match="polymerge serve has no model 'nobody'; it has auto, e0"):
        client.merge()
    with pytest.raises(RuntimeError, match=r"polymerge serve refused: .*nobody"):
        client.generate({"input": ["w10"]})
    client.url = "http://127.0.0.1:9"
    with pytest.raises(RuntimeError, match=r"no `polymerge serve` at http://127\.0\.0\.1:9"):
        client.merge()
