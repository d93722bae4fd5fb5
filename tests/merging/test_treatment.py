"""Who fits whom, for merge, add and verify alike; which tensor is which; how each is stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from polymerge import Bundle, add_expert, load_model, load_recipe, merge, verify
from polymerge.bundle.adapter import adapter_of
from polymerge.errors import PolymergeError, SourceError
from polymerge.merging.frame import Expert, Frame, check_settings, frame_of, frame_of_bundle, names_in
from polymerge.merging.treatment import tasks_for, treatment_of
from polymerge.recipe.merge import Recipe
from polymerge.sources.layers import LayerRecord, map_layers
from polymerge.sources.opening import open_checkpoint
from polymerge.sources.persona import persona_of
from tests.killed import content
from tests.tiny import COMMON, make_experts

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {**COMMON, "num_hidden_layers": 1}
WEIGHTS = "model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BUFFER = "model.layers.0.self_attn.value_head"
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **changes: LlamaConfig(**{**SMALL, **changes}),
    "mixtral": lambda **changes: MixtralConfig(
        **{**SMALL, "hidden_size": 16, "intermediate_size": 24, "num_local_experts": 2, **changes}
    ),
}  # fmt: skip


class Case:
    """A folder with three good experts, e0 to e2, for a row of the table to spoil e2, or what is beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def replace(self, architecture: str = "llama", **config: Any) -> None:
        """Another model in e2's place."""
        shutil.rmtree(self.folder / "e2")
        made = CONFIGS[architecture](**config) if architecture in CONFIGS else None
        make_experts(architecture, self.folder, count=1, seed=9, config=made)["e0"].rename(self.folder / "e2")

    def settings(self, *folders: str, **changes: Any) -> None:
        for folder in folders or ("e2",):
            file = self.folder / folder / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], object], *folders: str) -> None:
        for folder in folders or ("e2",):
            file = self.folder / folder / WEIGHTS
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, {"format": "pt"})

    def value(self, name: str, value: float) -> None:
        self.tensors(lambda tensors: tensors[name].view(-1)[5].fill_(value))

    def buffer(self, *values: torch.Tensor | None) -> None:
        """A tensor that the architecture does not know, in e0, e1 and e2."""
        for folder, value in zip(("e0", "e1", "e2"), values, strict=True):
            if value is not None:
                self.tensors(lambda tensors, value=value: tensors.update({BUFFER: value}), folder)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("originals")
    return {name: make_experts(name, folder, config=config()) for name, config in CONFIGS.items()}


def case_of(originals: dict[str, Path], folder: Path) -> Case:
    for name, path in originals.items():
        shutil.copytree(path, folder / name)
    return Case(folder)


@pytest.fixture
def case(originals: dict[str, dict[str, Path]], tmp_path: Path) -> Case:
    return case_of(originals["llama"], tmp_path)


def merged(folder: Path, *names: str, out: str = "bundle", **recipe: Any) -> Bundle:
    return merge({"experts": {name: str(folder / name) for name in names}, "code": "factors", **recipe}, folder / out)


def added(bundle: Bundle, folder: Path) -> Bundle:
    return add_expert(bundle, "e2", folder / "e2").bundle


def expert_in(folder: Path, name: str) -> Expert:
    checkpoint = open_checkpoint(str(folder / name))
    return Expert(name, checkpoint, map_layers(checkpoint))


ones = torch.arange(1.0, 7.0)
# What makes an expert unfit, and the words of the refusal.
UNFIT: dict[str, tuple[Callable[[Case], object], list[str]]] = {
    "architecture": (
        lambda c: c.replace("gpt2"), ["'e2'", "different architectures", "LlamaForCausalLM", "GPT2LMHeadModel"]
    ),
    "model type": (lambda c: c.settings(model_type="mistral"), ["'e2'", "differ in model_type: llama and mistral"]),
    "attention heads": (
        lambda c: c.settings(num_attention_heads=8, num_key_value_heads=4, head_dim=6),
        ["'e2'", "differ in num_attention_heads: 4 and 8"],
    ),
    "key and value heads": (
        lambda c: c.replace(num_key_value_heads=4), ["'e2'", "differ in num_key_value_heads: 2 and 4"]
    ),
    "head width": (lambda c: c.replace(head_dim=24), ["'e2'", "differ in head_dim: 12 and 24"]),
    "activation": (lambda c: c.settings(hidden_act="gelu"), ["'e2'", "differ in hidden_act: silu and gelu"]),
    "width": (
        lambda c: c.replace(intermediate_size=96), ["'e2'", "differ in shape", "mlp", "[80, 48] and [96, 48]"]
    ),
    "more layers": (
        lambda c: c.replace(num_hidden_layers=2), ["lacks tensors that expert 'e2' has: model.layers.1.", "more"]
    ),
    "a bias more": (
        lambda c: c.replace(attention_bias=True), ["'e2'", "differ in attention_bias: False and True"]
    ),
    "a tensor of its own is missing": (lambda c: c.tensors(lambda t: t.pop(Q0)), ["e2", f"'{Q0}'", "missing"]),
    "a shape is not its configuration's": (
        lambda c: c.tensors(lambda t: t.update({Q0: torch.ones(50, 48)})), ["e2", Q0, "[50, 48]", "[48, 48]"]
    ),
    "int8": (
        lambda c: c.tensors(lambda t: t.update({Q0: torch.ones(48, 48, dtype=torch.int8)})),
        ["'e2'", f"'{Q0}'", "I8", "dequantised first"],
    ),
    "float8": (
        lambda c: c.tensors(lambda t: t.update({EMBEDDING: torch.ones(96, 48).to(torch.float8_e4m3fn)})),
        ["'e2'", f"'{EMBEDDING}'", "F8_E4M3", "dequantised first"],
    ),
    "an unknown tensor more": (
        lambda c: c.buffer(None, None, ones), ["lacks tensors that expert 'e2' has", BUFFER]
    ),
    "an unknown tensor less": (
        lambda c: c.buffer(ones, ones, None), ["expert 'e2' lacks tensors", BUFFER]
    ),
    "an unknown tensor of another shape": (
        lambda c: c.buffer(ones, ones, ones[:5].clone()), ["'e2'", f"{BUFFER} [6] and [5]"]
    ),
    "an unknown tensor of another value": (
        lambda c: c.buffer(ones, ones, ones * 1.1), ["'e2'", f"'{BUFFER}'", "unknown to its architecture and differs"]
    ),
    "NaN": (lambda c: c.value(Q0, float("nan")), ["'e2'", f"'{Q0}'", "1 NaN or infinite"]),
    "infinity in a norm": (
        lambda c: c.value("model.norm.weight", float("inf")), ["'e2'", "'model.norm.weight'", "1 NaN or infinite"]
    ),
}  # fmt: skip


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(SourceError) as refused:
        work()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def assert_has(text: str, words: list[str]) -> None:
    assert not [word for word in words if word not in text], text


@pytest.mark.parametrize("row", UNFIT)
def test_add_refuses_what_merge_refuses_and_verify_says_so(case: Case, row: str) -> None:
    spoil, words = UNFIT[row]
    spoil(case)
    assert_has(refusal(lambda: merged(case.folder, "e0", "e2", out="refused")), words)
    assert not (case.folder / "refused").exists()
    bundle = merged(case.folder, "e0", "e1", compress_rate=0.5)
    before = content(bundle.path)
    assert_has(refusal(lambda: added(bundle, case.folder)), words)
    assert content(bundle.path) == before
    try:  # as if e2 were what e1 was made of
        problems = verify(bundle, source={"e1": str(case.folder / "e2")}).problems
    except PolymergeError as error:
        problems = [str(error)]
    assert problems and "e2" in problems[0] and not [problem for problem in problems if "\n" in problem]


def test_the_number_of_experts_a_token_takes_is_refused_alike(
    originals: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    case, words = case_of(originals["mixtral"], tmp_path), ["'e2'", "differ in num_experts_per_tok: 2 and 1"]
    case.settings(num_experts_per_tok=1)
    assert_has(refusal(lambda: merged(tmp_path, "e0", "e2", out="refused")), words)
    bundle = merged(tmp_path, "e0", "e1")
    assert_has(refusal(lambda: added(bundle, tmp_path)), words)


def test_a_refusal_names_the_bundle_where_there_is_one(case: Case) -> None:
    case.settings(hidden_act="gelu")
    assert refusal(lambda: merged(case.folder, "e0", "e2")).startswith("expert 'e0' and expert 'e2' differ")
    bundle = merged(case.folder, "e0", "e1")
    assert refusal(lambda: added(bundle, case.folder)).startswith(f"the bundle {bundle.path} and expert 'e2' differ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}),
        ("rope_theta", 5e5),  # as files of older versions have it
        ("max_position_embeddings", 64),
    ],
)
def test_other_positions_are_held_by_merge_and_by_add_alike(case: Case, key: str, value: object) -> None:
    case.settings(**{key: value})
    if key == "rope_theta":
        case.settings(rope_parameters=None)
    plain = merged(case.folder, "e0", "e1")
    assert not beside_the_proof(plain) and not plain.manifest.experts["e1"].persona
    together = merged(case.folder, "e0", "e2", out="together")
    assert together.manifest.experts["e2"].persona == ("positions",)
    assert "the average has what 'e0' has" in together.manifest.notes[0]
    grown = add_expert(plain, "e2", case.folder / "e2")
    assert grown.persona == ("positions",) == grown.bundle.manifest.experts["e2"].persona
    kept = [b.persona("e2") for b in (together, grown.bundle)]
    assert kept[0].positions == kept[1].positions == persona_of(open_checkpoint(str(case.folder / "e2"))).positions


def beside_the_proof(bundle: Bundle) -> list[str]:
    return [note for note in bundle.manifest.notes if not note.startswith("proved: ")]


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": None},  # the default is 48 / 4
        {"transformers_version": "4.40.0", "_name_or_path": "somewhere", "torch_dtype": "float32"},
        {"attention_dropout": 0.3, "initializer_range": 0.1, "use_cache": False, "output_attentions": True},
        {"eos_token_id": 2, "unsloth_version": "2026.1", "pretraining_tp": 2, "id2label": {"0": "a"}},
    ],
)
def test_what_cannot_matter_is_no_difference(case: Case, change: dict[str, Any]) -> None:
    case.settings(**change)
    bundle = merged(case.folder, "e0", "e2")
    assert not bundle.manifest.experts["e2"].persona and not beside_the_proof(bundle)


@pytest.mark.parametrize(
    ("architecture", "key", "values"),
    [
        ("llama", "rms_norm_eps", (1e-6, 1e-3)),
        ("llama", "hidden_act", ("silu", "relu")),
        ("qwen3-moe", "norm_topk_prob", (True, False)),
        ("mistral", "sliding_window", (None, 8)),
        ("gemma3", "query_pre_attn_scalar", (256, 64)),
        ("gemma3", "final_logit_softcapping", (None, 30.0)),
    ],
)
def test_every_setting_that_changes_a_forward_pass_is_refused_with_both_values(
    tmp_path: Path, architecture: str, key: str, values: tuple[Any, Any]
) -> None:
    experts = make_experts(architecture, tmp_path)
    for number, path in enumerate(experts.values()):
        path.rename(tmp_path / f"e{number}")
    case = Case(tmp_path)
    case.settings("e0", "e1", **{key: values[0]})
    case.settings("e2", **{key: values[1]})
    words = ["'e2'", f"differ in {key}: {values[0]} and {values[1]}"]
    assert_has(refusal(lambda: merged(tmp_path, "e0", "e2")), words)
    bundle = merged(tmp_path, "e0", "e1")
    assert_has(refusal(lambda: added(bundle, tmp_path)), words)
    result = verify(bundle, source={"e1": str(tmp_path / "e2")})
    assert_has(" ".join(result.problems), [f"differ in {key}"])


def test_unknown_tensors_that_agree_are_stored_once_and_a_coarser_type_is_the_same(case: Case) -> None:
    case.buffer(ones / 3, ones / 3, (ones / 3).bfloat16())
    bundle = added(merged(case.folder, "e0", "e1"), case.folder)
    assert torch.equal(bundle.base_tensor(BUFFER), ones / 3)
    assert not [key for name in bundle.experts for key in adapter_of(bundle, name) if "value_head" in key]
    assert verify(bundle, sources=True).problems == []
    load_model(bundle)


def test_an_expert_of_another_dtype_is_added_in_the_bundles_as_if_the_recipe_had_said_it(case: Case) -> None:
    case.tensors(lambda tensors: tensors.update({name: value.bfloat16() for name, value in tensors.items()}))
    assert "`dtype:`" in refusal(lambda: merged(case.folder, "e0", "e2"))
    assert merged(case.folder, "e0", "e2", out="said", dtype="float32").manifest.dtype == "float32"
    grown = added(merged(case.folder, "e0", "e1", compress_rate=0.0), case.folder)
    assert grown.manifest.experts["e2"].dtype == "bfloat16"
    check = verify(grown, sources=True).sources[-1]
    assert check.exact == check.tensors


def tied_case(case: Case, *tied: bool) -> None:
    for number, (name, tie) in enumerate(zip(("e0", "e1", "e2"), tied, strict=True)):
        shutil.rmtree(case.folder / name)
        made = make_experts(
            "llama", case.folder, count=1, seed=number, config=CONFIGS["llama"](tie_word_embeddings=tie)
        )
        made["e0"].rename(case.folder / name)


def test_an_untied_expert_is_not_added_to_a_tied_bundle_where_its_head_would_be_lost(case: Case) -> None:
    tied_case(case, True, True, False)
    bundle = merged(case.folder, "e0", "e1", compress_rate=0.0)
    said = refusal(lambda: added(bundle, case.folder))
    assert_has(said, ["'e2'", "output head of its own", f"'{HEAD}'", str(bundle.path), "merge all of them anew"])
    assert verify(bundle, sources=True).ok
    anew = merged(case.folder, "e0", "e1", "e2", out="anew", compress_rate=0.0)
    assert torch.equal(anew.reconstruct("e2", HEAD), load_file(case.folder / "e2" / WEIGHTS)[HEAD])


@pytest.mark.parametrize("lm_head", ["keep", "average"])
def test_a_tied_expert_added_to_an_untied_bundle_has_its_embedding_as_head(case: Case, lm_head: str) -> None:
    tied_case(case, False, False, True)
    bundle = added(merged(case.folder, "e0", "e1", compress_rate=0.0, lm_head=lm_head), case.folder)
    assert verify(bundle, sources=True).problems == []
    if lm_head == "average":
        assert torch.equal(bundle.reconstruct("e2", HEAD), bundle.base_tensor(HEAD))
        return
    embedding = load_file(case.folder / "e2" / WEIGHTS)[EMBEDDING]
    assert torch.equal(bundle.reconstruct("e2", HEAD), embedding)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(case.folder / "e2")(ids).logits
        torch.testing.assert_close(load_model(bundle)(ids, experts="e2").logits, expected, atol=1e-5, rtol=0)


def test_a_head_that_is_stored_beside_the_embedding_that_it_is_tied_to_is_left_out(case: Case) -> None:
    tied_case(case, True, True, True)
    case.tensors(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}), "e0", "e2")
    for first, second in (("e0", "e1"), ("e1", "e0")):
        bundle = merged(case.folder, first, second, out=f"from-{first}", compress_rate=0.0)
        assert HEAD not in bundle.layers
        grown = added(bundle, case.folder)
        assert verify(grown, sources=True).problems == []


def without_prefix(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def test_names_may_differ_by_the_models_prefix(case: Case) -> None:
    """A checkpoint of a bare backbone leaves it out."""
    expected = {name: load_file(case.folder / name / WEIGHTS) for name in ("e0", "e1", "e2")}
    whole = merged(case.folder, "e0", "e1", "e2", out="whole", compress_rate=0.0)
    case.tensors(without_prefix)
    bare_last = merged(case.folder, "e0", "e1", "e2", out="last", compress_rate=0.0)
    for name in ("model.safetensors", "experts/e2/adapter_model.safetensors"):
        assert (bare_last.path / name).read_bytes() == (whole.path / name).read_bytes()
    grown = added(merged(case.folder, "e0", "e1", out="grown", compress_rate=0.0), case.folder)
    bare_first = merged(case.folder, "e2", "e0", "e1", out="first", compress_rate=0.0)
    for bundle, prefix in ((bare_last, "model."), (grown, "model."), (bare_first, "model.")):
        assert verify(bundle, sources=True).problems == []
        for name, tensors in expected.items():
            for tensor, value in tensors.items():
                key = prefix + tensor.removeprefix("model.") if tensor != HEAD else HEAD
                assert torch.equal(bundle.reconstruct(name, key), value), (name, tensor)


def test_a_bundles_frame_is_that_of_its_experts(case: Case) -> None:
    bundle = merged(case.folder, "e0", "e1")
    one, other = frame_of(expert_in(case.folder, "e0")), frame_of_bundle(bundle)
    assert dict(one.slots) == dict(other.slots)
    assert one.lm_head == other.lm_head == HEAD
    assert (one.label, other.label) == ("expert 'e0'", f"the bundle {bundle.path}")


def test_tasks_for_an_added_expert_are_the_merges(case: Case) -> None:
    recipe = load_recipe(
        {"experts": {"e0": "x", "e1": "y"}, "method": "published", "compress_rate": 0.5, "norms": "average"}
    )
    bundle = merged(case.folder, "e0", "e1", compress_rate=0.5, norms="average")
    experts = [expert_in(case.folder, name) for name in ("e0", "e1", "e2")]
    merging = tasks_for(frame_of(experts[0]), experts[:2], recipe)
    adding = tasks_for(frame_of_bundle(bundle), experts[2:], bundle.manifest.method)
    what = [(t.record, t.shape, t.treatment, t.rank, t.as_difference) for t in merging]
    assert [(t.record, t.shape, t.treatment, t.rank, t.as_difference) for t in adding] == what
    assert [task.sources for task in adding] == [{"e2": task.name} for task in merging]


def test_settings_that_agree_need_no_note(case: Case) -> None:
    first, second = (expert_in(case.folder, name) for name in ("e0", "e1"))
    check_settings(frame_of(first), second)
    assert names_in(frame_of(first), second) == {name: name for name in second.checkpoint.tensors}


def test_many_missing_tensors_are_counted(case: Case) -> None:
    expert = expert_in(case.folder, "e0")
    more = len(expert.checkpoint.tensors) - 1
    names = [name for name in expert.checkpoint.tensors if name != Q0 and name != HEAD]
    frame = Frame("small", case.folder, {}, {n: frame_of(expert).slots[n] for n in (Q0, HEAD)}, HEAD)
    said = refusal(lambda: names_in(frame, expert))
    assert said.endswith(f"expert 'e0' has: {', '.join(names[:3])} and {more - 1 - 3} more")


def record(role: Any, *, known: bool = True) -> LayerRecord:
    return LayerRecord("x.weight", "x", "weight", role, known=known)


def recipe(**settings: Any) -> Recipe:
    return load_recipe({"experts": {"a": "x", "b": "y"}, "method": "published", **settings})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"compress_rate": 0.95}, ("low_rank", 3)),  # floor(0.05 * 100 * 300 / 400)
        ({"compress_rate": 0.9}, ("low_rank", 7)),  # floor(7.5)
        ({"compress_rate": 0.99}, ("average", 0)),  # floor(0.75)
        ({"compress_rate": 1.0}, ("average", 0)),
        ({"compress_rate": 0.0}, ("full", 0)),  # rank 75 would be as large as the matrix
        ({"compress_rate": 0.02}, ("low_rank", 73)),
        ({"compress_rate": 0.01}, ("low_rank", 74)),
        # 3 * 400 * 2 bytes; a component takes 50 + 2 and 150 + 3 * 2 bytes in int4, 102 and 306 in int8
        ({"compress_rate": 0.95, "code": "int4"}, ("low_rank", 2400 // 208)),
        ({"compress_rate": 0.95, "code": "int8"}, ("low_rank", 2400 // 408)),
        ({"compress_rate": 0.99, "code": "int4"}, ("average", 0)),
        ({"compress_rate": 0.0, "code": "int4"}, ("full", 0)),
    ],
)
def test_storage_and_rank_of_a_linear_weight(settings: dict[str, Any], expected: tuple[str, int]) -> None:
    for shape in ((100, 300), (300, 100)):
        assert treatment_of(record("linear"), shape, recipe(**settings)) == expected


def test_within_one_rank_of_the_matrix_it_is_stored_whole() -> None:
    assert 75 * (101 + 300) < 101 * 300  # smaller, by less than a rank
    assert treatment_of(record("linear"), (101, 300), recipe(compress_rate=0.0)) == ("full", 0)


@pytest.mark.parametrize("role", ["embedding", "lm_head", "norm", "bias", "other"])
@pytest.mark.parametrize("setting", ["embeddings", "lm_head", "norms"])
def test_what_is_not_linear_is_kept_or_averaged_by_its_own_setting(role: str, setting: str) -> None:
    mine = {"embedding": "embeddings", "lm_head": "lm_head"}.get(role, "norms")
    expected = "average" if setting == mine else "keep"
    assert treatment_of(record(role), (100, 300), recipe(**{setting: "average"})) == (expected, 0)


def test_what_the_model_does_not_know_is_copied_whatever_its_form() -> None:
    for role, shape in (("linear", (100, 300)), ("other", ()), ("bias", (3,))):
        assert treatment_of(record(role, known=False), shape, recipe()) == ("copy", 0)
