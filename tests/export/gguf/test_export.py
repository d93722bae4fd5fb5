"""Exports for llama.cpp: the files hold the average and the experts, and what they cannot hold is refused."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from polymerge import Bundle, merge
from polymerge.engine.defaults import GenerationDefaults
from polymerge.engine.llamacpp.folder import NOTE, Served, read_note, serve_command
from polymerge.errors import BundleError, ModelError
from polymerge.export import export_gguf, plan_gguf
from polymerge.export.expressed import Expressed
from polymerge.export.factors import FactorMaker, write_peft
from polymerge.export.gguf.adapters import check_pairs, write_lora
from polymerge.export.gguf.converter import LlamaCpp, quantizer
from polymerge.export.gguf.file import Stored, write_gguf
from polymerge.export.gguf.forward import check_positions, left_out
from polymerge.export.gguf.measure import _served, check_served, divergence
from polymerge.export.gguf.modelfile import chat_lines, modelfile
from polymerge.export.gguf.names import Architecture, architecture_of, interleaved
from polymerge.export.gguf.plan import RUNTIME
from polymerge.export.gguf.tokens import GPT2, describe_tokenizer, splitting
from polymerge.export.gguf.types import stored_type
from polymerge.export.vllm.calibrate import Calibration
from polymerge.export.vllm.prompts import CalibrationPrompt
from tests.tiny import ARCHITECTURES, COMMON, VOCAB, letters_tokenizer, make_experts

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


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
GEMMA = {**COMMON, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8}


@pytest.mark.parametrize(
    ("config", "left"),
    [  # what llama.cpp itself was seen to answer: another KL than rounding's where something is left out
        (hf.LlamaConfig(**COMMON, hidden_act="gelu"), "hidden_act 'gelu': llama.cpp's llama has 'silu'"),
        (hf.MistralConfig(**COMMON, sliding_window=8), "sliding window of 8 tokens"),
        (hf.Phi3Config(**COMMON, sliding_window=8), "sliding window of 8 tokens"),
        (hf.Starcoder2Config(**COMMON, sliding_window=8), "sliding window of 8 tokens"),
        (hf.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=8, max_window_layers=0), "sliding window"),
        (hf.Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention"]), "layer_types"),
        (hf.Gemma2Config(**{**GEMMA, "query_pre_attn_scalar": 24}), "query_pre_attn_scalar 24: llama.cpp takes 12"),
        (hf.LlamaConfig(**COMMON, rope_parameters={**YARN, "attention_factor": 1.5}), "attention_factor 1.5"),
        (hf.LlamaConfig(**COMMON, rope_parameters={**YARN, "beta_fast": 16.0}), "beta_fast 16.0: llama.cpp takes 32"),
        (hf.Phi3Config(**COMMON, original_max_position_embeddings=32, rope_parameters=LONG), "longrope"),
        (hf.BloomConfig(hidden_size=48, n_head=4, apply_residual_connection_post_layernorm=True), "post_layernorm"),
        (hf.GPT2Config(n_embd=48, n_head=4, scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx"),
        (hf.LlamaConfig(**COMMON, rope_parameters=YARN), None),
        (hf.MistralConfig(**COMMON, sliding_window=128), None),  # no text is longer
        (hf.Qwen2Config(**COMMON, use_sliding_window=False, sliding_window=8), None),
        (hf.SmolLM3Config(**COMMON), None),
        (hf.Gemma2Config(**GEMMA), None),
        (hf.Gemma3TextConfig(**GEMMA), None),
        (hf.GPT2Config(n_embd=48, n_head=4), None),
    ],
)  # fmt: skip
def test_what_llama_cpp_leaves_out_of_a_configuration_is_listed(config: Any, left: str | None, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    lines = left_out(tmp_path)
    assert len(lines) == (left is not None) and all(line.startswith("the average: ") for line in lines)
    assert left is None or left in lines[0]


def converters(folder: Path) -> Path:
    """Stand-ins for llama.cpp's: that of adapters hands on what it was given."""
    copy = "import shutil, sys; shutil.copy(sys.argv[1] + '/adapter_model.safetensors', sys.argv[5])"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text("")
    (folder / "convert_lora_to_gguf.py").write_text(copy)
    return folder


def test_a_plan_for_the_converters_lists_settings_and_tables_that_llama_cpp_has_no_place_for(
    bundles: Any, tmp_path: Path
) -> None:
    averaged = {"norms": "average"}
    plan = plan_gguf(bundles("gpt2", **averaged), llama_cpp=converters(tmp_path / "llama.cpp"))
    assert any("wpe.weight: llama.cpp takes no adapter there" in line for line in plan.lost)
    assert not any("wpe" in task.module for tasks in plan.experts.values() for task in tasks)
    experts = make_experts("mistral", tmp_path, count=2, config=hf.MistralConfig(**COMMON, sliding_window=8))
    letters_tokenizer().save_pretrained(experts["e0"])
    bundle = merge({"experts": {k: str(v) for k, v in experts.items()}, **averaged}, tmp_path / "bundle")
    with pytest.raises(ModelError, match=r"cannot express the average: a sliding window of 8 tokens.*--lossy"):
        export_gguf(bundle, tmp_path / "out", llama_cpp=tmp_path / "llama.cpp")


def test_factors_of_transposed_layers_are_turned_for_the_converter_that_turns_them(tmp_path: Path) -> None:
    a, b, kept = torch.randn(4, 6), torch.randn(9, 4), torch.randn(4, 6)
    names = [f"base_model.model.h.0.{module}.lora_{part}.weight" for module in ("c_fc", "q") for part in "AB"]
    peft = tmp_path / "peft"
    peft.mkdir()
    save_file(dict(zip(names, (a, b, kept, b.clone()), strict=True)), peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    llama = LlamaCpp(converters(tmp_path / "llama.cpp"))
    llama.adapter(peft, tmp_path, tmp_path / "out", "f32", ["h.0.c_fc"])
    made = load_file(tmp_path / "out")
    torch.testing.assert_close(made[names[1]] @ made[names[0]], (b @ a).T)
    assert torch.equal(made[names[2]], kept) and torch.equal(made[names[3]], b)


def plain_gguf(file: Path, shapes: dict[str, tuple[int, ...]], **numbers: float) -> Path:
    def describe(writer: Any) -> None:
        for key, value in numbers.items():
            writer.add_float32(f"falcon.rope.{key}", value)

    f32 = stored_type("f32", (1, 1))
    write_gguf(file, "falcon", describe, [Stored(n, s, f32, lambda s=s: torch.zeros(s)) for n, s in shapes.items()])
    return file


def test_positions_that_a_converter_left_out_are_refused(tmp_path: Path) -> None:
    theta = {"rope_type": "default", "rope_theta": 500000.0}
    hf.FalconConfig(hidden_size=48, num_attention_heads=4, rope_parameters=theta).save_pretrained(tmp_path)
    weight = {"output.weight": (4, 6)}
    with pytest.raises(ModelError, match=r"left rope_theta at 10000, config.json says 500000"):
        check_positions(plain_gguf(tmp_path / "without.gguf", weight), tmp_path)
    check_positions(plain_gguf(tmp_path / "with.gguf", weight, freq_base=500000.0), tmp_path)


def test_factors_without_a_place_in_the_base_are_refused(tmp_path: Path) -> None:
    """llama.cpp ends the process that loads them."""
    base = plain_gguf(tmp_path / "base.gguf", {"blk.0.attn_q.weight": (8, 6), "token_embd.weight": (20, 6)})
    good = {"blk.0.attn_q.weight.lora_a": (2, 6), "blk.0.attn_q.weight.lora_b": (8, 2)}
    check_pairs(adapter := plain_gguf(tmp_path / "good.gguf", good), base, "e0", head=False)
    with pytest.raises(ModelError, match=r"'e0': its head is its own, and llama\.cpp has none"):
        check_pairs(adapter, base, "e0", head=True)
    turned = {"blk.0.attn_q.weight.lora_a": (2, 8), "blk.0.attn_q.weight.lora_b": (6, 2)}
    with pytest.raises(ModelError, match=r"made factors of \[8, 6\] for blk.0.attn_q.weight, which is \[6, 8\]"):
        check_pairs(plain_gguf(tmp_path / "turned.gguf", turned), base, "e0", head=False)


def test_an_export_that_llama_cpp_answers_otherwise_is_refused(bundles: Any, tmp_path: Path) -> None:
    bundle = bundles("llama", norms="average", embeddings="average", lm_head="average")
    note = export_gguf(bundle, tmp_path / "out", type="f16", calibration=SAMPLES, device="cpu").note

    def served(kl: float) -> Any:
        told = Served(kl=kl, same_token=1.0, tokens=4)
        return note.model_copy(
            update={"experts": {n: e.model_copy(update={"served": told}) for n, e in note.experts.items()}}
        )

    check_served(served(note.experts["e0"].kl + 1e-4))
    with pytest.raises(ModelError, match=r"'e0': llama.cpp is 0.1 nats a token \(KL\) from the exported expert"):
        check_served(served(0.1))
    check_served(served(0.1).model_copy(update={"lost": ("what the caller knows of",)}))


def test_factors_of_a_scaled_embedding_are_measured_as_they_are_added(bundles: Any, tmp_path: Path) -> None:
    """Gemma's module scales what it looks up, and factors are added to the table."""
    bundle = bundles("gemma3", compress_rate=0.0, norms="average")
    expressed = Expressed(bundle, RUNTIME, 64)
    tasks = expressed.tasks("e0")
    assert any(task.embedding for task in tasks)
    norms = {layer.module: layer.tensor for layer in bundle.layers.values() if layer.role == "norm"}
    maker = FactorMaker(bundle, norms, torch.device("cpu"), torch.float32)
    write_peft(bundle, tasks, maker.pairs("e0", tasks, {}), tmp_path / "peft", torch.float32)
    measured = Calibration(bundle, SAMPLES, torch.device("cpu")).measure("e0", tmp_path / "peft")
    assert measured.kl < 0.02 * measured.kl_average


def test_what_llama_cpp_tells_of_a_place_is_held_against_that_place() -> None:
    said = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).log_softmax(-1)  # after 1 to 4 tokens

    class Api:
        def next_scores(self, ids: list[int], lora: object, *, count: int) -> dict[str, Any]:
            row = said[len(ids) - 1]
            return {"top_logprobs": [{"id": int(n), "logprob": float(row[n])} for n in row.argsort(descending=True)]}

    api, note = cast(Any, Api()), cast(Any, SimpleNamespace(experts={"e0": None}))
    for start, places in ((2, slice(1, 3)), (0, slice(0, 3))):
        served = _served(api, note, "e0", [([5, 6, 7, 8], start, said[places])])
        assert served.tokens == len(said[places]) and served.kl < 1e-6 and served.same_token == 1.0
