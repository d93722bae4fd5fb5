"""The story of docs/python.md runs from top to bottom, and models in memory make the bundle that their folders make."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import polymerge
from polymerge.engine.base import Generation
from polymerge.errors import RecipeError, SourceError
from polymerge.router.route import Neighbour, Route
from tests.tiny import ARCHITECTURES, COMMON, make_experts, tiny_tokenizer

STORY = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    deep = LlamaConfig(**COMMON | {"num_hidden_layers": 12})  # a router looks at the eleventh layer from the end
    made = make_experts("llama", tmp_path / "made", count=2, config=deep)
    named = {}
    for name, path in zip(("math", "code"), made.values(), strict=True):
        tiny_tokenizer().save_pretrained(path)
        named[name] = path.rename(tmp_path / name)
    return named


def test_the_story_runs(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", STORY, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["bundle"].experts == ["math", "code"]  # type: ignore[attr-defined]


def test_models_in_memory_make_the_bundle_of_their_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    given = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in folders.items()}
    memory = polymerge.merge(given, tmp_path / "memory", code="factors")
    disk = polymerge.merge(folders, tmp_path / "disk", code="factors")
    for file in ("model.safetensors", "tokenizer.json", "experts/math/adapter_model.safetensors"):
        assert (memory.path / file).read_bytes() == (disk.path / file).read_bytes(), file
    assert [record.source for record in memory.manifest.experts.values()] == ["memory:math", "memory:code"]
    assert not [path for path in tmp_path.iterdir() if ".models-" in path.name]
    moved = {name: str(path) for name, path in folders.items()}
    assert polymerge.verify(memory, source=moved).ok
    with pytest.raises(SourceError, match="memory:math: was a model in memory"):
        polymerge.verify(memory, sources=True)


def test_a_peft_model_is_its_adapter_and_one_without_a_named_base_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def adapted(model: PreTrainedModel) -> PeftModel:
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(model, config)

    given = {name: adapted(AutoModelForCausalLM.from_pretrained(folders["math"])) for name in "ab"}
    bundle = polymerge.merge(given, tmp_path / "bundle")
    record = bundle.manifest.experts["a"]
    assert (record.source, record.base) == ("memory:a", str(folders["math"]))
    nameless = adapted(LlamaForCausalLM(ARCHITECTURES["llama"]()))
    with pytest.raises(SourceError, match=r"expert 'b': its adapter's base was made in memory"):
        polymerge.merge({"a": str(folders["math"]), "b": nameless}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_is_in_memory_and_no_model_is_refused_by_name(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**COMMON))
    for given, said in (
        (model.state_dict(), "expert 'a': weights alone do not say their architecture; give the model that has them"),
        (torch.nn.Linear(2, 2), "expert 'a': a Linear is neither a transformers model nor PEFT's"),
    ):
        with pytest.raises(SourceError, match=re.escape(said)):
            polymerge.merge({"a": given, "b": model}, tmp_path / "b")
    with pytest.raises(RecipeError, match="give a YAML file, or a mapping of names to experts; a list has no names"):
        polymerge.merge([model, model], tmp_path / "b")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_what_a_notebook_shows_is_short_and_escaped(folders: dict[str, Path], tmp_path: Path) -> None:
    bundle = polymerge.merge(folders, tmp_path / "bundle", code="int4", compress_rate=0.9)
    assert repr(bundle) == f"Bundle('{bundle.path}': math, code; LlamaForCausalLM, int4 at 0.9)"
    assert str(folders["math"]) in bundle._repr_html_()
    route = Route("math", "sums", 0.97, {"sums": 0.97}, reason="a<b", neighbours=(Neighbour("1+1", "sums", 0.5),))
    assert repr(route) == "Route(math: sums at 97.0%)"
    assert "a&lt;b" in route._repr_html_() and "sums: 1+1" in route._repr_html_()
    cut = Generation("x" * 5000, 3, 2000, "length")
    assert len(repr(cut)) < 500 and repr(cut).endswith("2000 tokens, cut)")
