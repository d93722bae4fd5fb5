"""The harness's own model for transformers and `polymerge eval` say the same of one expert: a dense export against the
same expert inside a bundle at rate 0."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from polymerge import Bundle, export_dense, load_model, merge
from polymerge.demo.run import DemoSettings, Listeners, demonstrate
from polymerge.demo.skills import demo_skills
from polymerge.engine.local.engine import HFEngine
from polymerge.evaluate import HarnessSettings, chooser, evaluate, jsonl_tasks
from tests.conftest import Merged
from tests.tiny import tiny_tokenizer


def written(folder: Path, tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Path]:
    paths = {}
    for name, rows in tasks.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def answers(results: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Task -> what the model said to every request, in the order of the rows."""
    return {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in results["samples"].items()
    }


def assert_same(tasks: list[dict[str, Any]], dense: Path, engine: HFEngine, expert: str, *, chat: bool) -> None:
    choose = chooser(f"expert:{expert}", engine.experts)
    settings = HarnessSettings(log_samples=True, apply_chat_template=chat, bootstrap_iters=0)
    ours = evaluate(engine, tasks, choose, settings=settings, tokenizer=engine.tokenizer)
    model = HFLM(pretrained=str(dense), device="cpu", dtype="float32", batch_size=4)
    theirs = simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    for task, rows in answers(ours).items():
        for row, other in zip(rows, answers(theirs)[task], strict=True):
            for one, two in zip(row, other, strict=True):
                if isinstance(one, str):
                    assert one.split() == two.split()
                else:
                    assert float(one[0]) == pytest.approx(float(two[0]), abs=5e-3)
                    assert one[1] == two[1]
        for name, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value), (task, name)


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randint(3, 95)}" for _ in range(count))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_dense_expert_and_the_same_one_in_a_bundle(merged: Merged, tmp_path: Path, architecture: str) -> None:
    bundle, _ = merged(architecture, compress_rate=0.0)
    tokenizer = tiny_tokenizer()
    dense = export_dense(bundle, "e1", tmp_path / "dense")
    tokenizer.save_pretrained(dense)
    engine = HFEngine(load_model(bundle), tokenizer, fingerprint=bundle.digest)
    rng = random.Random(0)
    choices = [[words(rng, n) for n in (1, 2, 4)] for _ in range(12)]
    tasks = {
        "choose": [
            {"prompt": words(rng, 3 + n), "answer": listed[n % 3], "choices": listed}
            for n, listed in enumerate(choices)
        ],
        "write": [{"prompt": words(rng, 2 + n), "answer": words(rng, 2)} for n in range(6)],
    }
    assert_same(jsonl_tasks(written(tmp_path, tasks), ending=" ", max_new_tokens=8), dense, engine, "e1", chat=False)


@pytest.mark.slow
def test_a_real_expert_and_the_same_one_in_a_bundle(tmp_path: Path) -> None:
    demo = demonstrate(DemoSettings(output=tmp_path / "demo"), Listeners(say=print))
    sources = {name: record.source for name, record in Bundle.open(demo.bundle).manifest.experts.items()}
    bundle = merge({"experts": sources, "compress_rate": 0.0, "embeddings": "average"}, tmp_path / "exact")
    dense = export_dense(bundle, "shell", tmp_path / "dense")
    rows = {
        skill.name: [
            {"prompt": e.prompt, "answer": e.answer} | ({"final": e.final} if e.final else {}) for e in skill.test
        ]
        for skill in demo_skills(train=320, test=24)
    }
    shell = rows["shell"]
    rows["which"] = [
        {
            "prompt": row["prompt"],
            "answer": row["answer"],
            "choices": sorted({row["answer"], *(r["answer"] for r in shell[:4])}),
        }
        for row in shell
    ]
    engine = HFEngine.from_bundle(bundle)
    assert_same(jsonl_tasks(written(tmp_path, rows)), dense, engine, "shell", chat=True)
