"""Adding and removing an expert leaves everything else as it was, to the bit."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymerge import Bundle, add_expert, load_model, merge, remove_expert, verify
from polymerge.bundle.place import begin_work, mark_of
from polymerge.errors import BundleError, OutputExistsError, RecipeError, SourceError
from polymerge.merging.change import CHANGE
from tests.tiny import make_experts


@pytest.fixture
def grown(tmp_path: Path) -> tuple[Bundle, dict[str, Path]]:
    """A bundle of two experts, and the three that there are."""
    experts = make_experts("qwen2", tmp_path)
    first = {name: str(experts[name]) for name in ("e0", "e1")}
    return merge({"experts": first, "code": "factors", "compress_rate": 0.5}, tmp_path / "bundle"), experts


def files(bundle: Bundle) -> dict[str, bytes]:
    skipped = ("polymerge.json", "merge_stats.jsonl")
    listed = [file for file in bundle.path.rglob("*") if file.is_file() and file.name not in skipped]
    return {str(file.relative_to(bundle.path)): file.read_bytes() for file in listed}


def test_an_added_expert_changes_nothing_else_and_answers(grown: tuple[Bundle, dict[str, Path]]) -> None:
    bundle, experts = grown
    before = files(bundle)
    with pytest.raises(RecipeError, match="e2: source: is missing"):
        add_expert(bundle, "e2", {"path": str(experts["e2"])})
    added = add_expert(bundle, "e2", {"source": str(experts["e2"])})
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
    recipe = {"experts": {name: str(path) for name, path in experts.items()}, "code": "factors", "compress_rate": 0.5}
    fresh = merge(recipe, tmp_path / "fresh")

    def error(of: Bundle) -> float:
        errors = [line["relative_error"] for line in of.stats() if line["expert"] == "e2"]
        return sum(errors) / len(errors)

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
    recipe = {"experts": {name: str(experts[name]) for name in ("e0", "e1")}, "code": "factors", "dtype": "float16"}
    bundle = merge(recipe, tmp_path / "bundle")
    before = files(bundle)
    weights = load_file(experts["e2"] / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1e6
    save_file(weights, experts["e2"] / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"'e2'.*q_proj.*too large for float16"):
        add_expert(bundle, "e2", experts["e2"])
    assert files(Bundle.open(bundle.path)) == before


def test_an_expert_may_be_called_as_half_done_work_is(grown: tuple[Bundle, dict[str, Path]]) -> None:
    bundle, experts = grown
    for name in ("x", "x.partial", "x.previous"):
        add_expert(bundle, name, experts["e2"])
    before = files(bundle)
    remove_expert(bundle, "x")
    add_expert(bundle, "x", experts["e2"])
    assert files(bundle) == before
    assert verify(bundle.path).ok and not list(bundle.path.glob(".*"))


def test_a_folder_among_the_experts_that_no_manifest_lists_is_never_touched(
    grown: tuple[Bundle, dict[str, Path]],
) -> None:
    bundle, experts = grown
    (bundle.path / "experts" / "e2").mkdir()
    (bundle.path / "experts" / "e2" / "mine").write_text("years of work")
    with pytest.raises(BundleError, match=r"e2: is there, but is no expert of this bundle's manifest; move it away"):
        add_expert(bundle, "e2", experts["e2"])
    remove_expert(bundle, "e1")
    assert (bundle.path / "experts" / "e2" / "mine").read_text() == "years of work"


def test_a_change_that_was_killed_is_ended_by_the_next_one(grown: tuple[Bundle, dict[str, Path]]) -> None:
    """Before the manifest was written, the expert's folder goes; after it, it stays."""
    bundle, experts = grown
    shutil.copytree(bundle.path / "experts" / "e1", bundle.path / "experts" / "e3")
    begin_work(bundle.path / CHANGE, "change", expert="e3")
    add_expert(bundle, "e2", experts["e2"])
    assert not (bundle.path / "experts" / "e3").exists()
    begin_work(bundle.path / CHANGE, "change", expert="e2")
    assert remove_expert(bundle, "e1").experts == ["e0", "e2"]
    assert verify(bundle.path).ok and mark_of(bundle.path / CHANGE) is None


@pytest.mark.parametrize("expert", ["../../outside", "..", "/outside", 3, None, ["e0"]])
def test_a_mark_that_lies_deletes_nothing(
    grown: tuple[Bundle, dict[str, Path]], tmp_path: Path, expert: object
) -> None:
    bundle, _ = grown
    (tmp_path / "outside").mkdir()
    begin_work(bundle.path / CHANGE, "change", expert=expert)
    assert remove_expert(bundle, "e1").experts == ["e0"]
    assert (tmp_path / "outside").is_dir() and verify(bundle.path).ok


def test_a_strangers_folder_in_the_place_of_a_changes_work_stays(grown: tuple[Bundle, dict[str, Path]]) -> None:
    bundle, experts = grown
    (bundle.path / CHANGE).mkdir()
    with pytest.raises(OutputExistsError, match="was not made by polymerge"):
        add_expert(bundle, "e2", experts["e2"])
    assert (bundle.path / CHANGE).is_dir() and Bundle.open(bundle.path).experts == ["e0", "e1"]
