"""LoRA adapters as sources, against PEFT's own `merge_and_unload` of the same adapter."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from polymerge import load_model, merge, verify
from polymerge.errors import PolymergeError, SourceError
from polymerge.recipe.source import Source
from polymerge.sources.checkpoint import Checkpoint
from polymerge.sources.opening import open_checkpoint
from tests.sources.peft_oracle import assert_answers_as_peft, by_peft, write_adapter
from tests.sources.reading import assert_reads_fresh
from tests.tiny import COMMON, make_experts, tiny_tokenizer

Checkpoints = Callable[[str], dict[str, Path]]
pytestmark = pytest.mark.filterwarnings("ignore")

QV = ["q_proj", "v_proj"]
EVERY_RANK = {"q_proj": 2, "layers.1.mlp.up_proj": 6, r".*layers\.0\.mlp\.gate_proj": 1}
EVERY_ALPHA = {"q_proj": 3, "^model.layers.0.mlp.down_proj": 5, "o_proj": 1}
CONV = ["c_attn", "c_proj", "c_fc"]


def assert_reads_as_peft(adapter: Path, base: Path, **options: Any) -> Checkpoint:
    """The answers are PEFT's, and rows are the same rows of the whole tensors."""
    checkpoint = assert_answers_as_peft(adapter, base, **options)
    for name in checkpoint.changed:  # type: ignore[attr-defined]
        if name in checkpoint.tensors:
            whole, middle = checkpoint.read(name), checkpoint.tensors[name].shape[0] // 2
            torch.testing.assert_close(
                checkpoint.read_rows(name, middle - 1, middle + 1), whole[middle - 1 : middle + 1]
            )
    return checkpoint


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        pytest.param("llama", {"target_modules": QV}, id="q and v"),
        pytest.param(
            "llama",
            {"target_modules": "all-linear", "rank_pattern": EVERY_RANK, "alpha_pattern": EVERY_ALPHA},
            id="all linear with patterns",
        ),
        pytest.param("llama", {"target_modules": QV, "use_rslora": True}, id="rank-stabilised"),
        pytest.param(
            "llama",
            {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": EVERY_RANK},
            id="rank-stabilised with patterns",
        ),
        pytest.param("llama", {"target_modules": QV, "modules_to_save": ["lm_head", "norm"]}, id="modules to save"),
        pytest.param("llama", {"target_modules": r".*layers\.1\..*(q|v)_proj"}, id="targets by a pattern"),
        pytest.param("llama", {"target_modules": QV, "layers_to_transform": [0]}, id="one layer"),
        pytest.param("qwen2", {"target_modules": QV}, id="layers with biases"),
        pytest.param("qwen2", {"target_modules": QV, "lora_bias": True}, id="biases of the factors"),
        pytest.param("llama", {"target_modules": "all-linear", "use_dora": True}, id="DoRA"),
        pytest.param("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, id="DoRA on a table"),
        pytest.param("gpt2", {"target_modules": CONV, "use_dora": True}, id="DoRA on Conv1D"),
        pytest.param("gpt2", {"target_modules": ["wte", "c_attn"], "use_dora": True}, id="DoRA on a tied table"),
        pytest.param("llama", {"target_modules": QV, "init_lora_weights": "pissa"}, id="PiSSA"),
        pytest.param("gpt2", {"target_modules": CONV, "init_lora_weights": "pissa"}, id="PiSSA on Conv1D"),
        pytest.param("llama", {"target_modules": QV, "init_lora_weights": "olora"}, id="OLoRA"),
        pytest.param("llama", {"target_modules": QV, "init_lora_weights": "olora", "use_dora": True}, id="both"),
        pytest.param("llama", {"target_modules": QV, "init_lora_weights": "orthogonal"}, id="an orthogonal start"),
        pytest.param("llama", {"target_modules": QV, "init_lora_weights": "mica"}, id="MiCA"),
        *(
            pytest.param(kind, {"target_modules": targets, "fan_in_fan_out": flag}, id=f"{kind}, {flag}")
            for kind, targets in (("gpt2", CONV), ("llama", QV))
            for flag in (True, False)
        ),
    ],
)  # fmt: skip
def test_an_adapter_answers_as_it_does_in_peft(
    checkpoints: Checkpoints, tmp_path: Path, architecture: str, config: dict[str, Any]
) -> None:
    base = checkpoints(architecture)["e0"]
    assert_reads_as_peft(write_adapter(tmp_path / "adapter", base, **config), base)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(("architecture", "targets"), [("gpt2", ["c_proj"]), ("llama", ["o_proj"])])
def test_the_modules_class_decides_and_not_a_flag_that_a_later_hand_turned(
    checkpoints: Checkpoints, tmp_path: Path, architecture: str, targets: list[str], flag: bool
) -> None:
    """PEFT corrects the flag when it writes one; square matrices would hide the mistake."""
    base = checkpoints(architecture)["e0"]
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=targets)
    edit(adapter / "adapter_config.json", fan_in_fan_out=flag)
    assert_reads_as_peft(adapter, base)


SAVED = [
    pytest.param("auto", id="saved by default"),
    pytest.param(True, id="saved"),
    pytest.param(False, id="not saved"),
]


@pytest.mark.parametrize("saved", SAVED, ids=["saved by default", "saved", "not saved"])
@pytest.mark.parametrize("ends", [["E"], ["lm_head"], ["E", "lm_head"]], ids="+".join)
@pytest.mark.parametrize("how", ["factors", "modules_to_save"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_changed_ends_answer_as_in_peft_also_where_the_base_ties_them(
    checkpoints: Checkpoints, tmp_path: Path, architecture: str, how: str, ends: list[str], saved: Any
) -> None:
    base = checkpoints(architecture)["e0"]
    table, inner = ("wte", ["c_attn"]) if architecture == "gpt2" else ("embed_tokens", QV)
    ends = [table if end == "E" else end for end in ends]
    config = (
        {"target_modules": inner + ends} if how == "factors" else {"target_modules": inner, "modules_to_save": ends}
    )
    adapter = write_adapter(tmp_path / "adapter", base, save_embedding_layers=saved, **config)
    checkpoint = assert_reads_as_peft(adapter, base)
    assert ("lm_head.weight" in checkpoint.tensors) and checkpoint.config["tie_word_embeddings"] is False


@pytest.mark.parametrize("saved", SAVED, ids=["saved by default", "saved", "not saved"])
@pytest.mark.parametrize("config", [{"target_modules": [*QV, "embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_ends_that_were_trained_together_stay_one_table(
    checkpoints: Checkpoints, tmp_path: Path, config: dict[str, Any], saved: Any
) -> None:
    base = checkpoints("llama-tied")["e0"]
    options = {"target_modules": QV, "ensure_weight_tying": True, **config}
    checkpoint = assert_reads_as_peft(
        write_adapter(tmp_path / "adapter", base, save_embedding_layers=saved, **options), base
    )
    assert checkpoint.config["tie_word_embeddings"] is True and "lm_head.weight" not in checkpoint.tensors


@pytest.mark.parametrize("saved", SAVED, ids=["saved by default", "saved", "not saved"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize(
    "rows",
    [[1, 5], {"E": [1, 5]}, {"lm_head": [1, 5]}, {"E": [1, 5], "lm_head": [5]}, {"E": [1, 5], "lm_head": [1, 5]}],
    ids=str,
)
def test_trained_tokens_answer_as_in_peft(
    checkpoints: Checkpoints, tmp_path: Path, architecture: str, rows: Any, saved: Any
) -> None:
    base = checkpoints(architecture)["e0"]
    table, inner = ("wte", ["c_attn"]) if architecture == "gpt2" else ("embed_tokens", QV)
    rows = {table if end == "E" else end: r for end, r in rows.items()} if isinstance(rows, dict) else rows
    adapter = write_adapter(
        tmp_path / "adapter", base, save_embedding_layers=saved, target_modules=inner, trainable_token_indices=rows
    )
    assert_reads_as_peft(adapter, base)


@pytest.mark.parametrize("size", [100, 90])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [1, 88]},
    ],
    ids=str,
)
def test_another_vocabulary_is_the_experts_own(
    checkpoints: Checkpoints, tmp_path: Path, architecture: str, size: int, config: dict[str, Any]
) -> None:
    """PEFT saves both tables of a resized model; it opens them on a base that is resized in the same way."""
    base = checkpoints(architecture)["e0"]
    adapter = write_adapter(tmp_path / "adapter", base, resize=size, target_modules=QV, task_type="CAUSAL_LM", **config)
    checkpoint = assert_reads_as_peft(adapter, base, resize=size)
    assert checkpoint.tensors["model.embed_tokens.weight"].shape == (size, 48)
    assert checkpoint.config["vocab_size"] == size
    assert json.loads((checkpoint.folder / "config.json").read_text())["vocab_size"] == size


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_one_resized_table_of_two_is_refused_with_the_way_out(
    checkpoints: Checkpoints, tmp_path: Path, architecture: str
) -> None:
    base = checkpoints(architecture)["e0"]
    adapter = write_adapter(
        tmp_path / "a", base, resize=100, save_embedding_layers=False, target_modules=QV,
        modules_to_save=["embed_tokens"],
    )  # fmt: skip
    message = refusal(Source(source=str(adapter), base=str(base)))
    assert "vocabulary" in message and "100" in message and "96" in message and "save_embedding_layers" in message


def test_factors_of_a_resized_table_without_the_table_are_refused_with_the_way_out(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    base = checkpoints("llama")["e0"]
    adapter = write_adapter(
        tmp_path / "a", base, resize=100, save_embedding_layers=False, target_modules=["embed_tokens"]
    )
    message = refusal(Source(source=str(adapter), base=str(base)))
    assert "[100, 48]" in message and "[96, 48]" in message and "vocabulary" in message


def moe_bases() -> dict[str, Any]:
    moe = {"num_experts_per_tok": 2, "num_local_experts": 4}
    return {
        "gpt-oss": transformers.GptOssConfig(**COMMON, **moe, head_dim=12),
        "llama4": transformers.Llama4TextConfig(
            **COMMON, **{**moe, "num_experts_per_tok": 1}, head_dim=12, intermediate_size_mlp=80,
            interleave_moe_layer_step=1,
        ),
    }  # fmt: skip


FUSED = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3-moe", "gpt-oss", "llama4"])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": QV, "target_parameters": FUSED},
        {"target_modules": [], "target_parameters": FUSED[1:], "use_rslora": True},
        {"target_modules": [], "target_parameters": FUSED, "alpha_pattern": {"experts.down_proj": 3}},
        {"target_modules": QV, "modules_to_save": ["experts"]},
    ],
    ids=["both", "one, rank-stabilised", "with a pattern", "experts of its own"],
)
def test_factors_of_fused_experts_answer_as_in_peft(
    checkpoints: Checkpoints, tmp_path: Path, architecture: str, config: dict[str, Any]
) -> None:
    """Stored as many matrices (Mixtral, Qwen) and fused (gpt-oss, Llama 4), as [E, out, in] and [E, in, out]."""
    moe_config = moe_bases().get(architecture)
    base = (
        make_experts(architecture, tmp_path, count=1, config=moe_config)["e0"]
        if moe_config
        else checkpoints(architecture)["e0"]
    )
    assert_reads_as_peft(write_adapter(tmp_path / "adapter", base, **config), base)


def test_everything_linear_of_a_mixture_answers_as_in_peft(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = checkpoints("mixtral")["e0"]
    assert_reads_as_peft(write_adapter(tmp_path / "adapter", base, target_modules="all-linear"), base)


def test_factors_of_single_experts_from_before_transformers_5_answer_as_in_peft(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    base = checkpoints("mixtral")["e0"]
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=QV)
    torch.manual_seed(3)
    tensors = {}
    for layer, expert, (name, rows, columns) in itertools.product(
        range(2), range(4), [("w1", 80, 48), ("w2", 48, 80), ("w3", 80, 48)]
    ):
        module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, columns) / 5
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 4) / 5
    save_file(tensors, adapter / "adapter_model.safetensors")
    edit(adapter / "adapter_config.json", target_modules=["w1", "w2", "w3"])
    checkpoint = assert_reads_as_peft(adapter, base)
    assert len(checkpoint.changed) == 24  # type: ignore[attr-defined]


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_what_peft_makes_of_them(checkpoints: Checkpoints, tmp_path: Path, bias: str) -> None:
    base = checkpoints("qwen2")["e0"]
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=QV, bias=bias)
    assert_reads_as_peft(adapter, base)


def test_an_adapter_of_a_bfloat16_base_is_within_one_rounding_of_the_exact_sum(tmp_path: Path) -> None:
    base = make_experts("llama", tmp_path, count=1, dtype=torch.bfloat16)["e0"]
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=QV)
    factors = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    exact = load_file(base / "model.safetensors")[f"{name}.weight"].double() + 6 / 4 * b @ a
    weight = open_checkpoint(Source(source=str(adapter), base=str(base))).read(f"{name}.weight")
    assert weight.dtype == torch.bfloat16
    assert bool(((weight.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all())


def test_a_merge_takes_adapters_and_full_checkpoints_side_by_side(checkpoints: Checkpoints, tmp_path: Path) -> None:
    experts = checkpoints("llama")
    adapter = write_adapter(tmp_path / "adapter", experts["e0"], target_modules=QV)
    sources = {"tuned": {"source": str(adapter), "base": str(experts["e0"])}, "full": str(experts["e1"])}
    bundle = merge({"experts": sources, "compress_rate": 0.0}, tmp_path / "bundle")
    for name, value in by_peft(adapter, experts["e0"]).merge_and_unload().state_dict().items():
        torch.testing.assert_close(bundle.reconstruct("tuned", name), value, rtol=1e-5, atol=1e-6)
    for name, value in load_file(experts["e1"] / "model.safetensors").items():
        assert torch.equal(bundle.reconstruct("full", name), value)


def refusal(source: Source) -> str:
    """The one line. Raised when the source is opened: before anything is merged."""
    with pytest.raises(SourceError) as caught:
        open_checkpoint(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3, 4]}, "alora"),
    ],
)
def test_what_is_more_than_a_low_rank_update_of_the_base_is_refused_by_name(
    checkpoints: Checkpoints, tmp_path: Path, config: dict[str, Any], word: str
) -> None:
    base = checkpoints("qwen2")["e0"]
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=QV, task_type="CAUSAL_LM", **config)
    message = refusal(Source(source=str(adapter), base=str(base)))
    assert str(adapter) in message and word in message, message


@pytest.mark.parametrize(
    "changes",
    [
        {"arrow_config": {"top_k": 2}},
        {"kasa_config": {"beta": 1}},
        {"use_qalora": True},
        {"use_something_new": True},
        {"something_new_config": {"a": 1}},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
    ],
    ids=str,
)
def test_variants_that_are_not_read_are_refused_by_name(adapter: Path, changes: dict[str, Any]) -> None:
    edit(adapter / "adapter_config.json", **changes)
    key, value = next(iter(changes.items()))
    message = refusal(Source(source=str(adapter)))
    assert key in message and (not isinstance(value, str) or value in message)


def test_settings_that_are_only_for_training_do_not_matter(adapter: Path) -> None:
    edit(adapter / "adapter_config.json", loftq_config={"a": 1}, eva_config={"rho": 2}, lora_dropout=0.3, unknown="x")
    open_checkpoint(adapter)


def test_dora_without_its_magnitudes_is_refused(adapter: Path) -> None:
    edit(adapter / "adapter_config.json", use_dora=True)
    message = refusal(Source(source=str(adapter)))
    assert "use_dora" in message and "q_proj" in message and "lora_magnitude_vector" in message


def test_a_bias_of_factors_on_a_layer_without_one_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.bias"
    save_file({**load_file(file), key: torch.zeros(24)}, file)
    message = refusal(Source(source=str(adapter)))
    assert "v_proj" in message and "bias" in message


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", "multimodal"),
        ("model.visual.blocks.0.attn.qkv", "multimodal"),
        ("model.layers.7.self_attn.q_proj", "is it the adapter's base?"),
    ],
)
def test_factors_without_a_place_say_what_they_are(adapter: Path, module: str, words: str) -> None:
    file = adapter / "adapter_model.safetensors"
    factors = {f"base_model.model.{module}.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    save_file({**load_file(file), **factors}, file)
    message = refusal(Source(source=str(adapter)))
    assert module in message and words in message and "LlamaForCausalLM" in message


def test_a_classifiers_head_says_what_it_is(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.score.weight": torch.zeros(2, 48)}, file)
    assert "head" in refusal(Source(source=str(adapter)))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_language_model_of_a_multimodal_class_is_the_language_model(
    adapter: Path, tmp_path: Path, prefix: str
) -> None:
    expected = open_checkpoint(adapter)
    file = adapter / "adapter_model.safetensors"
    renamed = {key.replace(".model.layers", f".{prefix}layers"): value for key, value in load_file(file).items()}
    assert len(set(renamed) & set(load_file(file))) == 0
    save_file(renamed, file)
    checkpoint = open_checkpoint(adapter)
    assert checkpoint.changed == expected.changed  # type: ignore[attr-defined]
    for name in expected.tensors:
        assert torch.equal(checkpoint.read(name), expected.read(name)), name


def test_a_multimodal_base_is_read_through_its_own_names(tmp_path: Path) -> None:
    text = {**COMMON, "head_dim": 12}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=False
    )
    base = make_experts("gemma3-mm", tmp_path, count=1, config=config)["e0"]
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=r".*language_model.*(q|v)_proj")
    assert all("language_model" in key for key in load_file(adapter / "adapter_model.safetensors"))
    assert_reads_as_peft(adapter, base)


def test_another_peft_method_is_refused_by_name(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = checkpoints("llama")["e0"]
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.IA3Config(target_modules=QV, feedforward_modules=[])).save_pretrained(
        tmp_path / "a"
    )
    assert "IA3" in refusal(Source(source=str(tmp_path / "a"), base=str(base)))


@pytest.fixture
def adapter(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A plain adapter that names its own base, a copy of e0."""
    base = tmp_path / "base"
    shutil.copytree(checkpoints("llama")["e0"], base)
    return write_adapter(tmp_path / "adapter", base, target_modules=QV)


def test_the_base_is_the_one_that_the_adapter_names(adapter: Path, tmp_path: Path) -> None:
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "base")
    checkpoint = open_checkpoint(adapter)
    expected = by_peft(adapter, tmp_path / "base").merge_and_unload().state_dict()
    for name in checkpoint.tensors:
        torch.testing.assert_close(checkpoint.read(name), expected[name], rtol=1e-5, atol=1e-6)


def test_the_recipes_base_goes_before_the_adapters_own(adapter: Path, checkpoints: Checkpoints) -> None:
    other = checkpoints("llama")["e1"]
    checkpoint = open_checkpoint(Source(source=str(adapter), base=str(other)))
    expected = by_peft(adapter, other).merge_and_unload().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(checkpoint.read(name), expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(
        checkpoint.read("model.norm.weight"), load_file(other / "model.safetensors")["model.norm.weight"]
    )


def test_a_base_that_is_named_but_gone_is_one_line_that_says_whose_it_is(adapter: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "base")
    message = refusal(Source(source=str(adapter)))
    assert str(tmp_path / "base") in message and str(adapter) in message and "base" in message, message


def test_an_adapter_without_a_base_says_what_to_write(adapter: Path) -> None:
    edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    message = refusal(Source(source=str(adapter)))
    assert str(adapter) in message and "`base:`" in message


def test_an_adapter_that_is_its_own_base_is_one_line(adapter: Path) -> None:
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    assert str(adapter) in refusal(Source(source=str(adapter)))


def test_another_models_adapter_is_refused_with_the_tensor(adapter: Path, checkpoints: Checkpoints) -> None:
    message = refusal(Source(source=str(adapter), base=str(checkpoints("gpt2")["e0"])))
    assert "q_proj" in message and "adapter_model.safetensors" in message


def test_an_adapter_for_another_size_is_refused_with_both_shapes(adapter: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                      vocab_size=96)  # fmt: skip
    base = make_experts("llama", tmp_path / "small", count=1, config=config)["e0"]
    message = refusal(Source(source=str(adapter), base=str(base)))
    assert "[48, 48]" in message and "[32, 32]" in message and "q_proj" in message


def test_half_an_adapter_is_refused_with_the_module(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight")
    save_file(tensors, file)
    message = refusal(Source(source=str(adapter)))
    assert "layers.1.self_attn.v_proj" in message and "one LoRA factor of two" in message


@pytest.mark.parametrize("form", ["another rank", "one dimension", "no dimension", "three dimensions"])
def test_a_factor_of_the_wrong_form_is_refused(adapter: Path, form: str) -> None:
    file = adapter / "adapter_model.safetensors"
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors = load_file(file)
    forms = {
        "another rank": tensors[key][:, :3].contiguous(),
        "one dimension": tensors[key].flatten(),
        "no dimension": torch.tensor(1.0),
        "three dimensions": tensors[key][:, :, None].contiguous(),
    }
    save_file({**tensors, key: forms[form]}, file)
    message = refusal(Source(source=str(adapter)))
    assert "v_proj" in message and file.name in message


@pytest.mark.parametrize("how", ["truncated", "missing", "pickle"])
def test_an_unreadable_adapter_file_is_named(adapter: Path, how: str) -> None:
    file = adapter / "adapter_model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        file.unlink()
    if how == "pickle":
        torch.save({}, adapter / "adapter_model.bin")
    assert file.name in refusal(Source(source=str(adapter)))


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": "many"},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"(": 3}},
        {"alpha_pattern": {"q_proj": "x"}},
        {"base_model_name_or_path": 7},
        {"peft_type": ["LORA"]},
    ],
    ids=str,
)
def test_a_damaged_adapter_configuration_is_one_line(adapter: Path, changes: dict[str, Any]) -> None:
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(PolymergeError) as caught:
        open_checkpoint(adapter)
    assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)


def test_the_fingerprint_changes_with_everything_that_changes_the_weights(adapter: Path) -> None:
    fingerprints = [open_checkpoint(adapter).fingerprint()]
    edit(adapter / "adapter_config.json", lora_alpha=60)
    fingerprints.append(open_checkpoint(adapter).fingerprint())
    file = adapter / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    fingerprints.append(open_checkpoint(adapter).fingerprint())
    base = Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    save_file({name: 2 * v for name, v in load_file(base / "model.safetensors").items()}, base / "model.safetensors")
    fingerprints.append(open_checkpoint(adapter).fingerprint())
    assert all(a != b for a, b in itertools.pairwise(fingerprints)), fingerprints


def test_what_is_read_is_the_readers_own_memory(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = checkpoints("qwen2")["e0"]
    adapter = write_adapter(
        tmp_path / "adapter", base, target_modules=QV, bias="all", modules_to_save=["embed_tokens", "lm_head"]
    )
    assert_reads_fresh(open_checkpoint(Source(source=str(adapter), base=str(base))))


def test_an_adapter_that_stands_first_is_not_overwritten_by_the_mean(checkpoints: Checkpoints, tmp_path: Path) -> None:
    experts = checkpoints("qwen2")
    adapter = write_adapter(
        tmp_path / "adapter", experts["e0"], target_modules=QV, bias="all", modules_to_save=["embed_tokens", "lm_head"]
    )
    sources = {"tuned": {"source": str(adapter), "base": str(experts["e0"])}, "full": str(experts["e1"])}
    bundle = merge({"experts": sources, "compress_rate": 0.0}, tmp_path / "bundle")
    original = by_peft(adapter, experts["e0"]).merge_and_unload().state_dict()
    for name in original:
        torch.testing.assert_close(bundle.reconstruct("tuned", name), original[name], rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(
            bundle.reconstruct("full", name), load_file(experts["e1"] / "model.safetensors")[name], rtol=1e-5, atol=1e-6
        )


def test_a_tokenizer_that_came_with_the_adapter_is_the_experts(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoints("llama")["e0"], base)
    tiny_tokenizer().save_pretrained(base)
    (base / "chat_template.jinja").write_text("the base's")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=QV)
    assert open_checkpoint(adapter).folder == base
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    folder = open_checkpoint(adapter).folder
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == len(tokenizer)
    assert not (folder / "chat_template.jinja").exists()
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 96
    assert not list(folder.glob("*.safetensors"))


def test_an_adapter_that_parts_the_ends_is_merged_beside_tied_experts(checkpoints: Checkpoints, tmp_path: Path) -> None:
    experts = checkpoints("llama-tied")
    adapter = write_adapter(
        tmp_path / "adapter", experts["e0"], target_modules=[*QV, "embed_tokens"], use_dora=True, r=2
    )
    sources = {"tied": str(experts["e1"]), "parted": {"source": str(adapter), "base": str(experts["e0"])}}
    bundle = merge({"experts": sources, "compress_rate": 0.0}, tmp_path / "bundle")
    assert verify(bundle, sources=True).ok
    model = load_model(bundle)
    ids = torch.randint(0, 96, (1, 9), generator=torch.Generator().manual_seed(2))
    tied = transformers.AutoModelForCausalLM.from_pretrained(experts["e1"]).eval()
    for name, original in (("tied", tied), ("parted", by_peft(adapter, experts["e0"]))):
        with torch.no_grad():
            answer, expected = model(input_ids=ids, experts=[name]).logits, original(input_ids=ids).logits
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_a_table_of_an_unknown_architecture_may_be_its_head_too(
    checkpoints: Checkpoints, tmp_path: Path, config: dict[str, Any]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoints("llama-tied")["e0"], base)
    adapter = write_adapter(tmp_path / "adapter", base, **{"target_modules": QV, **config})
    edit(base / "config.json", model_type="of-nobody")
    assert "may be the head" in refusal(Source(source=str(adapter), base=str(base)))
