"""The drop-in, called as the kit's main.py and evaluation.py call it, and its numbers against the kit's procedure."""

from __future__ import annotations

import csv
import shutil
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from polymerge import Bundle, load_model
from polymerge.compete import PolymergeMerges, compete
from polymerge.engine.local.engine import HFEngine
from polymerge.errors import OutputExistsError, PolymergeError
from polymerge.staged import Pipeline
from tests.conftest import Merged
from tests.tiny import tiny_tokenizer

ROWS = [
    ("w5 w6 w7", "multiple_choice", "['w8', 'w9 w10', 'w11 w12 w13']"),
    ("w9", "generation", ""),
    ("w20 w21", "multiple_choice", "['w30 w31', 'w32']"),
    ("w40 w41 w42 w43", "generation", ""),
]


@pytest.fixture(scope="module")
def bundle(merged: Merged, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle with a tokenizer beside it."""
    merged_bundle, _ = merged("llama")
    folder = tmp_path_factory.mktemp("kit") / "bundle"
    shutil.copytree(merged_bundle.path, folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def method(bundle: Path) -> Iterator[PolymergeMerges]:
    class Mine(PolymergeMerges):
        max_gen_len = 8

    Mine.bundle = str(bundle)
    made = Mine("mine")
    made.merge()
    yield made


def batches() -> list[dict[str, list[Any]]]:
    """Batches of one row, as the kit's loader makes them: columns without a value are left out."""
    rows = []
    for number, (text, kind, choices) in enumerate(ROWS):
        row = {"id": [number], "input": [text], "eval_type": [kind]}
        rows.append(row | ({"answer_choices": [choices]} if choices else {}))
    return rows


def as_the_kit_does(method: Any, folder: Path) -> list[tuple[int, str]]:
    """What evaluation.py does with a method, in our words."""
    output = folder / "output" / method.get_name()
    output.mkdir(parents=True)
    method.save_model(str(output))
    predictions = []
    with torch.no_grad():
        for batch in batches():
            if batch["eval_type"][0] == "multiple_choice":
                best, scores = method.predict_multiple_choice(batch)
                assert scores.cpu().numpy().shape[0] == 1
                predictions.append((batch["id"][0], str(best.cpu().numpy().tolist()[0])))
            else:
                ids, texts = method.generate(batch)
                assert isinstance(ids[0][0], int)
                predictions.append((batch["id"][0], texts[0]))
    return predictions


def test_the_bundles_own_place_is_never_cleared(method: PolymergeMerges, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "kit" / "bundle")
    (tmp_path / "link").symlink_to(copy.parent)
    method.bundle = copy
    for folder in (copy.parent, copy, tmp_path / "link"):
        with pytest.raises(OutputExistsError, match="own place"):
            method.save_model(folder)
    (tmp_path / "other" / "bundle").mkdir(parents=True)
    (tmp_path / "other" / "bundle" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="never overwritten"):
        method.save_model(tmp_path / "other")
    assert (tmp_path / "other" / "bundle" / "thesis.txt").exists()
    assert Bundle.open(copy).experts == ["e0", "e1", "e2"]


def dense(bundle: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32).eval()


def test_the_kit_runs_it_and_compete_writes_the_same(method: PolymergeMerges, bundle: Path, tmp_path: Path) -> None:
    predictions = as_the_kit_does(method, tmp_path)
    assert Bundle.open(tmp_path / "output" / "mine" / "bundle").experts == ["e0", "e1", "e2"]
    source = tmp_path / "test.csv"
    with source.open("w", newline="") as handle:
        csv.writer(handle).writerows(
            [["id", "input", "eval_type", "answer_choices"], *([n, *row] for n, row in enumerate(ROWS))]
        )
    compete(method.pipeline, source, tmp_path / "out.csv", max_new_tokens=8)
    with (tmp_path / "out.csv").open(newline="") as handle:
        rows = [(int(row["id"]), row["prediction"]) for row in csv.DictReader(handle)]
    assert rows == predictions


def test_scores_are_the_sum_of_the_choices_log_probabilities_after_the_input(
    method: PolymergeMerges, bundle: Path
) -> None:
    model, tokenizer = dense(bundle), tiny_tokenizer()
    for batch in batches():
        if "answer_choices" in batch:
            best, scores = method.predict_multiple_choice(batch)
            expected = []
            for choice in eval(batch["answer_choices"][0]):
                read, answer = tokenizer(batch["input"][0])["input_ids"], tokenizer(choice)["input_ids"]
                with torch.no_grad():
                    logits = model(torch.tensor([read + answer])).logits[0].log_softmax(-1)
                expected.append(sum(float(logits[len(read) + n - 1, token]) for n, token in enumerate(answer)))
            assert scores[0].tolist() == pytest.approx(expected, abs=1e-4)
            assert int(best[0]) == expected.index(max(expected))


def test_exact_scores_are_the_kits_to_the_letter(method: PolymergeMerges, bundle: Path) -> None:
    """Inputs are read into a cache, all choices padded on the right behind it, and every token scored but the
    first."""
    model, tokenizer = dense(bundle), tiny_tokenizer()
    method.exact = True
    for batch in batches():
        if "answer_choices" not in batch:
            continue
        choices = eval(batch["answer_choices"][0])
        inputs = tokenizer(batch["input"], return_tensors="pt", padding=True)
        right = tiny_tokenizer()
        right.padding_side = "right"
        answers = right(choices, return_tensors="pt", padding=True)
        with torch.no_grad():
            cache = model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}, use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(choices))
            mask = torch.cat(
                [inputs["attention_mask"].repeat_interleave(len(choices), 0), answers["attention_mask"]], 1
            )
            logits = model(answers["input_ids"], attention_mask=mask, past_key_values=cache).logits.float()
        logprobs = logits[:, :-1].log_softmax(-1).gather(2, answers["input_ids"][:, 1:, None])[..., 0]
        expected = (logprobs * answers["attention_mask"][:, 1:]).sum(1)
        assert torch.allclose(method.predict_multiple_choice(batch)[1][0], expected, atol=1e-4)


def test_generation_is_greedy_and_its_ids_hold_the_prompt(method: PolymergeMerges, bundle: Path) -> None:
    model, tokenizer = dense(bundle), tiny_tokenizer()
    for batch in batches():
        if "answer_choices" in batch:
            continue
        inputs = tokenizer(batch["input"], return_tensors="pt")["input_ids"]
        expected = model.generate(inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
        ids, texts = method.generate(batch)
        assert texts[0] == tokenizer.decode(expected[inputs.shape[1] :], skip_special_tokens=True)
        assert ids[0][: inputs.shape[1]] == inputs[0].tolist()


def test_batches_of_many_rows_lists_numbers_and_unequal_choices(method: PolymergeMerges) -> None:
    batch = {"input": ["w5 w6", 7, 8.5], "answer_choices": [["w8", "w9"], "['w8', 'w9', 'w10']", ("w3",)]}
    before = repr(batch)
    best, scores = method.predict_multiple_choice(batch)
    assert best.shape == (3,) and scores.shape == (3, 3) and best.dtype == torch.int64
    assert scores[0, 2] == scores[2, 1] == float("-inf") and int(best[2]) == 0
    assert repr(batch) == before
    assert len(method.generate({"input": ["w5", 7]})[1]) == 2
    with pytest.raises(PolymergeError, match="not a Python list"):
        method.predict_multiple_choice({"input": ["w5"], "answer_choices": ["[oops"]})
    with pytest.raises(PolymergeError, match="has none"):
        method.predict_multiple_choice({"input": ["w5"], "answer_choices": [[]]})


def test_without_a_bundle_or_a_merge_it_says_so(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    monkeypatch.delenv("POLYMERGE_BUNDLE", raising=False)
    with pytest.raises(PolymergeError, match="POLYMERGE_BUNDLE"):
        PolymergeMerges("x").merge()
    with pytest.raises(PolymergeError, match=r"call merge\(\) first"):
        PolymergeMerges("x").generate({"input": ["a"]})
    monkeypatch.setenv("POLYMERGE_BUNDLE", str(bundle))
    assert PolymergeMerges().merge().engine.experts == ["e0", "e1", "e2"]


def test_a_recipe_is_merged_where_the_bundle_is_not_there_yet(
    merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, experts = merged("llama")
    for name, folder in experts.items():
        shutil.copytree(folder, tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("experts:\n" + "".join(f"  {name}: ./{name}\n" for name in experts))

    class Mine(PolymergeMerges):
        pass

    Mine.bundle, Mine.recipe = str(tmp_path / "made"), str(recipe)
    Mine().merge()
    assert Bundle.open(tmp_path / "made").experts == ["e0", "e1", "e2"]


def test_an_expert_answers_through_compete(bundle: Path, tmp_path: Path) -> None:
    engine = HFEngine(load_model(bundle), tiny_tokenizer(), fingerprint="x")
    source = tmp_path / "in.csv"
    source.write_text("id,input,eval_type,answer_choices\n0,w5 w6,generation,\n")
    texts = {}
    for expert in ("e0", "e1"):
        out = tmp_path / f"{expert}.csv"
        compete(Pipeline(engine, expert=expert, chat=False), source, out, max_new_tokens=8)
        texts[expert] = out.read_text()
    assert texts["e0"] != texts["e1"]


def test_the_kits_older_main_finds_it_among_the_entry_points() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["llm_merging.merging.Merges"]["polymerge"].partition(":")
    assert getattr(import_module(module), name) is PolymergeMerges
