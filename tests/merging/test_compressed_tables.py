"""Embeddings and heads that are stored as linear weights are: what is kept of them, and which are kept or averaged.

The oracles are torch's SVD, and the checkpoints themselves.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from polymerge import Bundle, add_expert, merge, plan_merge, remove_expert, verify
from polymerge.bundle.manifest import read_manifest
from polymerge.errors import RecipeError
from polymerge.merging import run
from polymerge.merging.choices import averaged, bytes_of_choices, moved
from polymerge.merging.plan import replanned
from polymerge.merging.proof import Proof
from polymerge.recipe.merge import EMBEDDING_RATE
from tests.fine_tunes import Original
from tests.tiny import COMMON, VOCAB, make_experts
from tests.vocabularies import ADDED, HEADS, PADDED, WIDE, kin

pytestmark = pytest.mark.usefixtures("one_thread", "unproved")
COMPRESS = {"embeddings": "compress", "lm_head": "compress", "embedding_rate": 0.7, "compress_rate": 0.7}
ENDS = ("model.embed_tokens.weight", "lm_head.weight")
NAMES = ("plain", "wide", "padded")


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "prove", lambda *args, **more: Proof("any", True, "layers"))


def stored(path: str | Path, name: str) -> torch.Tensor:
    return load_file(Path(path) / "model.safetensors")[name]


def sources(paths: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in paths.items()}


def test_a_tables_residual_is_nearly_the_best_of_its_rank(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path, count=2)
    bundle = merge({"experts": sources(experts), "code": "factors", **COMPRESS}, tmp_path / "b")
    assert bundle.manifest.format_version == 5
    for name in ENDS:
        rank = bundle.layers[name].rank
        assert 0 < rank < COMMON["hidden_size"]
        for expert, path in experts.items():
            weight, base = stored(path, name), bundle.base_tensor(name)
            residual = weight - bundle.scales(expert)[name] * base
            best = torch.linalg.svdvals(residual)[rank:].norm()
            assert (bundle.reconstruct(expert, name) - weight).norm() <= 1.02 * best
    assert verify(bundle, sources=True).problems == []


def test_the_rates_ends_are_kept_and_averaged_and_too_small_ones_are_kept(tmp_path: Path) -> None:
    experts = sources(make_experts("llama", tmp_path, count=2))
    treatments = {
        rate: {t.treatment for t in plan_merge({"experts": experts, **COMPRESS, "embedding_rate": rate}).tasks
               if t.name in ENDS}
        for rate in (0.0, 0.7, 0.999, 1.0)
    }  # fmt: skip
    assert treatments == {0.0: {"keep"}, 0.7: {"low_rank"}, 0.999: {"keep"}, 1.0: {"average"}}


def test_rates_by_name_and_no_list(tmp_path: Path) -> None:
    experts = sources(make_experts("llama", tmp_path, count=2))
    plan = plan_merge(
        {"experts": experts, "code": "factors", **COMPRESS, "embedding_rate": {"lm_head*": 0.5, "default": 0.8}}
    )
    ranks = {task.name: task.rank for task in plan.tasks}
    assert ranks["lm_head.weight"] > ranks["model.embed_tokens.weight"] > 0
    with pytest.raises(RecipeError, match="embedding_rate: embeddings and heads are in no layer"):
        plan_merge({"experts": experts, "code": "factors", "embedding_rate": [0.5, 0.6]})
    with pytest.raises(RecipeError, match="embedding_rate: the pattern 'wte' matches no matrix"):
        plan_merge({"experts": experts, "code": "factors", **COMPRESS, "embedding_rate": {"wte": 0.5}})


@pytest.mark.parametrize("said", ["code: factors", "embeddings: keep\nlm_head: average", "compress_rate: 0"])
def test_a_rate_of_tables_that_are_not_compressed_is_refused_where_it_is_said(tmp_path: Path, said: str) -> None:
    experts = sources(make_experts("llama", tmp_path, count=2))
    (tmp_path / "r.yaml").write_text(f"experts: {json.dumps(experts)}\nembedding_rate: 0.9\n{said}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml, line 2: embedding_rate: nothing is compressed at it \(embedding"):
        plan_merge(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match=r"^recipe: embedding_rate: nothing"):
        plan_merge(tmp_path / "r.yaml", embedding_rate=0.8)
    assert plan_merge(tmp_path / "r.yaml", embedding_rate=0.95)


def test_who_does_not_compress_them_has_the_bytes_of_before(tmp_path: Path) -> None:
    bundle = merge({"experts": sources(make_experts("llama", tmp_path, count=3)), "code": "factors"}, tmp_path / "b")
    text = (bundle.path / "polymerge.json").read_text()
    assert "embedding_rate" not in text and read_manifest(bundle.path).format_version == 1


@pytest.mark.parametrize("code", ["factors", "int4"])
def test_add_and_remove(tmp_path: Path, code: str) -> None:
    experts = make_experts("llama-tied", tmp_path)
    first = {name: experts[name] for name in ("e0", "e1")}
    bundle = merge({"experts": sources(first), **COMPRESS, "code": code}, tmp_path / "b")
    before = bundle.reconstruct("e0", ENDS[0])
    grown = add_expert(bundle, "e2", experts["e2"]).bundle
    assert verify(grown, sources=True).problems == []
    weight = stored(experts["e2"], ENDS[0])
    # (near at this rank; the average alone is not)
    error = (grown.reconstruct("e2", ENDS[0]) - weight).norm()
    assert error < 0.95 * (grown.scales("e2")[ENDS[0]] * grown.base_tensor(ENDS[0]) - weight).norm()
    left = remove_expert(grown, "e1")
    assert left.manifest.format_version == 5 and torch.equal(left.reconstruct("e0", ENDS[0]), before)
    assert verify(left, sources=True).problems == []


def test_peft_refuses_the_folder_and_says_what_to_do(tmp_path: Path) -> None:
    bundle = merge(
        {"experts": sources(make_experts("llama", tmp_path, count=2)), "code": "factors", **COMPRESS}, tmp_path / "b"
    )
    with pytest.raises((ValueError, KeyError), match="polymerge export --to peft"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bundle.path), bundle.expert_folder("e0"))


@pytest.mark.parametrize("head", HEADS)
def test_other_vocabularies_keep_their_own_rows_exactly(tmp_path: Path, head: str) -> None:
    originals = dict(zip(NAMES, kin(tmp_path, head, [VOCAB, WIDE, PADDED], [(), ADDED, ("<|end|>",)]), strict=True))
    bundle = merge(
        {"experts": {n: str(o.path) for n, o in originals.items()}, "code": "factors", **COMPRESS}, tmp_path / "b"
    )
    assert verify(bundle, sources=True).problems == []
    check_own_rows(bundle, originals)
    first = merge(
        {"experts": {n: str(originals[n].path) for n in ("padded", "plain")}, "code": "factors", **COMPRESS},
        tmp_path / "two",
    )
    assert verify(add_expert(first, "wide", originals["wide"].path).bundle, sources=True).problems == []


def check_own_rows(bundle: Bundle, originals: dict[str, Original]) -> None:
    assert bundle.manifest.experts["padded"].own_rows
    for name, original in originals.items():
        own, reader = bundle.manifest.experts[name].own_rows, bundle.expert_reader(name)
        for layer in bundle.layers.values():
            if layer.rank and layer.role in ("embedding", "lm_head"):
                weight, rebuilt = original.model.get_parameter(layer.tensor).detach(), reader.read(layer.tensor)
                assert rebuilt.shape == weight.shape and torch.equal(rebuilt[own], weight[own])
                assert not torch.equal(rebuilt, weight)  # all else is compressed


def test_what_each_choice_costs_is_what_it_takes(tmp_path: Path) -> None:
    experts = sources(make_experts("llama", tmp_path))
    plan = replanned(
        plan_merge({"experts": experts, **COMPRESS, "code": "int4"}), embeddings="average", lm_head="average"
    )
    costs = bytes_of_choices(plan)
    taken: dict[str, int] = {}
    for choice in costs:
        rate = COMPRESS["embedding_rate"] if choice == "compress" else EMBEDDING_RATE
        settings = COMPRESS | {"code": "int4", "embeddings": choice, "lm_head": choice, "embedding_rate": rate}
        bundle = merge({"experts": experts, "code": "factors", **settings}, tmp_path / choice)
        keys = [(e, k, v) for e in bundle.experts for k, v in stored_of(bundle, e).items()]
        taken[choice] = sum(v.nbytes for _, k, v in keys if k.startswith(("model.embed_tokens", "lm_head")))
    assert costs == taken and costs["keep"] > costs["compress"] > costs["average"] == 0
    bundle = Bundle.open(tmp_path / "average")
    assert [task.name for task in averaged(plan)] == ["lm_head.weight", "model.embed_tokens.weight"]
    for expert, share in moved(plan, bundle).items():
        whole = [stored(experts[expert], name) for name in ENDS]
        apart = [weight - bundle.base_tensor(name) for name, weight in zip(ENDS, whole, strict=True)]
        assert share == pytest.approx(float(torch.cat(apart).norm() / torch.cat(whole).norm()), rel=1e-5)


def stored_of(bundle: Bundle, expert: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix("base_model.model."): v for k, v in load_file(bundle.expert_file(expert)).items()}
