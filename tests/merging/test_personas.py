"""What an expert has beside its weights travels with it: merged, added, taken out, verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from polymerge import Bundle, add_expert, export_dense, merge, plan_merge, remove_expert, verify
from polymerge.errors import BundleError, ModelError
from polymerge.export.vllm.plan import plan_vllm
from polymerge.sources.adapter_folder import adapter_folder
from polymerge.sources.opening import open_checkpoint
from polymerge.sources.persona import differing, load_tokenizer, persona_of, read_persona
from tests.fine_tunes import Original, fine_tunes
from tests.killed import content
from tests.tiny import make_experts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
GROUPS = ("tokenizer", "template", "generation")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Original]:
    return fine_tunes(tmp_path_factory.mktemp("fine-tunes"))


def merged(originals: dict[str, Original], folder: Path, *names: str, out: str = "bundle", **recipe: Any) -> Bundle:
    return merge(
        {"experts": {name: str(originals[name].path) for name in names}, "code": "factors", **recipe}, folder / out
    )


def check_same(bundle: Bundle, expert: str, original: Original) -> None:
    kept = bundle.persona(expert)
    assert differing(kept, persona_of(open_checkpoint(str(original.path)))) == ()
    tokenizer = load_tokenizer(kept)
    assert tokenizer.get_vocab() == original.tokenizer.get_vocab()
    assert tokenizer.chat_template == original.tokenizer.chat_template
    assert tokenizer.eos_token == original.tokenizer.eos_token


def test_every_expert_keeps_its_own(originals: dict[str, Original], tmp_path: Path) -> None:
    bundle = merged(originals, tmp_path, "plain", "chatml")
    for name, original in originals.items():
        check_same(bundle, name, original)
    home = bundle.path / "experts/chatml/persona"
    stored = {file.name for file in home.iterdir()}
    assert stored == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json"
    }  # fmt: skip
    listed = {name for name in bundle.manifest.files if "/persona/" in name}
    assert listed == {f"experts/chatml/persona/{name}" for name in stored}
    assert not (bundle.path / "experts/plain/persona").exists()


def test_a_merge_gives_the_same_bytes_again_and_add_the_same_persona(
    originals: dict[str, Original], tmp_path: Path
) -> None:
    first, again = (merged(originals, tmp_path, "plain", "chatml", out=out) for out in ("one", "two"))
    assert content(first.path) == content(again.path)
    twice = {name: str(originals["plain"].path) for name in ("plain", "other")}
    alone = merge({"experts": twice, "code": "factors"}, tmp_path / "alone")
    before = content(alone.path)
    grown = add_expert(alone, "chatml", originals["chatml"].path)
    assert grown.persona == GROUPS and grown.bundle.manifest.format_version == 3
    check_same(grown.bundle, "chatml", originals["chatml"])
    home = "experts/chatml/persona"
    names = {file.name for file in (first.path / home).iterdir()}
    for name in names:
        assert (first.path / home / name).read_bytes() == (grown.bundle.path / home / name).read_bytes()
    shrunk = remove_expert(grown.bundle, "chatml")
    after = content(shrunk.path)
    assert shrunk.manifest.format_version == 1 and after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"polymerge.json"}  # it keeps the widest ratios


def test_verify_sees_a_persona_that_is_not_the_source_s(originals: dict[str, Original], tmp_path: Path) -> None:
    bundle = merged(originals, tmp_path, "plain", "chatml")
    assert verify(bundle, sources=True).ok
    changed = tmp_path / "changed"
    shutil.copytree(originals["chatml"].path, changed)
    (changed / "chat_template.jinja").write_text("{{ messages }}")
    problems = verify(bundle, source={"chatml": str(changed)}).problems
    assert problems == [f"expert 'chatml': its template is not the one of {changed}"]
    (bundle.path / "experts/chatml/persona/chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(BundleError, match=r"persona/chat_template\.jinja: has .* bytes"):
        Bundle.open(bundle.path)


def test_verify_sees_groups_that_are_not_the_files(originals: dict[str, Original], tmp_path: Path) -> None:
    bundle = merged(originals, tmp_path, "plain", "chatml")
    file = bundle.path / "polymerge.json"
    data = json.loads(file.read_text())
    cases = {
        "has files, but": {"plain": ["template"], "chatml": []},
        "unlisted tokenizer files": {"plain": [], "chatml": ["template", "generation"]},
        "its own generation without generation_config.json": {"plain": ["generation"], "chatml": list(GROUPS)},
    }
    for words, groups in cases.items():
        for name, given in groups.items():
            data["experts"][name]["persona"] = given
        file.write_text(json.dumps(data))
        assert any(words in problem for problem in verify(Bundle.open(bundle.path)).problems), words


def test_an_older_reader_would_refuse_it_by_its_version(originals: dict[str, Original], tmp_path: Path) -> None:
    bundle = merged(originals, tmp_path, "plain", "chatml", compress_rate=0.0)
    data = json.loads((bundle.path / "polymerge.json").read_text())
    assert data["format_version"] > 1 and "persona" not in data["experts"]["plain"]
    (bundle.path / "polymerge.json").write_text(json.dumps(data | {"format_version": 1}))
    with pytest.raises(BundleError, match="format version 1 does not fit"):
        Bundle.open(bundle.path)


def test_a_tokenizer_is_taken_from_whoever_has_one(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path)
    tiny_tokenizer().save_pretrained(experts["e1"])
    sources = {name: str(path) for name, path in experts.items()}
    bundle = merge({"experts": sources, "code": "factors"}, tmp_path / "bundle")
    assert any("'e0' has no tokenizer; the bundle takes 'e1''s" in note for note in bundle.manifest.notes)
    assert bundle.manifest.format_version == 1
    for expert in (None, *experts):
        assert load_tokenizer(bundle.persona(expert)).get_vocab() == tiny_tokenizer().get_vocab()


def test_none_at_all_is_one_line_of_the_plan(tmp_path: Path) -> None:
    sources = {name: str(path) for name, path in make_experts("llama", tmp_path).items()}
    plan = plan_merge({"experts": sources, "code": "factors"})
    lines = [line for line in plan.summary()["notes"] if "tokenizer" in line]
    assert lines == ["no expert has a tokenizer: the bundle will take token ids, and no text"]
    assert not [note for note in plan.notes if "tokenizer" in note]


PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "crop_size": 28, "image_mean": [0.5, 0.5, 0.5]}


def with_processor(experts: dict[str, Path], **changes: dict[str, Any]) -> dict[str, Path]:
    """Image settings beside each expert, those of some changed."""
    for name, path in experts.items():
        written = {"transformers_version": f"5.0.{name[-1]}", **PROCESSOR, **changes.get(name, {})}
        (path / "preprocessor_config.json").write_text(json.dumps(written))
    return experts


def processor_in(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "preprocessor_config.json").read_text())
    return data


@pytest.mark.parametrize("verb", ["merge", "add"])
def test_how_images_become_numbers_is_each_expert_s_own(verb: str, tmp_path: Path) -> None:
    experts = with_processor(make_experts("llama", tmp_path), e2={"image_mean": [0.4, 0.4, 0.4]})
    sources = {name: str(path) for name, path in experts.items()}
    if verb == "merge":
        bundle = merge({"experts": sources, "code": "factors", "compress_rate": 0.0}, tmp_path / "bundle")
    else:
        two = {n: sources[n] for n in ("e0", "e1")}
        bundle = merge({"experts": two, "code": "factors", "compress_rate": 0.0}, tmp_path / "bundle")
        assert bundle.manifest.format_version == 1  # who wrote a file is no difference
        bundle = add_expert(bundle, "e2", experts["e2"]).bundle
    assert [record.persona for record in bundle.manifest.experts.values()] == [(), (), ("processor",)]
    assert bundle.manifest.format_version == 5
    for name, path in experts.items():
        exported = export_dense(bundle, name, tmp_path / f"dense-{name}")
        assert processor_in(exported)["image_mean"] == processor_in(path)["image_mean"]
    assert verify(bundle, sources=True).problems == []
    with_processor({"e2": experts["e2"]})
    assert any("'e2': its processor is not the one of" in p for p in verify(bundle, sources=True).problems)
    with pytest.raises(ModelError, match="'e2' has its own processor of images"):
        plan_vllm(bundle)
    assert remove_expert(bundle, "e2").manifest.format_version == 1


def test_an_adapter_s_own_processor_goes_before_its_base_s(tmp_path: Path) -> None:
    experts = with_processor(make_experts("llama", tmp_path, count=1))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "processor_config.json").write_text(json.dumps({"image_processor": {"size": 56}}))
    folder = adapter_folder(adapter, experts["e0"], {"model_type": "llama"}, changed=False)
    assert set(read_persona(folder, {}).processors) == {"processor_config.json"}
