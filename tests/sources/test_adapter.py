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
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from polymerge import merge
from polymerge.errors import PolymergeError, SourceError
from polymerge.recipe.merge import Source
from polymerge.sources.opening import open_checkpoint
from tests.tiny import make_experts

Checkpoints = Callable[[str], dict[str, Path]]
pytestmark = pytest.mark.filterwarnings("ignore")

QV = ["q_proj", "v_proj"]
EVERY_RANK = {"q_proj": 2, "layers.1.mlp.up_proj": 6, r".*layers\.0\.mlp\.gate_proj": 1}
EVERY_ALPHA = {"q_proj": 3, "^model.layers.0.mlp.down_proj": 5, "o_proj": 1}
CONV = ["c_attn", "c_proj", "c_fc"]


def write_adapter(folder: Path, base: Path, *, save_embedding_layers: Any = "auto", **config: Any) -> Path:
    """PEFT's own file of an adapter whose every parameter is trained away from where it started."""
    torch.manual_seed(7)
    settings = LoraConfig(**{"r": 4, "lora_alpha": 6, **config})
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder


def merged_by_peft(adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
    found: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return found


def assert_equals_peft(adapter: Path, base: Path, *, at_least: int) -> None:
    """Tensor by tensor, whole and in rows; and the adapter does change as many tensors as it should."""
    expected = merged_by_peft(adapter, base)
    untouched = load_file(base / "model.safetensors")
    checkpoint = open_checkpoint(Source(source=str(adapter), base=str(base)))
    assert set(checkpoint.tensors) == set(untouched)
    changed = 0
    for name in checkpoint.tensors:
        torch.testing.assert_close(checkpoint.read(name), expected[name], rtol=1e-5, atol=1e-6, msg=name)
        middle = expected[name].shape[0] // 2
        rows = checkpoint.read_rows(name, middle - 1, middle + 1)
        torch.testing.assert_close(rows, expected[name][middle - 1 : middle + 1], rtol=1e-5, atol=1e-6, msg=name)
        changed += not torch.equal(untouched[name], expected[name])
    assert changed >= at_least


@pytest.mark.parametrize(
    ("architecture", "at_least", "config"),
    [
        pytest.param("llama", 4, {"target_modules": QV}, id="q and v"),
        pytest.param(
            "llama",
            14,
            {"target_modules": "all-linear", "rank_pattern": EVERY_RANK, "alpha_pattern": EVERY_ALPHA},
            id="all linear with patterns",
        ),
        pytest.param("llama", 4, {"target_modules": QV, "use_rslora": True}, id="rank-stabilised"),
        pytest.param(
            "llama",
            14,
            {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": EVERY_RANK},
            id="rank-stabilised with patterns",
        ),
        pytest.param("llama", 10, {"target_modules": QV, "modules_to_save": ["lm_head", "norm"]}, id="modules to save"),
        pytest.param("llama-tied", 5, {"target_modules": QV, "modules_to_save": ["embed_tokens"]}, id="tied embedding"),
        pytest.param("llama", 2, {"target_modules": r".*layers\.1\..*(q|v)_proj"}, id="targets by a pattern"),
        pytest.param("llama", 2, {"target_modules": QV, "layers_to_transform": [0]}, id="one layer"),
        pytest.param("qwen2", 4, {"target_modules": QV}, id="layers with biases"),
        pytest.param("gpt2", 8, {"target_modules": CONV, "fan_in_fan_out": True}, id="Conv1D"),
        pytest.param("gpt2", 8, {"target_modules": CONV, "fan_in_fan_out": False}, id="Conv1D, corrected by PEFT"),
    ],
)  # fmt: skip
def test_an_adapter_is_what_peft_makes_of_it(
    checkpoints: Checkpoints, tmp_path: Path, architecture: str, at_least: int, config: dict[str, Any]
) -> None:
    base = checkpoints(architecture)["e0"]
    assert_equals_peft(write_adapter(tmp_path / "adapter", base, **config), base, at_least=at_least)


@pytest.mark.parametrize("saved", [False, "auto"], ids=["factors only", "with the table, PEFT's default"])
@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("llama", ["embed_tokens", "q_proj"]), ("llama", ["lm_head", "q_proj"]), ("gpt2", ["wpe", "c_attn"])],
)
def test_embeddings_and_heads_with_factors_are_what_peft_makes_of_them(
    checkpoints: Checkpoints, tmp_path: Path, architecture: str, targets: list[str], saved: object
) -> None:
    base = checkpoints(architecture)["e0"]
    fan = architecture == "gpt2"
    adapter = write_adapter(
        tmp_path / "adapter", base, target_modules=targets, fan_in_fan_out=fan, save_embedding_layers=saved
    )
    assert_equals_peft(adapter, base, at_least=3)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_what_peft_makes_of_them(checkpoints: Checkpoints, tmp_path: Path, bias: str) -> None:
    base = checkpoints("qwen2")["e0"]
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=QV, bias=bias)
    assert_equals_peft(adapter, base, at_least=8)


def test_an_adapter_of_a_bfloat16_base_is_within_one_rounding_of_the_exact_sum(tmp_path: Path) -> None:
    base = make_experts("llama", tmp_path, count=1, dtype=torch.bfloat16)["e0"]
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=QV)
    factors = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    exact = load_file(base / "model.safetensors")[f"{name}.weight"].double() + 6 / 4 * b @ a
    found = open_checkpoint(Source(source=str(adapter), base=str(base))).read(f"{name}.weight")
    assert found.dtype == torch.bfloat16
    assert bool(((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all())


def test_a_merge_takes_adapters_and_full_checkpoints_side_by_side(checkpoints: Checkpoints, tmp_path: Path) -> None:
    experts = checkpoints("llama")
    adapter = write_adapter(tmp_path / "adapter", experts["e0"], target_modules=QV)
    sources = {"tuned": {"source": str(adapter), "base": str(experts["e0"])}, "full": str(experts["e1"])}
    bundle = merge({"experts": sources, "compress_rate": 0.0}, tmp_path / "bundle")
    for name, value in merged_by_peft(adapter, experts["e0"]).items():
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
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
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


def test_factors_of_fused_mixture_parameters_are_refused_by_name(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = checkpoints("mixtral")["e0"]
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    message = refusal(Source(source=str(write_adapter(tmp_path / "adapter", base, **targets)), base=str(base)))
    assert "target_parameters" in message


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
    expected = merged_by_peft(adapter, tmp_path / "base")
    for name in checkpoint.tensors:
        torch.testing.assert_close(checkpoint.read(name), expected[name], rtol=1e-5, atol=1e-6)


def test_the_recipes_base_goes_before_the_adapters_own(adapter: Path, checkpoints: Checkpoints) -> None:
    other = checkpoints("llama")["e1"]
    checkpoint = open_checkpoint(Source(source=str(adapter), base=str(other)))
    expected = merged_by_peft(adapter, other)
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
    found = [open_checkpoint(adapter).fingerprint()]
    edit(adapter / "adapter_config.json", lora_alpha=60)
    found.append(open_checkpoint(adapter).fingerprint())
    file = adapter / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    found.append(open_checkpoint(adapter).fingerprint())
    base = Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    save_file({name: 2 * v for name, v in load_file(base / "model.safetensors").items()}, base / "model.safetensors")
    found.append(open_checkpoint(adapter).fingerprint())
    assert all(a != b for a, b in itertools.pairwise(found)), found
