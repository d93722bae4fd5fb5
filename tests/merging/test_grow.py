"""Adding and removing an expert leaves everything else as it was, to the bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymerge import Bundle, add_expert, load_model, merge, remove_expert, verify
from polymerge.errors import BundleError, RecipeError, SourceError
from tests.tiny import make_experts


@pytest.fixture
def grown(tmp_path: Path) -> tuple[Bundle, dict[str, Path]]:
    """A bundle of two experts, and the three that there are."""
    experts = make_experts("qwen2", tmp_path)
    first = {name: str(experts[name]) for name in ("e0", "e1")}
    return merge({"experts": first, "compress_rate": 0.5}, tmp_path / "bundle"), experts


def files(bundle: Bundle) -> dict[str, bytes]:
    skipped = ("polymerge.json", "merge_stats.jsonl")
    found = [file for file in bundle.path.rglob("*") if file.is_file() and file.name not in skipped]
    return {str(file.relative_to(bundle.path)): file.read_bytes() for file in found}


def test_an_added_expert_changes_nothing_else_and_answers(grown: tuple[Bundle, dict[str, Path]]) -> None:
    bundle, experts = grown
    before = files(bundle)
    added = add_expert(bundle, "e2", experts["e2"])
    after = files(added.bundle)
    assert {name: data for name, data in after.items() if not name.startswith("experts/e2/")} == before
    assert added.bundle.experts == ["e0", "e1", "e2"]
    checked = verify(added.bundle, sources=True)
    assert checked.ok, checked.problems
    ids = torch.tensor([[3, 4, 5]])
    model = load_model(added.bundle)
    with torch.no_grad():
        assert not torch.equal(model(ids, experts="e2").logits, model(ids).logits)


def test_a_fresh_merge_gains_what_was_said(grown: tuple[Bundle, dict[str, Path]], tmp_path: Path) -> None:
    bundle, experts = grown
    added = add_expert(bundle, "e2", experts["e2"])
    recipe = {"experts": {name: str(path) for name, path in experts.items()}, "compress_rate": 0.5}
    fresh = merge(recipe, tmp_path / "fresh")

    def error(of: Bundle) -> float:
        own = [line["relative_error"] for line in of.stats() if line["expert"] == "e2"]
        return sum(own) / len(own)

    assert added.relative_error == pytest.approx(error(added.bundle), rel=0.1)
    assert added.fresh_relative_error == pytest.approx(error(fresh), rel=0.1)
    assert added.fresh_relative_error < added.relative_error


def test_removing_brings_the_old_bundle_back(grown: tuple[Bundle, dict[str, Path]]) -> None:
    bundle, experts = grown
    before, manifest = files(bundle), bundle.manifest
    removed = remove_expert(add_expert(bundle, "e2", experts["e2"]).bundle, "e2")
    assert files(removed) == before
    assert removed.manifest.experts == manifest.experts and removed.manifest.files == manifest.files
    assert {line["expert"] for line in removed.stats()} == {"e0", "e1"}


def test_what_cannot_be_added_or_removed_is_one_line(grown: tuple[Bundle, dict[str, Path]]) -> None:
    bundle, experts = grown
    with pytest.raises(BundleError, match="already holds"):
        add_expert(bundle, "E0", experts["e2"])
    with pytest.raises(RecipeError, match=r"'\.\./x'"):
        add_expert(bundle, "../x", experts["e2"])
    with pytest.raises(BundleError, match="no expert 'nope'"):
        remove_expert(bundle, "nope")
    with pytest.raises(BundleError, match="only expert left"):
        remove_expert(remove_expert(bundle, "e0"), "e1")


def test_an_expert_beyond_the_bundles_dtype_is_refused_and_the_bundle_stays(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path)
    recipe = {"experts": {name: str(experts[name]) for name in ("e0", "e1")}, "dtype": "float16"}
    bundle = merge(recipe, tmp_path / "bundle")
    before = files(bundle)
    weights = load_file(experts["e2"] / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1e6
    save_file(weights, experts["e2"] / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"'e2'.*q_proj.*too large for float16"):
        add_expert(bundle, "e2", experts["e2"])
    assert files(Bundle.open(bundle.path)) == before
