"""Adapters over one model: bundles that are exact and no larger, held against PEFT's own forward pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from polymerge import Bundle, add_expert, export_dense, export_peft, load_model, merge, remove_expert, verify
from polymerge.bundle.adapter import adapter_of
from polymerge.bundle.inspect import inspect_bundle
from polymerge.bundle.manifest import ADAPTER_FILE
from polymerge.bundle.stored import dense_state
from polymerge.errors import SourceError
from polymerge.export import plan_vllm, write_vllm
from polymerge.export.vllm.calibrate import applied, read_adapter
from polymerge.export.vllm.prompts import CalibrationPrompt
from polymerge.merging import adapters, run
from polymerge.merging.plan import plan_merge
from polymerge.merging.proof import Proof
from tests.sources.peft_oracle import by_peft, logits, write_adapter
from tests.tiny import VOCAB, make_experts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
IDS = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
# Three adapters that differ in rank, scaling and targets.
SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]},
    "b": {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "c": {"r": 2, "alpha_pattern": {"q_proj": 5}, "rank_pattern": {"down_proj": 6}, "target_modules": "all-linear"},
}


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is proved is the architecture, which is the same in all of these."""
    monkeypatch.setattr(run, "prove", lambda *args, **more: Proof("any", True, "groups"))


class Made:
    """A base and adapters over it."""

    def __init__(self, folder: Path, settings: dict[str, dict[str, Any]] = SETTINGS) -> None:
        self.folder = folder
        self.base = make_experts("llama", folder, count=1)["e0"]
        tiny_tokenizer().save_pretrained(self.base)
        named = enumerate(settings.items())
        self.paths = {n: write_adapter(folder / n, self.base, seed=number, **config) for number, (n, config) in named}

    @property
    def sources(self) -> dict[str, dict[str, str]]:
        return {name: {"source": str(path), "base": str(self.base)} for name, path in self.paths.items()}

    def merged(self, name: str = "bundle", **recipe: Any) -> Bundle:
        return merge({"experts": self.sources, "code": "factors", **recipe}, self.folder / name)

    def by_peft(self, name: str) -> torch.Tensor:
        return logits(by_peft(self.paths[name], self.base))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def bundle(made: Made) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "prove", lambda *args, **more: Proof("any", True, "groups"))
        return made.merged()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def answers(bundle: Bundle, experts: Any) -> torch.Tensor:
    with torch.no_grad():
        return load_model(bundle, device="cpu")(IDS, experts=experts).logits  # type: ignore[no-any-return]


@torch.no_grad()
def mean_by_hand(made: Made, names: list[str]) -> torch.Tensor:
    """The model whose every parameter is the mean of what PEFT makes of the adapters."""
    merged = [by_peft(made.paths[name], made.base).merge_and_unload().state_dict() for name in names]
    mean = {key: torch.stack([state[key] for state in merged]).mean(0) for key in merged[0]}
    model = transformers.AutoModelForCausalLM.from_pretrained(made.base)
    model.load_state_dict(mean)
    return logits(model.eval())


def test_experts_answer_as_peft_alone_and_together(made: Made, bundle: Bundle) -> None:
    together = answers(bundle, list(made.paths))
    for number, name in enumerate(made.paths):
        expected = made.by_peft(name)
        assert_close(answers(bundle, name), expected)
        assert_close(together[number], expected[number])


def test_the_average_is_the_mean_of_the_adapters(made: Made, bundle: Bundle) -> None:
    expected = mean_by_hand(made, list(made.paths))
    base = logits(transformers.AutoModelForCausalLM.from_pretrained(made.base).eval())
    assert float((expected - base).abs().max()) > 1e-2
    assert_close(answers(bundle, None), expected)
    assert_close(answers(bundle, [None, "a", None])[2], expected[2])
    assert_close(answers(bundle, {"a": 1, "b": 1, "c": 1}), expected)
    half = answers(bundle, {"average": 1, "a": 1})
    model = transformers.AutoModelForCausalLM.from_pretrained(made.base)
    one, mean = dense_state(bundle, "a"), dense_state(bundle, None)
    model.load_state_dict({key: (one[key] + mean[key]) / 2 for key in one})
    assert_close(half, logits(model.eval()))


def test_the_base_and_the_factors_are_the_adapters_own(made: Made, bundle: Bundle) -> None:
    base = load_file(made.base / "model.safetensors")
    for layer in bundle.manifest.layers:
        assert torch.equal(bundle.base_tensor(layer.tensor), base[layer.tensor])
    stored = load_file(made.paths["a"] / ADAPTER_FILE)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    kept = adapter_of(bundle, "a")
    assert torch.equal(kept["model.layers.0.self_attn.q_proj.lora_A.weight"], stored[f"{module}.lora_A.weight"])
    scaled = 8 / 3 * stored[f"{module}.lora_B.weight"]
    assert torch.equal(kept["model.layers.0.self_attn.q_proj.lora_B.weight"], scaled)
    assert bundle.layers[Q].base == "adapters" and bundle.layers[Q].ranks == {"a": 3, "b": 4, "c": 2}
    assert bundle.layers[UP].ranks == {"a": 3, "c": 2}
    assert bundle.manifest.format_version == 5 and bundle.manifest.scale_ratio_range == (1.0, 1.0)


def test_it_is_no_larger_than_base_and_adapters(made: Made, bundle: Bundle) -> None:
    numbers = lambda folder: sum(t.numel() for f in folder.glob("*.safetensors") for t in load_file(f).values())  # noqa: E731
    apart = numbers(made.base) + sum(numbers(path) for path in made.paths.values())
    assert numbers(bundle.path) + sum(numbers(bundle.expert_folder(name)) for name in bundle.experts) == apart
    assert not any((bundle.expert_folder(name) / "scales.safetensors").exists() for name in bundle.experts)
    plan = plan_merge({"experts": made.sources, "code": "factors"})
    assert plan.write_bytes == 4 * apart
    assert bundle.sizes().total < 4 * apart + 300 * 200  # headers; these tensors are tiny


def test_what_is_measured_is_nothing(bundle: Bundle) -> None:
    inspected = inspect_bundle(bundle)
    assert inspected.energy_kept == pytest.approx(1.0, abs=1e-12)
    assert all(expert.relative_error < 1e-7 and expert.lost_by_averaging > 0.01 for expert in inspected.experts)
    assert inspected.rank_range == (2, 6) and inspected.storage["low_rank"] == 14


def test_it_verifies_against_its_sources(bundle: Bundle) -> None:
    result = verify(bundle, sources=True)
    assert result.problems == [] and all(check.worst_error < 1e-6 for check in result.sources)


def test_plain_peft_reads_it_and_exports_are_exact(made: Made, bundle: Bundle, tmp_path: Path) -> None:
    expected = made.by_peft("b")
    export = export_peft(bundle, "b", tmp_path / "peft")
    assert export.dropped_ratio_error == 0.0 and export.compression_error < 1e-7
    for folder in (bundle.path / "experts" / "b", tmp_path / "peft"):
        base = transformers.AutoModelForCausalLM.from_pretrained(bundle.path)
        assert_close(logits(PeftModel.from_pretrained(base, folder).eval()), expected)
    export_dense(bundle, "b", tmp_path / "dense")
    assert_close(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()), expected)


def test_vllm_gets_the_average_and_what_the_experts_have_beyond_it(made: Made, bundle: Bundle, tmp_path: Path) -> None:
    plan = plan_vllm(bundle)
    assert plan.max_lora_rank == 16  # 3 + 4 + 2 in one layer
    export = write_vllm(plan, tmp_path / "vllm", samples=[CalibrationPrompt("w5 w6 w7")], device="cpu")
    served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "vllm").eval()
    assert_close(logits(served), mean_by_hand(made, list(made.paths)))
    for name in made.paths:
        assert export.note.experts[name].kl < 1e-6 < 1e-3 < export.note.experts[name].kl_unfolded
        with applied(served, read_adapter(load_file(tmp_path / "vllm" / "adapters" / name / ADAPTER_FILE))):
            torch.testing.assert_close(logits(served), made.by_peft(name), rtol=0, atol=1e-4)


def test_the_published_way_is_one_word_away(made: Made) -> None:
    published = made.merged("published", adapters="average")
    assert published.manifest.format_version == 1
    assert {layer.base for layer in published.manifest.layers} == {"average"}
    assert not torch.equal(published.base_tensor(Q), load_file(made.base / "model.safetensors")[Q])


@pytest.mark.parametrize("code", ["int8", "int4"])
def test_a_code_has_the_adapters_ranks(made: Made, code: str) -> None:
    coded = made.merged(code, code=code)
    assert coded.layers[Q].ranks == {"a": 3, "b": 4, "c": 2}
    assert verify(coded, sources=True).problems == []
    near = answers(coded, "a") - made.by_peft("a")
    assert 1e-6 < float(near.norm() / made.by_peft("a").norm()) < 0.1


def test_the_adapters_dtype_is_kept_and_the_bases_too(tmp_path: Path) -> None:
    made = Made(tmp_path)
    for file in made.base.glob("*.safetensors"):
        save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, {"format": "pt"})
    half = made.paths["b"] / ADAPTER_FILE
    save_file({k: v.half() for k, v in load_file(half).items()}, half, {"format": "pt"})
    bundle = made.merged()
    kinds = {name: {tensor.dtype for tensor in adapter_of(bundle, name).values()} for name in bundle.experts}
    assert kinds == {"a": {torch.float32}, "b": {torch.float16}, "c": {torch.float32}}
    assert bundle.base_tensor(Q).dtype == torch.bfloat16
    assert verify(bundle, sources=True).problems == []
    model = by_peft(made.paths["a"], made.base).float()
    assert_close(answers(bundle, "a"), logits(model))


def test_a_dora_layer_goes_the_general_way_and_the_others_stay_exact(tmp_path: Path) -> None:
    settings = {n: {"r": 2, "target_modules": ["q_proj", "up_proj"]} for n in "ab"}
    made = Made(tmp_path, settings)
    config = made.paths["b"] / "adapter_config.json"
    write_adapter(made.paths["b"], made.base, seed=5, r=2, target_modules=["q_proj"], use_dora=True)
    assert json.loads(config.read_text())["use_dora"]
    bundle = made.merged(compress_rate=0.5)
    assert bundle.layers[Q].base == "average" and bundle.layers[UP].base == "adapters"
    assert verify(bundle, sources=True).problems == []
    whole = made.merged("whole", compress_rate=0.0)
    assert_close(answers(whole, "b"), made.by_peft("b"))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_begins_in_the_base_is_exact_at_twice_the_rank(start: str, tmp_path: Path) -> None:
    made = Made(tmp_path, {n: {"r": 2, "target_modules": ["q_proj"]} for n in "ab"})
    write_adapter(made.paths["b"], made.base, seed=5, r=2, target_modules=["q_proj"], init_lora_weights=start)
    bundle = made.merged()
    assert bundle.layers[Q].ranks == {"a": 2, "b": 4}
    assert_close(answers(bundle, "b"), made.by_peft("b"))
    assert verify(bundle, sources=True).problems == []


def test_the_base_itself_may_be_an_expert(made: Made) -> None:
    sources = {"plain": str(made.base), **made.sources}
    bundle = merge({"experts": sources, "code": "factors"}, made.folder / "with-base")
    assert bundle.layers[Q].base == "adapters" and "plain" not in bundle.layers[Q].ranks
    assert_close(answers(bundle, "plain"), logits(transformers.AutoModelForCausalLM.from_pretrained(made.base).eval()))
    assert verify(bundle, sources=True).problems == []


def test_adapters_over_two_models_go_the_general_way(tmp_path: Path) -> None:
    one, other = Made(tmp_path / "one"), Made(tmp_path / "other")
    tensors = load_file(other.base / "model.safetensors")
    save_file({k: 1.01 * v for k, v in tensors.items()}, other.base / "model.safetensors", {"format": "pt"})
    plan = plan_merge({"experts": {"a": one.sources["a"], "b": other.sources["b"]}, "code": "factors"})
    assert {task.base for task in plan.tasks} == {"average"}


def test_bases_that_differ_between_the_samples_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Made(tmp_path / "one"), Made(tmp_path / "other")
    tensors = load_file(other.base / "model.safetensors")
    tensors[Q][3, 4] += 1
    save_file(tensors, other.base / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("polymerge.merging.foundation._same_weights", lambda *bases: True)
    with pytest.raises(SourceError, match=r"q_proj.*adapters: average"):
        merge({"experts": {"a": one.sources["a"], "b": other.sources["b"]}, "code": "factors"}, tmp_path / "bundle")


class TestGrowing:
    """The average is that of the experts that the bundle holds now."""

    def test_an_adapter_is_added_exactly_and_removed(self, tmp_path: Path) -> None:
        made = Made(tmp_path)
        first = {name: made.sources[name] for name in "ab"}
        merge({"experts": first, "code": "factors"}, tmp_path / "bundle")
        added = add_expert(tmp_path / "bundle", "c", made.paths["c"], base=str(made.base))
        assert added.relative_error < 1e-7 and added.fresh_relative_error == 0.0
        bundle = added.bundle
        assert bundle.layers[Q].ranks == {"a": 3, "b": 4, "c": 2}
        for name in "abc":
            assert_close(answers(bundle, name), made.by_peft(name))
        assert_close(answers(bundle, None), mean_by_hand(made, ["a", "b", "c"]))
        assert verify(bundle, sources=True).problems == []
        bundle = remove_expert(bundle, "a")
        assert bundle.layers[Q].ranks == {"b": 4, "c": 2}
        assert_close(answers(bundle, None), mean_by_hand(made, ["b", "c"]))
        assert_close(answers(bundle, "c"), made.by_peft("c"))
        assert verify(bundle, sources=True).problems == []

    def test_a_full_fine_tune_is_added_against_the_base(self, made: Made, tmp_path: Path) -> None:
        base = transformers.AutoModelForCausalLM.from_pretrained(made.base)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        base.save_pretrained(tmp_path / "full")
        bundle = made.merged("grown", compress_rate=0.2)
        bundle = add_expert(bundle, "full", tmp_path / "full").bundle
        layer = bundle.layers[Q]
        residual = load_file(tmp_path / "full" / "model.safetensors")[Q] - bundle.base_tensor(Q)
        best = torch.linalg.svdvals(residual.double())[layer.rank :].norm()
        error = (bundle.reconstruct("full", Q) - bundle.base_tensor(Q) - residual).norm()
        assert 0 < float(error) <= 1.02 * float(best) and layer.ranks["full"] == layer.rank
        assert_close(answers(bundle, "a"), made.by_peft("a"))
        assert verify(bundle, sources=True).problems == []


def test_the_plan_says_where_plain_multi_lora_would_do(made: Made, bundle: Bundle) -> None:
    words = "plain multi-LoRA would do"
    assert any(words in note for note in plan_merge({"experts": made.sources, "code": "factors"}).notes)
    full = {"experts": {**made.sources, "full": str(made.base)}, "code": "factors"}
    assert not any(words in note for note in plan_merge(full).notes)
    assert any(words in note for note in bundle.manifest.notes)


def other_factors(right: Any, over: Any, code: Any) -> Any:
    made = right(over, code)
    return made and (made[0], {suffix: 1.01 * part for suffix, part in made[1].items()}, made[2])


def fewer(right: Any, over: Any, code: Any) -> Any:
    made = right(over, code)
    return made and (made[0], {s: p[:, :-1] if "B" in s else p[:-1] for s, p in made[1].items()}, made[2])


def shifted_base(right: Any, task: Any, sums: Any) -> Any:
    return right(task, sums) + 1e-3


@pytest.mark.parametrize(
    ("function", "broken", "words"),
    [
        ("coded_adapter", other_factors, ("'a'", Q)),
        ("coded_adapter", fewer, ("'a'", Q)),
        ("_base", shifted_base, ("'a'", Q)),
    ],
)
def test_a_wrong_bundle_is_named(
    function: str, broken: Callable[..., Any], words: tuple[str, ...], made: Made, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        right = getattr(adapters, function)
        patch.setattr(adapters, function, lambda *args: broken(right, *args))
        wrong = merge({"experts": made.sources, "code": "factors"}, tmp_path / "wrong")
    problems = verify(wrong, sources=True).problems
    assert any(all(word in problem for word in words) for problem in problems), problems
