"""GGUF files against the models that they were written from, and inside Python packages: whole, in parts, under
another name than the package's."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from polymerge.errors import SourceError
from polymerge.sources.configuration import first_difference, settings_of
from polymerge.sources.dense import dense_model
from polymerge.sources.gguf import package_gguf
from polymerge.sources.gguf_tokenizer import mend_tokenizer
from polymerge.sources.opening import open_checkpoint
from tests.sources.gguf_file import Tensors, write_gguf
from tests.sources.reading import assert_reads_fresh
from tests.tiny import COMMON, make_experts

Checkpoints = Callable[[str], dict[str, Path]]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2"])
def test_a_file_holds_the_model_that_it_was_written_from(
    checkpoints: Checkpoints, tmp_path: Path, architecture: str
) -> None:
    folder = checkpoints(architecture)["e0"]
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", folder))
    expected = load_file(folder / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for name, value in expected.items():
        assert torch.equal(checkpoint.read(name), value), name
    assert_reads_fresh(checkpoint)


def test_a_quantised_file_holds_what_its_blocks_say(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**COMMON, "hidden_size": 64, "intermediate_size": 96})
    folder = make_experts("llama", tmp_path, count=1, config=config)["e0"]
    q8 = gguf.GGMLQuantizationType.Q8_0
    stored: dict[str, np.ndarray] = {}

    def fields(writer: Any) -> None:
        plain = writer.add_tensor

        def add(name: str, value: np.ndarray) -> None:
            blocks = value.ndim == 2
            stored[name] = gguf.dequantize(gguf.quantize(value, q8), q8) if blocks else value
            plain(name, gguf.quantize(value, q8) if blocks else value, raw_dtype=q8 if blocks else None)

        writer.add_tensor = add

    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", folder, fields=fields))
    for name, there in {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight"}.items():  # fmt: skip
        assert torch.equal(checkpoint.read(name), torch.from_numpy(stored[there])), name


def without(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def beside(name: str, *shape: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: np.full(shape, 0.5, dtype=np.float32)})


@pytest.mark.parametrize(
    ("architecture", "change", "words"),
    [
        ("llama", without("blk.1.ffn_up.weight"), ["model.layers.1.mlp.up_proj.weight", "has no tensor"]),
        ("llama", without("output_norm.weight"), ["model.norm.weight", "has no tensor"]),
        ("llama", without("token_embd.weight"), ["model.embed_tokens.weight", "has no tensor"]),
        ("qwen2", without("blk.0.attn_q.bias"), ["model.layers.0.self_attn.q_proj.bias", "has no tensor"]),
        ("llama", beside("blk.0.attn_q.bias", 48), ["'blk.0.attn_q.bias'", "no place"]),
        ("llama", beside("blk.7.ffn_up.weight", 80, 48), ["'blk.7.ffn_up.weight'", "no place"]),
        ("llama", beside("rope_factors_long.weight", 6), ["'rope_factors_long.weight'", "no place"]),
        ("qwen2", beside("blk.0.attn_q_norm.weight", 12), ["'blk.0.attn_q_norm.weight'", "no place"]),
    ],
)  # fmt: skip
def test_what_meets_nothing_is_refused_by_name(
    checkpoints: Checkpoints,
    tmp_path: Path,
    cache: Path,
    architecture: str,
    change: Callable[[Tensors], Any],
    words: list[str],
) -> None:
    file = write_gguf(tmp_path / "m.gguf", checkpoints(architecture)["e0"], change=change)
    message = refusal(file)
    assert all(word in message for word in words), message
    assert not list(cache.glob("gguf/*"))


def refusal(file: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(file)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{file}: "), message
    return message


def half(number: int) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        for name in list(tensors)[number::2]:
            del tensors[name]

    return change


def split(number: int) -> Callable[[Any], Any]:
    def fields(writer: Any) -> None:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)

    return fields


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_of_a_split_file_is_refused_with_the_command_that_joins(
    checkpoints: Checkpoints, tmp_path: Path, number: int
) -> None:
    name = f"m-{number + 1:05d}-of-00002.gguf"
    message = refusal(
        write_gguf(tmp_path / name, checkpoints("llama")["e0"], change=half(number), fields=split(number))
    )
    assert f"part {number + 1} of 2" in message and "llama-gguf-split --merge" in message and "m-whole.gguf" in message


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("adapter", lambda tensors: None, "a LoRA adapter"),
        ("model", beside("blk.0.attn_q.weight.lora_a", 4, 48), "a LoRA adapter"),
        ("mmproj", lambda tensors: None, "projector (mmproj)"),
        ("imatrix", lambda tensors: None, "'imatrix'"),
    ],
)
def test_other_kinds_of_files_are_refused_by_name(
    checkpoints: Checkpoints, tmp_path: Path, kind: str, change: Callable[[Tensors], Any], words: str
) -> None:
    assert words in refusal(write_gguf(tmp_path / "m.gguf", checkpoints("llama")["e0"], kind=kind, change=change))


@pytest.mark.parametrize("size", [4, 60, 5000])
def test_a_truncated_file_is_one_line(checkpoints: Checkpoints, tmp_path: Path, size: int) -> None:
    file = write_gguf(tmp_path / "m.gguf", checkpoints("llama")["e0"])
    file.write_bytes(file.read_bytes()[:size])
    assert "truncated or corrupt" in refusal(file)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def rope_factors(config: Any) -> np.ndarray:
    """What llama.cpp's converter writes: plain frequencies over scaled ones."""
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    size = config.hidden_size // config.num_attention_heads
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    factors: np.ndarray = (plain / scaled).numpy()
    return factors


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaled_positions_answer_as_the_model(tmp_path: Path, factor: float) -> None:
    parameters = {**LLAMA3, "factor": factor}
    config = transformers.LlamaConfig(**{**COMMON, "max_position_embeddings": 131072}, rope_parameters=parameters)
    folder = make_experts("llama", tmp_path, count=1, config=config)["e0"]
    factors = rope_factors(config)
    assert factors.max() == pytest.approx(factor) and factors.min() == 1 and len({*factors}) > 2
    file = write_gguf(
        tmp_path / "m.gguf", folder, change=lambda tensors: tensors.update({"rope_freqs.weight": factors})
    )
    model = dense_model(open_checkpoint(file), dtype=torch.float32)
    ids = torch.randint(0, 96, (1, 4), generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[0, 90, 3000, 70000]])
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids, position_ids=places).logits
    torch.testing.assert_close(model(ids, position_ids=places).logits, expected, rtol=1e-4, atol=1e-5)


def rope(kind: str = "default", theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


LONG = rope(
    "yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.5, beta_fast=16.0, beta_slow=2.0
)
WIDE = {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8}
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (transformers.LlamaConfig(**COMMON, rope_parameters=rope("linear", factor=4.0)),
               {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "yarn": (transformers.Qwen2Config(**COMMON, rope_parameters=LONG),
             {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32,
              "rope.scaling.yarn_attn_factor": 1.5, "rope.scaling.yarn_beta_fast": 16.0,
              "rope.scaling.yarn_beta_slow": 2.0}),
    "caps": (transformers.Gemma2Config(**COMMON, **WIDE, attn_logit_softcapping=1.0, final_logit_softcapping=2.0),
             {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, "attention.sliding_window": 8,
              "attention.key_length": 12, "attention.value_length": 12}),
    "queries by width": (transformers.Gemma2Config(**{**COMMON, **WIDE, "num_hidden_layers": 46, "head_dim": 8}),
                         {"attention.key_length": 8, "attention.sliding_window": 8}),
    "two kinds of positions": (
        transformers.Gemma3TextConfig(**COMMON, **WIDE, layer_types=["sliding_attention", "full_attention"],
                                      rope_parameters={"full_attention": rope("linear", 500000.0, factor=8.0),
                                                       "sliding_attention": rope(theta=20000.0)}),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base_swa": 20000.0,
         "attention.sliding_window": 8, "attention.sliding_window_pattern": 2, "attention.key_length": 12}),
    "a window": (transformers.Phi3Config(**COMMON, sliding_window=8), {"attention.sliding_window": 8}),
    "half a head turns": (transformers.Phi3Config(**COMMON, rope_parameters=rope(partial_rotary_factor=0.5)),
                          {"rope.dimension_count": 6, "attention.sliding_window": 0}),
    "a whole head turns": (
        transformers.NemotronConfig(**COMMON, norm_eps=1e-2, rope_parameters=rope(partial_rotary_factor=1.0)),
        {"rope.dimension_count": 12, "rope.scaling.type": "none"}),
    "another base": (transformers.Starcoder2Config(**COMMON, rope_parameters=rope(theta=999999.0)), {}),
    "norms' smallest": (transformers.StableLmConfig(**{**COMMON, "hidden_size": 64}, layer_norm_eps=1e-2),
                        {"rope.dimension_count": 4, "use_parallel_residual": False}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_that_transformers_leaves_out_are_the_models(tmp_path: Path, kind: str) -> None:
    config, said = SETTINGS[kind]
    folder = make_experts(config.model_type, tmp_path, count=1, config=config)["e0"]
    file = write_gguf(tmp_path / "m.gguf", folder, fields=lambda writer: add(writer, said))
    checkpoint = open_checkpoint(file)
    ids = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(dense_model(checkpoint, dtype=torch.float32)(ids).logits, expected, rtol=1e-4, atol=1e-5)
    plain = open_checkpoint(folder)
    assert first_difference(settings_of(checkpoint.config), settings_of(plain.config)) is None


def add(writer: Any, said: dict[str, Any]) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in said.items():
        kinds[type(value)](f"{writer.arch}.{key}", value)


@pytest.mark.parametrize(
    "said",
    [
        {"rope.scaling.type": "longrope"},
        {"rope.freq_base_swa": 20000.0},
        {"rope.dimension_count_swa": 6},
        {"attention.sliding_window": 8},
        {"attention.sliding_window_pattern": 2},
        {"attention.key_length": 24},
        {"attn_logit_softcapping": 30.0},
        {"expert_gating_func": 2},
        {"logit_scale": 0.5},
        {"something.new": True},
    ],
)
def test_a_setting_without_a_place_is_refused_by_name(
    checkpoints: Checkpoints, tmp_path: Path, said: dict[str, Any]
) -> None:
    file = write_gguf(tmp_path / "m.gguf", checkpoints("llama")["e0"], fields=lambda writer: add(writer, said))
    message = refusal(file)
    assert (
        f"llama.{next(iter(said))} is {next(iter(said.values()))}" in message and "LlamaConfig has no place" in message
    )


def tokenizer_of(file: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(open_checkpoint(file).folder)


def rules(name: str) -> Callable[[Any], Any]:
    return lambda writer: writer.add_tokenizer_pre(name)


@pytest.mark.parametrize(
    ("name", "two", "four"),
    [
        ("gpt-2", [5], [4, 4, 5]),
        ("falcon", [5], [4, 4, 3, 4]),
        ("smollm", [3, 4], [4, 4, 3, 4]),
        ("deepseek-llm", [3, 4], [4, 4, 3, 4]),
    ],
)
def test_texts_are_cut_by_the_files_rules(
    checkpoints: Checkpoints, tmp_path: Path, name: str, two: list[int], four: list[int]
) -> None:
    def change(tokens: list[str]) -> None:
        tokens[3:6] = ["3", "4", "34"]

    folder = checkpoints("llama")["e0"]
    tokenizer = tokenizer_of(write_gguf(tmp_path / "m.gguf", folder, fields=rules(name), tokens=change))
    assert [tokenizer(text)["input_ids"] for text in ("34", "4434")] == [two, four]


@pytest.mark.parametrize(
    ("said", "expected"), [({}, ["\u2581", "\u2581w"]), ({"add_space_prefix": False}, ["\u2581w"])]
)
def test_sentencepiece_begins_every_text_with_a_space(
    tmp_path: Path, said: dict[str, Any], expected: list[str]
) -> None:
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "\u2581", "w", "\u2581w"])}
    made = transformers.LlamaTokenizer(vocab=words, merges=[("\u2581", "w")])
    made.save_pretrained(tmp_path)
    fields = {"tokenizer.ggml.model": "llama", **{f"tokenizer.ggml.{key}": value for key, value in said.items()}}
    mend_tokenizer(tmp_path, fields, "m.gguf")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).tokenize(" w") == expected


def test_rules_that_nobody_knows_are_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", checkpoints("llama")["e0"], fields=rules("of-tomorrow"))
    assert "cut into words by 'of-tomorrow'" in refusal(file)


def test_llama_3s_texts_begin_with_the_first_token_unless_the_file_says_otherwise(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    def without_first(writer: Any) -> None:
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_add_bos_token(False)

    folder = checkpoints("llama")["e0"]
    for name, fields, expected in [
        ("a", rules("llama-bpe"), [1, 3]),
        ("b", without_first, [3]),
        ("c", rules("gpt-2"), [3]),
    ]:
        assert tokenizer_of(write_gguf(tmp_path / f"{name}.gguf", folder, fields=fields))("w")["input_ids"] == expected


def test_special_tokens_that_are_not_spelled_in_bytes_have_the_files_numbers(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    def change(tokens: list[str]) -> None:
        tokens[:3] = ["<\uff5chole\uff5c>", "<\uff5cbegin\u2581of\uff5c>", "<\uff5cend\uff5c>"]

    file = write_gguf(
        tmp_path / "m.gguf",
        checkpoints("llama")["e0"],
        fields=lambda writer: writer.add_add_bos_token(True),
        tokens=change,
    )
    tokenizer = tokenizer_of(file)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 96)
    assert tokenizer("w<\uff5chole\uff5c>3<\uff5cend\uff5c>")["input_ids"] == [1, 3, 0, 4, 2]


def test_factors_that_change_nothing_are_no_difference(checkpoints: Checkpoints, tmp_path: Path) -> None:
    ones = np.ones(6, dtype=np.float32)
    change = {"rope_freqs.weight": ones}
    file = write_gguf(tmp_path / "m.gguf", checkpoints("llama")["e0"], change=lambda tensors: tensors.update(change))
    assert open_checkpoint(file).config["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize("factors", [[1, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 8], [2, 2]])
def test_factors_of_another_kind_are_refused(checkpoints: Checkpoints, tmp_path: Path, factors: list[float]) -> None:
    change = {"rope_freqs.weight": np.array(factors, dtype=np.float32)}
    file = write_gguf(tmp_path / "m.gguf", checkpoints("llama")["e0"], change=lambda tensors: tensors.update(change))
    assert "'rope_freqs.weight'" in refusal(file)


def test_a_file_that_was_unpacked_is_not_unpacked_again(checkpoints: Checkpoints, tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", checkpoints("llama")["e0"])
    folder = open_checkpoint(file).folder
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert open_checkpoint(file).folder == folder and folder.parent == cache / "gguf"
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


class Site:
    """A folder of installed packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, package: str, module: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> None:
        (self.folder / module).mkdir(parents=True)
        info = self.folder / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        for name, data in ({"__init__.py": b"raise SystemExit('this code must not run')"} | files).items():
            (self.folder / module / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / module / name).write_bytes(data)
        wanted = "".join(f"Requires-Dist: {name}\n" for name in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n{wanted}")
        (info / "RECORD").write_text("".join(f"{module}/{name},,\n" for name in ["__init__.py", *files]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("POLYMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "site").mkdir()
    return Site(tmp_path / "site")


def parts(site: Site, sums: str = "", numbers: tuple[int, ...] = (0, 1, 2)) -> None:
    for number in numbers:
        data = {f"data/m.gguf.part{number:02d}": b"GGUF"[number : number + 1] * 10}
        site.install(f"big-part{number}", f"big_part{number}", data)
    required = (*(f"big-part{number}==1.0" for number in numbers), "pytest; extra == 'test'")
    site.install("big", "big", {"data/SHA256SUMS": sums.encode()} if sums else {}, required)


def test_a_whole_file_is_found_also_where_the_module_has_another_name(site: Site) -> None:
    site.install("some-model", "some_model", {"m.gguf": b"GGUF"})
    site.install("other-model", "weights", {"data/w.gguf": b"GGUF"})
    assert package_gguf("some-model").name == "m.gguf"
    assert package_gguf("other-model").read_bytes() == b"GGUF"


def test_parts_in_the_packages_that_it_requires_are_joined_in_order_once(site: Site) -> None:
    whole = b"G" * 10 + b"G" * 10 + b"U" * 10
    parts(site, f"{hashlib.sha256(whole).hexdigest()}  m.gguf\n")
    joined = package_gguf("big")
    assert joined.read_bytes() == whole and joined.suffix == ".gguf"
    before = joined.stat().st_mtime_ns
    assert package_gguf("big").stat().st_mtime_ns == before
    assert [file.name for file in joined.parent.iterdir()] == [joined.name]


@pytest.mark.parametrize(
    ("sums", "numbers", "words"), [("0" * 64 + "  m.gguf\n", (0, 1), "damaged"), ("", (0, 2), "not all there")]
)
def test_damaged_or_missing_parts_are_one_line(site: Site, sums: str, numbers: tuple[int, ...], words: str) -> None:
    parts(site, sums, numbers)
    with pytest.raises(SourceError, match=words):
        package_gguf("big")
    assert not list(Path(site.folder.parent).glob("cache/gguf/*"))


def test_none_two_and_not_installed_are_one_line(site: Site) -> None:
    site.install("two", "two", {"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
    site.install("none", "none", {})
    for package, words in [("two", "found 2"), ("none", "found 0"), ("not-there-at-all", "not installed")]:
        with pytest.raises(SourceError, match=words):
            package_gguf(package)
    assert "two" not in sys.modules
