"""Residuals that are weighted by what their expert's texts show: what is seen, what it gains, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from torch import Tensor

import polymerge
from polymerge import load_model, merge
from polymerge.bundle.bundle import Bundle
from polymerge.errors import DataError, ModelError, PolymergeError, RecipeError
from polymerge.method.weights import Weights
from polymerge.search import calibrate
from polymerge.search.agreement import ComparedTokens, Reference
from polymerge.search.examples import Example, read_examples
from polymerge.search.explore import search_recipe
from polymerge.search.find import find
from polymerge.search.sweep import sweep
from tests.tiny import ARCHITECTURES, make_experts, tiny_tokenizer

TEXTS = [
    {"prompt": " ".join(f"w{3 + (7 * row + 5 * word) % 90}" for word in range(12)), "answer": f"w{row + 3} w{row + 9}"}
    for row in range(16)
]


def experts_in(folder: Path, architecture: str = "llama", count: int = 3) -> dict[str, str]:
    experts = make_experts(architecture, folder, count=count)
    for path in experts.values():
        tiny_tokenizer().save_pretrained(path)
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    return {name: str(path) for name, path in experts.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibrate")


@pytest.fixture(scope="module")
def experts(folder: Path) -> dict[str, str]:
    return experts_in(folder)


def kl(bundle: Bundle, experts: Mapping[str, str], file: Path) -> dict[str, float]:
    model = load_model(bundle)
    return {
        name: Reference(source, read_examples(file)).against(lambda ids, name=name: model(ids, experts=name).logits).kl  # type: ignore[misc]
        for name, source in experts.items()
    }


def recipe_of(experts: Mapping[str, str], folder: Path, **settings: Any) -> dict[str, Any]:
    texts = dict.fromkeys(experts, str(folder / "texts.jsonl"))
    return {"experts": dict(experts), "compress_rate": 0.7, "calibration": texts, **settings}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "phi3", "qwen3-moe"])
@pytest.mark.parametrize("code", ["factors", "int4"])
def test_what_counts_for_the_texts_is_kept_first(architecture: str, code: str, tmp_path: Path) -> None:
    experts = experts_in(tmp_path, architecture)
    recipe = recipe_of(experts, tmp_path, code=code)
    weighted = kl(merge(recipe, tmp_path / "weighted"), experts, tmp_path / "texts.jsonl")
    plain = kl(merge(recipe | {"calibration": {}}, tmp_path / "plain"), experts, tmp_path / "texts.jsonl")
    assert sum(weighted.values()) < 0.85 * sum(plain.values())
    notes = Bundle.open(tmp_path / "weighted").manifest.notes
    assert [note.partition(":")[0] for note in notes if "weighted by what 16 texts" in note] == list(experts)
    assert (tmp_path / "weighted/polymerge.json").stat().st_size > 0
    sizes = [Bundle.open(tmp_path / name).sizes().total for name in ("weighted", "plain")]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[1]
    assert polymerge.verify(tmp_path / "weighted", sources=True).ok


def rows_of(weights: Weights) -> tuple[Tensor, Tensor]:
    """Of both sides."""
    assert weights.inputs is not None and weights.outputs is not None
    return weights.inputs.rows, weights.outputs.rows


def test_what_is_seen_are_inputs_and_gradients(experts: dict[str, str]) -> None:
    """Against torch's own gradients of whole texts, token by token."""
    model = hf.AutoModelForCausalLM.from_pretrained(experts["e0"]).eval().requires_grad_(False)
    rows = [ComparedTokens([5, 9, 11, 4, 2], 2, True), ComparedTokens([7, 3, 8], 2, False)]
    module = "model.layers.1.mlp.down_proj"
    given, heeded = rows_of(calibrate._seen(model, rows, [module], seed=3)[module])
    draw, inputs, outputs = torch.Generator().manual_seed(3), [], []
    for row in rows:
        held: dict[str, Tensor] = {}

        def keep(module: Any, args: Any, output: Tensor, held: dict[str, Tensor] = held) -> Tensor:
            held["in"], held["out"] = args[0][0], output.requires_grad_(True)
            return output

        hook = model.get_submodule(module).register_forward_hook(keep)
        logits = model(torch.tensor([row.ids])).logits[0]
        hook.remove()
        likely = logits[-1 - row.compared : -1].log_softmax(-1)
        said = torch.multinomial(likely.detach().exp(), 1, generator=draw)
        [gradient] = torch.autograd.grad(-likely.gather(1, said).sum(), [held["out"]])
        inputs.append(held["in"])
        outputs.append(gradient[0])
    for seen, each in ((given, torch.cat(inputs)), (heeded, torch.cat(outputs))):
        torch.testing.assert_close(seen.T @ seen, each.T @ each, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_tables_count_by_their_tokens(tmp_path: Path, tied: bool) -> None:
    """A row of a table by how often its token is read, and how sure the head is of it."""
    folder = make_experts("llama-tied" if tied else "llama", tmp_path, count=1)["e0"]
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    rows = [ComparedTokens([5, 9, 9, 4, 2], 2, True), ComparedTokens([7, 3, 9], 2, False)]
    tables = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    seen = calibrate._seen(model, rows, tables, seed=3)
    assert sorted(seen) == sorted(tables)
    counts = torch.bincount(torch.tensor([5, 9, 9, 4, 2, 7, 3, 9]), minlength=96).float()
    given, read = rows_of(seen["model.embed_tokens"])
    assert given.shape[1] == 48 and read.shape == (96,)
    if tied:  # the head's squares are added, of the same sum
        assert bool((read > counts / counts.sum() - 1e-6).all()) and float(read.sum()) == pytest.approx(2.0)
    else:
        assert torch.equal(read, counts)
        states, squares = rows_of(seen["lm_head"])
        assert states.shape[1] == 48 and squares.shape == (96,) and float(squares.sum()) > 0


def test_more_tokens_than_sums_are_summed(experts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(experts["e0"]).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    rows = [ComparedTokens(torch.randint(3, 90, (40,), generator=draw).tolist(), 39, False) for _ in range(40)]
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    monkeypatch.setattr(calibrate, "SUMS", 1600)
    exact = calibrate._seen(model, rows, modules, seed=0)
    assert exact[modules[0]].inputs is exact[modules[1]].inputs  # what both are given is kept once
    monkeypatch.setattr(calibrate, "SUMS", 400)
    few = calibrate._seen(model, rows, modules, seed=0)
    for whole, sums in zip(rows_of(exact[modules[0]]), rows_of(few[modules[0]]), strict=True):
        assert len(sums) == 400
        moment = whole.T @ whole
        assert float((sums.T @ sums - moment).norm() / moment.norm()) < 0.35


def test_two_experts_have_one_residual_still(tmp_path: Path) -> None:
    experts = experts_in(tmp_path, count=2)
    bundle = merge(recipe_of(experts, tmp_path, embeddings="keep", lm_head="keep", code="int4"), tmp_path / "bundle")
    assert any(layer.borrowed for layer in bundle.manifest.layers)
    plain = merge({"experts": experts, "compress_rate": 0.7, "code": "int4"}, tmp_path / "plain")
    near, far = (kl(one, experts, tmp_path / "texts.jsonl") for one in (bundle, plain))
    assert sum(near.values()) < sum(far.values())


def test_workers_give_the_same_bytes_and_one_expert_may_have_texts(
    folder: Path, experts: dict[str, str], tmp_path: Path
) -> None:
    texts = {"e1": str(folder / "texts.jsonl")}
    recipe = recipe_of(experts, folder, calibration=texts)
    one, two = (merge(recipe, tmp_path / f"{n}", workers=n) for n in (1, 2))
    for file in ("experts/e0", "experts/e1", "experts/e2"):
        names = sorted(path.name for path in (one.path / file).iterdir())
        assert all((one.path / file / n).read_bytes() == (two.path / file / n).read_bytes() for n in names)
    plain = merge(recipe | {"calibration": {}}, tmp_path / "plain")
    same = [
        (one.path / f"experts/{e}/coded_expert.safetensors").read_bytes()
        == (plain.path / f"experts/{e}/coded_expert.safetensors").read_bytes()
        for e in experts
    ]
    assert same == [True, False, True]


def test_what_is_added_may_be_calibrated(folder: Path, experts: dict[str, str], tmp_path: Path) -> None:
    two, file = {name: experts[name] for name in ("e0", "e1")}, folder / "texts.jsonl"
    recipe = {"experts": two, "compress_rate": 0.7, "code": "int4", "embeddings": "compress", "lm_head": "compress"}
    far = {}
    for calibration in (None, file):
        bundle = merge(recipe, tmp_path / str(calibration is None))
        added = polymerge.add_expert(bundle, "e2", experts["e2"], calibration=calibration).bundle
        far[calibration] = kl(added, {"e2": experts["e2"]}, file)["e2"]
        assert polymerge.verify(added, sources=True).ok
        assert any(note.startswith("e2: residuals of ") for note in added.manifest.notes) == (calibration is not None)
    assert far[file] < 0.95 * far[None]
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        polymerge.add_expert(bundle, "e3", experts["e2"], calibration=tmp_path / "gone.jsonl")
    assert Bundle.open(bundle.path).experts == ["e0", "e1", "e2"]


def test_a_recipes_file_names_texts_beside_it(experts: dict[str, str], folder: Path, tmp_path: Path) -> None:
    recipe = {"experts": experts, "compress_rate": 0.7, "calibration": {"e0": "texts.jsonl"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    bundle = merge(folder / "recipe.yaml", tmp_path / "bundle")
    assert any(note.startswith("e0: residuals of ") for note in bundle.manifest.notes)
    polymerge.remove_expert(bundle.path, "e0")
    assert not any(note.startswith("e0: ") for note in Bundle.open(bundle.path).manifest.notes)


def test_what_is_measured_does_not_calibrate(
    experts: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Example]] = []
    texts = calibrate._texts
    monkeypatch.setattr(calibrate, "_texts", lambda *given: seen.append(texts(*given)) or seen[-1])
    file = folder / "texts.jsonl"
    held = {name: read_examples(file, 4) for name in experts}
    sweep(recipe_of(experts, folder), held, tmp_path / "sweep", rates=[0.9], codes=["int4"])
    assert find(recipe_of(experts, folder), "kl=1", held, codes=["int4"]).recipe.calibration
    search_recipe(recipe_of(experts, folder), "2x", held, tmp_path / "search", trials=1)
    assert "calibration" in yaml.safe_load((tmp_path / "search/recipe.yaml").read_text())
    assert len(seen) == 9 and all(of_expert == read_examples(file)[4:] for of_expert in seen)
    with pytest.raises(DataError, match=r"texts\.jsonl: every row of it is measured for 'e0'"):
        sweep(recipe_of(experts, folder), dict.fromkeys(experts, file), tmp_path / "other", rates=[0.9])


def test_what_cannot_be_calibrated_is_refused(experts: dict[str, str], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no expert 'e9' among e0, e1, e2"):
        merge(recipe_of(experts, folder, calibration={"e9": "texts.jsonl"}), tmp_path / "bundle")
    with pytest.raises(RecipeError, match="calibration: is not there for experts that are aligned"):
        merge(recipe_of(experts, folder, align="permutation"), tmp_path / "bundle")
    with pytest.raises(RecipeError, match="no expert has residuals from an average"):
        merge(recipe_of(experts, folder, compress_rate=0.0), tmp_path / "bundle")
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        merge(recipe_of(experts, folder, calibration={"e0": str(folder / "gone.jsonl")}), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_an_architecture_without_a_way_back_is_one_line(
    experts: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("use `model.train()`\nto train it")

    monkeypatch.setattr(calibrate, "_answered", refuse)
    with pytest.raises(ModelError, match=r"cannot be calibrated \(AssertionError: use `model.train\(\)` to train it\)"):
        merge(recipe_of(experts, folder), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_text_longer_than_the_model_reads_is_shortened(tmp_path: Path) -> None:
    experts = {name: str(path) for name, path in make_experts("gpt2", tmp_path, config=short_gpt2()).items()}
    for path in experts.values():
        tiny_tokenizer().save_pretrained(path)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"prompt": " ".join(["w5", "w9"] * 20)}))
    notes = merge(recipe_of(experts, tmp_path), tmp_path / "bundle").manifest.notes
    assert any(note.startswith("e2: residuals of ") for note in notes)


def short_gpt2() -> Any:
    config = ARCHITECTURES["gpt2"]()
    config.n_positions = 16
    return config


def test_tables_that_have_other_rows_are_not_said_to_be_weighted(tmp_path: Path) -> None:
    experts = experts_in(tmp_path)
    model = hf.AutoModelForCausalLM.from_pretrained(experts["e1"])
    model.resize_token_embeddings(104, mean_resizing=False)
    model.save_pretrained(experts["e1"])
    recipe = recipe_of(experts, tmp_path, code="int4", embeddings="compress", lm_head="compress")
    notes = [note for note in merge(recipe, tmp_path / "bundle").manifest.notes if "are weighted by" in note]
    assert len(notes) == 3 and all(": residuals of 14 of 16 matrices" in note for note in notes)


def test_an_expert_of_which_nothing_is_seen_is_refused(
    experts: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_has", lambda model, module: False)
    with pytest.raises(ModelError, match="its texts come to no matrix that has residuals; leave 'e0' out"):
        merge(recipe_of(experts, folder), tmp_path / "bundle")


def test_a_layer_that_a_text_comes_to_twice_is_left_out(experts: dict[str, str]) -> None:
    """Rows of two calls with one sign would be added up as one token's."""
    model = hf.AutoModelForCausalLM.from_pretrained(experts["e0"]).eval().requires_grad_(False)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    modules = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    assert list(calibrate._seen(model, [ComparedTokens([5, 9, 11], 2, True)], modules, seed=3)) == modules[1:]


def test_what_a_search_may_compress_is_calibrated(
    experts: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate at which matrices are whole, and with tables that the recipe keeps."""
    asked: list[list[str]] = []
    seen = calibrate._seen
    monkeypatch.setattr(calibrate, "_seen", lambda *given: asked.append(given[2]) or seen(*given))  # type: ignore[func-returns-value]
    held = {name: read_examples(folder / "texts.jsonl", 4) for name in experts}
    recipe = recipe_of(experts, folder, calibration={"e0": str(folder / "texts.jsonl")}, code="int4", embeddings="keep")
    search_recipe(recipe, "2x", held, tmp_path / "search", trials=1)
    whole = recipe | {"compress_rate": 0.2, "embeddings": "compress"}
    del whole["code"]
    merge(whole, tmp_path / "bundle", target="size=1.5x", codes=["int4"])
    for modules in asked:
        assert {"model.embed_tokens", "model.layers.0.self_attn.q_proj"} <= set(modules)
    assert len(asked) == 2


def test_an_executor_that_is_none_is_told_before_texts_are_read(
    experts: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    texts = {"e0": str(folder / "gone.jsonl")}
    with pytest.raises(PolymergeError, match="does no tensors"):
        merge(recipe_of(experts, folder, calibration=texts), tmp_path / "bundle", executor="fast")  # type: ignore[arg-type]
