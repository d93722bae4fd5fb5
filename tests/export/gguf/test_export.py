"""Exports for llama.cpp: the files hold the average and the experts, and what they cannot hold is refused."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from polymerge import Bundle, merge
from polymerge.engine.defaults import GenerationDefaults
from polymerge.engine.llamacpp.folder import NOTE, read_note, serve_command
from polymerge.errors import BundleError, ModelError
from polymerge.export import export_gguf, plan_gguf
from polymerge.export.gguf.adapters import write_lora
from polymerge.export.gguf.converter import LlamaCpp, quantizer
from polymerge.export.gguf.measure import divergence
from polymerge.export.gguf.modelfile import chat_lines, modelfile
from polymerge.export.gguf.names import Architecture, architecture_of, interleaved
from polymerge.export.gguf.tokens import GPT2, describe_tokenizer, splitting
from polymerge.export.vllm.prompts import CalibrationPrompt
from tests.tiny import ARCHITECTURES, VOCAB, letters_tokenizer, make_experts

SAMPLES = [CalibrationPrompt("abc", answer="de")]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bundles with a byte-level tokenizer; the same arguments give the same one."""
    made: dict[str, Bundle] = {}

    def get(architecture: str, spread: float = 0.02, **recipe: Any) -> Bundle:
        key = f"{architecture}-{spread}-{sorted(recipe.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("gguf")
            experts = make_experts(architecture, folder, spread=spread, count=2)
            letters_tokenizer().save_pretrained(experts["e0"])
            sources = {name: str(path) for name, path in experts.items()}
            made[key] = merge({"experts": sources, "compress_rate": 0.6, **recipe}, folder / "bundle")
        return made[key]

    return get


def read_gguf(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file, in the order of torch's dimensions, float32."""
    return {
        tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        for tensor in gguf.GGUFReader(file).tensors
    }


def uninterleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """transformers' own way back, from its reader of GGUF files (`reverse_permute_weights`)."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    processor = LlamaTensorProcessor(config={"num_attention_heads": heads, "num_key_value_heads": heads})
    return torch.tensor(processor._reverse_permute_weights(tensor.numpy(), heads, heads))


def test_rows_are_in_the_order_that_transformers_undoes() -> None:
    weight = torch.randn(24, 5)
    assert torch.equal(uninterleaved(interleaved(weight, 3), 3), weight)
    assert not torch.equal(interleaved(weight, 3), weight)


def test_base_and_adapter_are_the_expert(bundles: Any, tmp_path: Path) -> None:
    """W̄ + B A of the files, with rows turned back, is each linear layer of the expert with its norms folded in, and the
    head and the embedding are the expert's own."""
    bundle = bundles("llama-tied", compress_rate=0.0, norms="average")
    written = export_gguf(bundle, tmp_path / "out", type="f32", calibration=SAMPLES, device="cpu")
    base = read_gguf(written.folder / "base.gguf")
    assert "output.weight" in base  # apart from the embedding, since the experts change both
    for expert in bundle.experts:
        lora = read_gguf(written.folder / f"experts/{expert}/adapter.gguf")
        for layer in (x for x in bundle.layers.values() if x.role in ("linear", "embedding")):
            name = layer.tensor.removesuffix(".weight")
            place = _place(name)
            a, b = lora[f"{place}.weight.lora_a"], lora[f"{place}.weight.lora_b"]
            alpha = _alpha(written.folder / f"experts/{expert}/adapter.gguf")
            product = alpha / b.shape[1] * (a @ b.T if name.endswith("embed_tokens") else b @ a)
            weight = base[f"{place}.weight"] + product
            heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
            weight = uninterleaved(weight, heads) if heads else weight
            torch.testing.assert_close(weight, bundle.reconstruct(expert, layer.tensor), atol=2e-5, rtol=0)
        head = base["output.weight"] + _alpha(written.folder / f"experts/{expert}/adapter.gguf") / lora[
            "output.weight.lora_b"
        ].shape[1] * (lora["output.weight.lora_b"] @ lora["output.weight.lora_a"])
        torch.testing.assert_close(head, bundle.reconstruct(expert, "model.embed_tokens.weight"), atol=2e-5, rtol=0)
    note = read_note(written.folder)
    assert all(expert.kl < 1e-5 < expert.kl_average for expert in note.experts.values())
    assert serve_command(written.folder, note).count("--lora") == len(bundle.experts)


def _place(name: str) -> str:
    return str(gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).get_name(name))


def _alpha(file: Path) -> float:
    return float(gguf.GGUFReader(file).fields["adapter.lora.alpha"].contents())


def test_factors_of_any_rank_have_the_scale_of_one(tmp_path: Path) -> None:
    """llama.cpp multiplies by alpha / rank."""
    q, up = torch.randn(48, 4), torch.randn(80, 2)
    tensors = {
        "model.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(4, 48),
        "model.layers.0.self_attn.q_proj.lora_B.weight": q,
        "model.layers.0.self_attn.v_proj.lora_A.weight": torch.randn(4, 48),
        "model.layers.0.self_attn.v_proj.lora_B.weight": torch.randn(24, 4),
        "model.layers.0.mlp.up_proj.lora_A.weight": torch.randn(2, 48),
        "model.layers.0.mlp.up_proj.lora_B.weight": up,
    }
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    write_lora(tmp_path, Architecture("llama", 2, 4, 2), tmp_path / "a.gguf", "f32")
    lora = read_gguf(tmp_path / "a.gguf")
    assert _alpha(tmp_path / "a.gguf") == 4
    assert torch.equal(uninterleaved(lora["blk.0.attn_q.weight.lora_b"], 4), q)
    assert torch.equal(lora["blk.0.ffn_up.weight.lora_b"] * 4 / 2, up)
    assert {name.rpartition(".")[2] for name in lora} == {"lora_a", "lora_b"}


def test_what_has_no_place_is_refused_before_anything_is_written(bundles: Any, tmp_path: Path) -> None:
    heard: list[Any] = []
    with pytest.raises(ModelError, match=r"cannot express e0: .*bias: llama.cpp's adapters have no biases.*--lossy"):
        export_gguf(bundles("qwen2"), tmp_path / "out", calibration=SAMPLES, on_plan=heard.append)
    assert any("no biases" in line for line in heard[0].lost)
    assert not list(tmp_path.iterdir())
    plan = plan_gguf(bundles("llama", norms="average"))
    assert not plan.lost and plan.untied is False


def test_a_norm_that_is_the_averages_within_rounding_is_named_and_left_out(bundles: Any) -> None:
    averaged = {"embeddings": "average", "lm_head": "average"}
    line = "model.norm.weight: lm_head cannot take it in"
    far, near = plan_gguf(bundles("llama", **averaged)), plan_gguf(bundles("llama", spread=1e-4, **averaged))
    assert any(line in lost for lost in far.lost) and not far.negligible
    assert any(line in lost for lost in near.negligible) and not near.lost


def test_architectures_and_tokenizers_that_are_not_written_need_the_converters(bundles: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Gemma3ForCausalLM is not written here.*--llama-cpp FOLDER"):
        plan_gguf(bundles("gemma3"))
    with pytest.raises(ModelError, match="mixture-of-experts"):
        plan_gguf(bundles("mixtral"))
    with pytest.raises(ModelError, match=r"has no convert_hf_to_gguf\.py"):
        plan_gguf(bundles("llama"), llama_cpp=tmp_path)
    with pytest.raises(ModelError, match="llama-quantize"):
        quantizer(None)
    window = ARCHITECTURES["mistral"]().to_dict() | {"sliding_window": 16}
    assert architecture_of(window, "MistralForCausalLM") is None
    assert architecture_of(window | {"sliding_window": None}, "MistralForCausalLM") == Architecture("llama", 2, 4, 2)


def test_a_token_that_the_model_has_no_row_for_is_named() -> None:
    tokenizer = letters_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    with pytest.raises(ModelError, match=rf"a token {VOCAB} \('\[TOOL_CALLS\]'\), the model {VOCAB} rows"):
        describe_tokenizer(None, tokenizer, VOCAB, frozenset())


def test_a_failing_converter_is_one_line(tmp_path: Path) -> None:
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (tmp_path / name).write_text("raise NotImplementedError('Model Strange is not supported')")
    with pytest.raises(ModelError, match=r"convert_hf_to_gguf\.py: .*Strange is not supported") as raised:
        LlamaCpp(tmp_path).base(tmp_path, tmp_path / "base.gguf", "f16")
    assert len(str(raised.value).splitlines()) == 1


def test_only_a_splitting_that_llama_cpp_has_gets_its_name() -> None:
    model = {"type": "BPE", "vocab": {}, "merges": ["a b"]}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert splitting({"model": model, "pre_tokenizer": plain}) == "gpt-2"
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, plain]}
    assert splitting({"model": model, "pre_tokenizer": digits}) == "smollm"
    split = {"type": "Split", "pattern": {"Regex": GPT2 + "x"}, "behavior": "Isolated", "invert": False}
    quiet = {**plain, "use_regex": False}
    other = {"type": "Sequence", "pretokenizers": [split, quiet]}
    assert splitting({"model": model, "pre_tokenizer": other}) is None
    split["pattern"] = {"Regex": GPT2}
    assert splitting({"model": model, "pre_tokenizer": other}) == "gpt-2"
    assert splitting({"model": {**model, "byte_fallback": True}, "pre_tokenizer": plain}) is None
    assert splitting({"model": {**model, "merges": []}, "pre_tokenizer": plain}) is None
    assert splitting({"model": model, "pre_tokenizer": {"type": "Metaspace"}}) is None
    assert splitting({"model": model, "pre_tokenizer": plain, "normalizer": {"type": "Lowercase"}}) is None


def test_a_divergence_over_some_tokens_is_at_most_the_whole_one() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(50).log_softmax(-1) for _ in range(2))
    whole = float((p.exp() * (p - q)).sum())
    order = q.argsort(descending=True)
    parts = [divergence(p, order[:n], q[order[:n]]) for n in (1, 10, 50)]
    assert 0 <= parts[0] <= parts[1] <= parts[2] + 1e-9
    assert math.isclose(parts[2], whole, rel_tol=1e-4)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_is_given_only_where_both_write_the_same() -> None:
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = CHATML
    assert "<|im_start|>{{ .Role }}" in chat_lines(tokenizer)[0]
    text = modelfile("e0", "../../base.gguf", "./adapter.gguf", tokenizer, GenerationDefaults(ends=frozenset({2})))
    assert "FROM ../../base.gguf\nADAPTER ./adapter.gguf\nTEMPLATE" in text and 'PARAMETER stop "</s>"' in text
    tokenizer.chat_template = CHATML.replace("{{ message['content'] }}", "{{ message['content'] | upper }}")
    assert chat_lines(tokenizer) == []
    assert "TEMPLATE yourself" in modelfile("e0", "b", "a", tokenizer, GenerationDefaults())


@pytest.mark.parametrize("first", ["<|im_start|>", "</s>"])
def test_a_system_text_of_the_templates_own_is_ollamas_system(first: str) -> None:
    """SmolLM2's and Qwen 2.5's templates put one before conversations that begin without."""
    tokenizer = letters_tokenizer()
    tokenizer.bos_token = first
    own = "<|im_start|>system\nYou are {}.<|im_end|>\n"
    where = "{{% if messages[0]['role'] != 'system' %}}{}{{% endif %}}"
    tokenizer.chat_template = where.format(own.format('"it"')) + CHATML
    assert chat_lines(tokenizer)[1:] == ['SYSTEM """You are "it"."""']
    tokenizer.chat_template = where.format(own.format('"""it')) + CHATML  # would end the quotation
    assert chat_lines(tokenizer) == []
    tokenizer.chat_template = own.format("it") + CHATML  # before a conversation's own, too: Ollama has no word for that
    assert chat_lines(tokenizer) == []


def test_a_folder_that_was_changed_is_refused(bundles: Any, tmp_path: Path) -> None:
    bundle = bundles("llama", norms="average", embeddings="average", lm_head="average")
    folder = export_gguf(bundle, tmp_path / "out", type="f16", calibration=SAMPLES, device="cpu").folder
    assert sorted(load_file(bundle.path / "model.safetensors"))  # the bundle stays what it was
    with pytest.raises(BundleError, match="--to gguf"):
        read_note(bundle.path)
    base = folder / "base.gguf"
    base.write_bytes(base.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"base\.gguf: missing, or not of"):
        read_note(folder)
    data = json.loads((folder / NOTE).read_text())
    del data["experts"]["e0"]["probe"]
    (folder / NOTE).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"experts\.e0\.probe"):
        read_note(folder)


def test_the_export_that_serve_makes_by_itself_says_how_far_it_is(bundles: Any) -> None:
    """It takes a minute, once: the server was silent that long."""
    from polymerge.serve.gguf import export_of

    bundle, said = bundles("llama"), list[str]()
    _, folder = export_of(bundle.path, None, said.append)
    assert said[0] == f"exporting {bundle.path} for llama.cpp, once, into {folder}"
    assert [line.split(" (")[0] for line in said[1:5]] == [f"exporting: {n} of 4" for n in (1, 2, 3, 4)]
    said.clear()
    export_of(bundle.path, None, said.append)
    assert len(said) == 1 and said[0].startswith(f"llama.cpp serves {folder}: base q8_0")
