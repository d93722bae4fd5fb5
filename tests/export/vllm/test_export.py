"""Exports for vLLM: what cannot be expressed is said before, folded where it can be, and measured after."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from polymerge import Bundle, load_model, merge
from polymerge.cli.main import main
from polymerge.engine.vllm.folder import LORA_RANKS, padded_rank, read_note, serve_arguments
from polymerge.errors import BundleError, DataError, ModelError, OutputExistsError
from polymerge.export import plan_vllm, write_vllm
from polymerge.export.vllm.calibrate import applied, read_adapter
from polymerge.export.vllm.norms import gain_ratio, norm_modules, norm_readers
from polymerge.export.vllm.prompts import CalibrationPrompt, read_prompts
from polymerge.model.mixed import MixedModel
from polymerge.sources.layers import meta_model
from tests.tiny import make_experts, tiny_tokenizer

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
SAMPLES = [CalibrationPrompt("w5 w6 w7"), CalibrationPrompt("w8 w9", answer="w10 w11 w12")]
BEFORE_LAYERS = {
    "llama": {"input_layernorm", "post_attention_layernorm", "norm"},
    "llama-tied": {"input_layernorm", "post_attention_layernorm", "norm"},
    "qwen2": {"input_layernorm", "post_attention_layernorm", "norm"},
    "qwen3": {"input_layernorm", "post_attention_layernorm", "norm"},
    "gemma3": {"input_layernorm", "pre_feedforward_layernorm", "norm"},
    "phi3": {"input_layernorm", "post_attention_layernorm", "norm"},
    "gpt2": set(),  # its norms have biases
    "gpt-neox": set(),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bundles with a tokenizer; the same arguments give the same one."""
    made: dict[str, Bundle] = {}

    def get(architecture: str, **recipe: Any) -> Bundle:
        key = f"{architecture}-{sorted(recipe.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("vllm")
            experts = make_experts(architecture, folder, spread=0.02)
            tiny_tokenizer().save_pretrained(experts["e0"])
            sources = {name: str(path) for name, path in experts.items()}
            made[key] = merge(
                {"experts": sources, "code": "factors", "compress_rate": 0.6, **recipe}, folder / "bundle"
            )
        return made[key]

    return get


def logits_of(model: MixedModel, expert: str | None) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS, experts=expert).logits
    return logits


@pytest.mark.parametrize("architecture", sorted(BEFORE_LAYERS))
def test_norms_that_only_linear_layers_read_are_found(bundles: Any, architecture: str) -> None:
    readers = norm_readers(meta_model(bundles(architecture).path))
    assert {name.rpartition(".")[2] for name in readers} == BEFORE_LAYERS[architecture]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_gain_in_the_columns_is_the_gain_in_the_norm(bundles: Any, architecture: str) -> None:
    bundle = bundles(architecture)
    name, norm = next(iter(norm_modules(meta_model(bundle.path)).items()))
    base = bundle.base_tensor(f"{name}.weight")
    weight = bundle.expert_reader("e1").read(f"{name}.weight")
    ratio = gain_ratio(norm, weight, base)
    assert ratio is not None
    if architecture == "llama":
        assert torch.allclose(ratio.float(), weight / base, rtol=1e-4)
    else:
        assert torch.allclose(ratio.float(), (1 + weight) / (1 + base), rtol=1e-4)
    assert gain_ratio(norm, weight, torch.full_like(base, -1.0 if architecture == "gemma3" else 0.0)) is None


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen3"])
@pytest.mark.parametrize("scale", ["per_expert", "shared"])
def test_at_full_rank_folding_loses_nothing_that_has_a_place(
    bundles: Any, tmp_path: Path, architecture: str, scale: str
) -> None:
    """Ratios, norms, tied and untied embeddings and heads: all of the expert is in base and adapter."""
    bundle = bundles(architecture, scale=scale)
    plan = plan_vllm(bundle, max_rank=64)  # the widths are 48 and 80
    written = write_vllm(plan, tmp_path / "v", samples=SAMPLES)
    lost = {line.split(": ")[1].split(".")[-2] for line in plan.lost}
    assert lost == ({"q_norm", "k_norm"} if architecture == "qwen3" else set())
    model = load_model(bundle)
    for expert in bundle.experts:
        adapter = read_adapter(load_file(written.folder / "adapters" / expert / "adapter_model.safetensors"))
        with applied(model.hf, adapter):
            logits = logits_of(model, None)
        if architecture != "qwen3":
            torch.testing.assert_close(logits, logits_of(model, expert), atol=2e-4, rtol=0)
            assert written.note.experts[expert].kl < 1e-6 < written.note.experts[expert].kl_unfolded
        assert written.note.experts[expert].kl < written.note.experts[expert].kl_average


def test_at_the_bundles_rank_folding_is_better_than_leaving_out(bundles: Any, tmp_path: Path) -> None:
    written = write_vllm(plan_vllm(bundles("llama")), tmp_path / "v", samples=SAMPLES)
    for expert in written.note.experts.values():
        assert expert.kl < expert.kl_unfolded


@pytest.mark.parametrize("code", ["int8", "int4"])
def test_coded_factors_are_decoded_on_the_way(bundles: Any, tmp_path: Path, code: str) -> None:
    bundle = bundles("llama", code=code, scale="shared", embeddings="average", lm_head="average", norms="average")
    written = write_vllm(plan_vllm(bundle), tmp_path / "v", samples=SAMPLES)
    model = load_model(bundle)
    for expert in bundle.experts:
        adapter = read_adapter(load_file(written.folder / "adapters" / expert / "adapter_model.safetensors"))
        with applied(model.hf, adapter):
            logits = logits_of(model, None)
        torch.testing.assert_close(logits, logits_of(model, expert), atol=1e-5, rtol=0)


def test_peft_opens_an_exported_adapter_and_says_the_same(bundles: Any, tmp_path: Path) -> None:
    bundle = bundles("llama", embeddings="average", lm_head="average", norms="average")
    written = write_vllm(plan_vllm(bundle), tmp_path / "v", samples=SAMPLES)
    adapter = written.folder / "adapters" / "e1"
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(written.folder), adapter).eval()
    model = load_model(bundle)
    with torch.no_grad(), applied(model.hf, read_adapter(load_file(adapter / "adapter_model.safetensors"))):
        torch.testing.assert_close(peft(IDS).logits, model(IDS).logits, atol=1e-4, rtol=0)


def test_a_table_of_positions_is_listed_and_the_rest_is_measured(bundles: Any, tmp_path: Path) -> None:
    """GPT-2's experts have one of their own, which looks up positions and not tokens."""
    plan = plan_vllm(bundles("gpt2", norms="average", embeddings="compress", scale="shared"))
    assert any("wpe.weight: vLLM takes no adapter there" in line for line in plan.lost)
    note = write_vllm(plan, tmp_path / "v", samples=SAMPLES).note
    assert all(0 < expert.kl < expert.kl_average for expert in note.experts.values())


def test_what_vllm_has_no_place_for_is_listed_with_the_reason(bundles: Any) -> None:
    qwen2 = "\n".join(plan_vllm(bundles("qwen2")).lost)
    assert "e1: model.layers.0.self_attn.q_proj.bias: vLLM's adapters have no biases" in qwen2
    assert "e1: model.embed_tokens.weight: vLLM takes no adapter there with this architecture" in qwen2
    assert "e1: model.norm.weight: lm_head cannot take it in" in qwen2
    gemma3 = "\n".join(plan_vllm(bundles("gemma3")).lost)
    assert "e0: model.layers.1.post_feedforward_layernorm.weight: not only linear layers read it" in gemma3
    averaged = {"embeddings": "average", "lm_head": "average", "norms": "average"}
    assert not plan_vllm(bundles("qwen2", **averaged)).lost
    cut = plan_vllm(bundles("llama"), max_rank=8).lost
    whole = next(line for line in cut if line.startswith("e2: lm_head.weight: 2 whole tensors beyond rank 8 ("))
    assert "`embeddings: compress` and `lm_head: compress`" in whole
    assert "cut to rank 8" in cut[-1]


def test_a_dense_bundle_is_factorised_and_a_plain_average_has_no_factors(bundles: Any, tmp_path: Path) -> None:
    exact = write_vllm(plan_vllm(bundles("llama", compress_rate=0.0), max_rank=64), tmp_path / "v", samples=SAMPLES)
    assert all(expert.kl < 1e-6 for expert in exact.note.experts.values())
    averaged = {"embeddings": "average", "lm_head": "average", "norms": "average", "scale": "shared"}
    plain = plan_vllm(bundles("llama", compress_rate=1.0, **averaged))
    assert not any(plain.experts.values())
    with pytest.raises(ModelError, match="nothing that an adapter could hold"):
        write_vllm(plain, tmp_path / "w")
    assert not list(tmp_path.glob("w*"))


def test_fused_blocks_and_unknown_ranks_are_refused(bundles: Any) -> None:
    with pytest.raises(ModelError, match="mixture-of-experts"):
        plan_vllm(bundles("mixtral"))
    with pytest.raises(ModelError, match="rank 20: vLLM takes one of 1, 8, 16"):
        plan_vllm(bundles("llama"), max_rank=20)
    assert [padded_rank(rank) for rank in (1, 2, 33, 257, 512, 9999)] == [1, 8, 64, 320, 512, LORA_RANKS[-1]]


def test_a_bundle_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    experts = {name: str(path) for name, path in make_experts("llama", tmp_path).items()}
    bundle = merge({"experts": experts, "code": "factors", "compress_rate": 0.6}, tmp_path / "bundle")
    with pytest.raises(ModelError, match="no usable tokenizer") as raised:
        write_vllm(plan_vllm(bundle), tmp_path / "v")
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "v").exists()


def test_the_export_depends_on_the_bundle_alone(bundles: Any, tmp_path: Path) -> None:
    plan = plan_vllm(bundles("llama"))
    one, two = (write_vllm(plan, tmp_path / name, samples=SAMPLES).folder for name in ("a", "b"))
    for file in (file for file in one.rglob("*") if file.is_file()):
        assert file.read_bytes() == (two / file.relative_to(one)).read_bytes()


def test_an_export_never_takes_a_bundles_place(bundles: Any, tmp_path: Path) -> None:
    bundle = bundles("llama")
    before = bundle.digest
    with pytest.raises(OutputExistsError, match="never overwritten"):
        write_vllm(plan_vllm(bundle), bundle.path, overwrite=True)
    assert Bundle.open(bundle.path).digest == before and not list(Bundle.open(bundle.path).damaged_files())
    folder = write_vllm(plan_vllm(bundle), tmp_path / "v", samples=SAMPLES).folder
    write_vllm(plan_vllm(bundle), folder, samples=SAMPLES, overwrite=True)


def test_the_command_lists_before_it_writes_and_prints_the_launch(
    bundles: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = tmp_path / "prompts.jsonl"
    calibration.write_text('{"prompt": "w5 w6", "answer": "w7"}\n\nw8 w9 w10\n')
    out = tmp_path / "v"
    options = ["--to", "vllm", "-o", str(out), "--calibration", str(calibration)]
    monkeypatch.setattr("sys.argv", ["polymerge", "export", str(bundles("qwen3").path), *options])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    printed = capsys.readouterr()
    assert "vLLM cannot express e0: model.layers.0.self_attn.q_norm.weight" in printed.err
    assert printed.err.index("cannot express") < printed.err.index("exporting:")
    note = read_note(out)
    assert f"vllm serve {out.resolve()} --served-model-name average" in printed.out
    assert f"--max-lora-rank {note.max_lora_rank} --max-loras 4" in printed.out
    assert all(f"{name}={out.resolve()}/adapters/{name}" in printed.out for name in ("e0", "e1", "e2"))
    monkeypatch.setattr("sys.argv", ["polymerge", "export", str(bundles("qwen3").path), *options, "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "exists; give --overwrite" in capsys.readouterr().err


def test_calibration_files_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    for content, message in (("", "holds no calibration prompts"), ('{"answer": 1}', "line 1"), ("ok\n{", "line 2")):
        file.write_text(content)
        with pytest.raises(DataError, match=message) as raised:
            read_prompts(file)
        assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "none")


def test_a_folder_that_was_not_exported_or_was_changed_is_refused(bundles: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="export BUNDLE --to vllm"):
        read_note(bundles("llama").path)
    folder = write_vllm(plan_vllm(bundles("llama")), tmp_path / "v", samples=SAMPLES).folder
    assert serve_arguments(folder, read_note(folder))[:2] == ["--served-model-name", "average"]
    data = json.loads((folder / "polymerge-vllm.json").read_text())
    del data["experts"]["e0"]["probe"]
    (folder / "polymerge-vllm.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"experts\.e0\.probe"):
        read_note(folder)
