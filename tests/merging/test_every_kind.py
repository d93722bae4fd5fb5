"""Every kind of fault that was once seen, through merge and through add: an expert answers as it did, or it is refused.

ARCHITECTURES has a line for each kind that lies in a model's own arithmetic, with the architecture at which it was seen
and at least one sibling; DIFFERENCES has what may be unlike about an expert that comes to others. Oracles are
transformers' and PEFT's own forward passes on the originals.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from polymerge import Bundle, add_expert, export_dense, load_model, merge
from polymerge.errors import PolymergeError
from polymerge.merging import run
from polymerge.merging.proof import Proof
from tests.sources.peft_oracle import by_peft, write_adapter
from tests.sweep.check import CLOSE, ROWS
from tests.sweep.experts import batch, make_experts
from tests.tiny import COMMON, VOCAB
from tests.tiny import make_experts as tiny_experts
from tests.vocabularies import ADDED, PADDED, WIDE, resize, tokenizer_with

pytestmark = pytest.mark.usefixtures("one_thread")

# What was wrong -> where it was seen, and siblings.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "a parameter is read as an attribute, or by another method than forward": (
        "qwen3_5_text", "zamba2", "lfm2", "falcon_mamba", "mamba2", "jamba", "recurrent_gemma",
    ),
    "a subclass of LayerNorm or Linear with arithmetic of its own": ("nemotron", "phimoe", "llama4_text", "gemma2"),
    "a group of one row inside a nested module of own parameters": ("qwen3_5_moe_text", "olmo_hybrid"),
    "own parameters beside children, arguments that are not rows, routers that flatten": (
        "gpt_oss", "bart", "deepseek_v2", "mimo_v2_flash", "marian",
    ),
    "buffers and parameters without a place, three dimensions, biases beside fused matrices": (
        "deepseek_v3", "apertus", "qwen3_next", "qwen2_moe", "glm4_moe", "gpt2",
    ),
    "tied tensors that are not stored": ("roberta", "zamba", "bert"),
    "a head with a bias": ("phi", "gptj"),
    "models that read images as well": ("qwen2_vl (images)", "mistral3 (images)", "llava (images)"),
}  # fmt: skip

# The same for a head of its own, at rate 0 and averaged with others' (`merge exits 0, load refuses`).
HEADS_WITH_A_BIAS = ("phi", "codegen", "phimoe")

Experts = dict[str, Path]


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof before a merge would see faults of the model on a small one; here it is the bundle's turn."""
    monkeypatch.setattr(run, "prove", lambda *args, **more: Proof("any", True, "groups"))


def merged(experts: Mapping[str, Any], out: Path, **recipe: Any) -> Bundle:
    sources = {name: path if isinstance(path, dict) else str(path) for name, path in experts.items()}
    return merge({"experts": sources, "compress_rate": 0.0, **recipe}, out)


def by_merge(experts: Mapping[str, Any], out: Path, **recipe: Any) -> Bundle:
    return merged(experts, out, **recipe)


def by_add(experts: Mapping[str, Any], out: Path, **recipe: Any) -> Bundle:
    """The last comes to a bundle of the others."""
    *others, last = experts
    bundle = merged({name: experts[name] for name in others}, out, **recipe)
    source = experts[last]
    options = {"base": source["base"]} if isinstance(source, dict) else {}
    return add_expert(bundle, last, source["source"] if options else source, **options).bundle


VERBS = {"merge": by_merge, "add": by_add}


def plain(folder: Path) -> Any:
    """As the class that saved it opens it."""
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, named).from_pretrained(folder, dtype=torch.float32).eval()


def far(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def check_mixed(bundle: Bundle, experts: Experts) -> None:
    """A padded batch of all, against each original alone, where the row has tokens."""
    model = load_model(bundle)
    oracles = {name: plain(path) for name, path in experts.items()} | {None: plain(bundle.path)}
    inputs = batch(model.hf)
    together = model(**inputs, experts=list(ROWS)).logits
    for number, name in enumerate(ROWS):
        row = {key: value[number : number + 1] for key, value in inputs.items()}
        seen = row.get("attention_mask", torch.ones_like(row["input_ids"])).bool()
        off = far(together[number : number + 1][seen], oracles[name](**row).logits[seen])
        assert off <= CLOSE, f"the row of {name or 'the average'} is {off:.2g} off"
    alone = [oracles[name](**{key: value[:1] for key, value in inputs.items()}).logits for name in experts]
    assert far(alone[0], alone[1]) > 1e-3, "it can fail"


@pytest.mark.parametrize("architecture", [name for names in ARCHITECTURES.values() for name in names])
def test_two_that_are_merged_and_one_that_is_added_answer_as_they_did(architecture: str, tmp_path: Path) -> None:
    experts = make_experts(architecture, tmp_path)
    check_mixed(by_add(experts, tmp_path / "bundle"), experts)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("architecture", HEADS_WITH_A_BIAS)
@torch.no_grad()
def test_an_averaged_head_with_a_bias_is_loaded(architecture: str, verb: str, tmp_path: Path) -> None:
    """`merge` once wrote what `load` refused."""
    experts = make_experts(architecture, tmp_path)
    bundle = VERBS[verb](experts, tmp_path / "bundle", lm_head="average", embeddings="average", norms="average")
    model = load_model(bundle)
    inputs = batch(model.hf)
    together = model(**inputs, experts=list(ROWS)).logits
    for number, name in ((2, "e2"), (3, None)):
        path = tmp_path / "dense"
        dense = plain(bundle.path if name is None else export_dense(bundle, name, path, overwrite=True))
        row = {key: value[number : number + 1] for key, value in inputs.items()}
        seen = row["attention_mask"].bool()
        assert far(together[number : number + 1][seen], dense(**row).logits[seen]) <= CLOSE


# --- what is unlike about the last of three experts ---

TINY = {**COMMON, "num_hidden_layers": 1}
WEIGHTS, HEAD, EMBEDDING = "model.safetensors", "lm_head.weight", "model.embed_tokens.weight"
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: transformers.LlamaConfig(**{**TINY, **more}),
    "tied": lambda **more: transformers.LlamaConfig(**{**TINY, "tie_word_embeddings": True, **more}),
    "qwen2": lambda **more: transformers.Qwen2Config(**{**TINY, **more}),
    "mistral": lambda **more: transformers.MistralConfig(**{**TINY, "sliding_window": 4, **more}),
    "gemma2": lambda **more: transformers.Gemma2Config(**{**TINY, "head_dim": 12, "sliding_window": 4, **more}),
    "phi": lambda **more: transformers.PhiConfig(**{**TINY, "num_key_value_heads": 4, **more}),
    "gpt2": lambda **more: transformers.GPT2Config(
        n_embd=48, n_layer=1, n_head=4, vocab_size=VOCAB, n_positions=64, pad_token_id=0, **more
    ),
    "qwen3_moe": lambda **more: transformers.Qwen3MoeConfig(
        **{**TINY, "head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **more}
    ),
    "mixtral": lambda **more: transformers.MixtralConfig(
        **{**TINY, "num_local_experts": 4, "num_experts_per_tok": 2, **more}
    ),
    "roberta": lambda **more: transformers.RobertaConfig(
        **{**{k: v for k, v in TINY.items() if k != "num_key_value_heads"}, "is_decoder": True, **more}
    ),
    "granite": lambda **more: transformers.GraniteConfig(**{**TINY, **more}),
    "cohere": lambda **more: transformers.CohereConfig(**{**TINY, **more}),
    "deepseek_v3": lambda **more: transformers.DeepseekV3Config(
        **{
            **TINY, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "first_k_dense_replace": 0, "moe_intermediate_size": 16, **more,
        }
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A difference of the last of three experts.

    Attributes:
        kind: of the three, in CONFIGS.
        change: makes it, given the folder of the last and those of the others.
        merge, add: words of the refusal; None where it answers as it did.
    """

    kind: str
    change: Callable[[Path, Experts], Any]
    merge: tuple[str, ...] | None = None
    add: tuple[str, ...] | None = None


def refused(kind: str, change: Callable[[Path, Experts], Any], *words: str) -> Case:
    """Alike by both verbs."""
    return Case(kind, change, words, words)


def setting(**changes: Any) -> Callable[[Path, Experts], None]:
    """Of the configuration alone, with the same tensors."""

    def change(last: Path, others: Experts) -> None:
        file = last / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path, Experts], None]:
    def changed(last: Path, others: Experts) -> None:
        stored = load_file(last / WEIGHTS)
        change(stored)
        save_file({name: value.contiguous() for name, value in stored.items()}, last / WEIGHTS, {"format": "pt"})

    return changed


def another(kind: str, **config: Any) -> Callable[[Path, Experts], None]:
    """A model of another configuration in the last one's place."""

    def change(last: Path, others: Experts) -> None:
        shutil.rmtree(last)
        made = tiny_experts(kind, last.parent / "another", count=1, seed=5, config=CONFIGS[kind](**config))
        made["e0"].rename(last)

    return change


def saved_as_the_model_holds_it(last: Path, others: Experts) -> None:
    """Mixtures of experts are one tensor there."""
    model = plain(last)
    shutil.rmtree(last)
    model.save_pretrained(last, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(last / WEIGHTS))


def saved_apart_from_two_others(last: Path, others: Experts) -> None:
    for folder in others.values():
        saved_as_the_model_holds_it(folder, {})


def vocabulary(last_tokens: tuple[str, ...], rows: int, there: tuple[str, ...] = (), size: int = VOCAB) -> Any:
    def change(last: Path, others: Experts) -> None:
        for number, folder in enumerate(others.values()):
            resize(folder, size, tokenizer_with(*there), number)
        resize(last, rows, tokenizer_with(*last_tokens), 9)

    return change


def two_words_changed_places(last: Path, others: Experts) -> None:
    for folder in (last, *others.values()):
        tokenizer_with().save_pretrained(folder)
    file = last / "tokenizer.json"
    file.write_text(file.read_text().replace('"w40"', '"x"').replace('"w50"', '"w40"').replace('"x"', '"w50"'))


def unknown(name: str, shape: tuple[int, ...], *, others_have: float | None = 1.0) -> Any:
    """A tensor that the architecture has no place for: twos in the last, this number in the others."""

    def change(last: Path, others: Experts) -> None:
        tensors(lambda t: t.update({name: torch.full(shape, 2.0)}))(last, {})
        for folder in others.values() if others_have is not None else ():
            tensors(lambda t: t.update({name: torch.full(shape, others_have)}))(folder, {})

    return change


def without_prefix(last: Path, others: Experts) -> None:
    def bare(stored: dict[str, Tensor]) -> None:
        for name in list(stored):
            stored[name.removeprefix("transformer.")] = stored.pop(name)

    tensors(bare)(last, others)


def in_bfloat16(stored: dict[str, Tensor]) -> None:
    for name, value in stored.items():
        stored[name] = value.bfloat16()


def all_but_the_last_in_bfloat16(last: Path, others: Experts) -> None:
    for folder in others.values():
        tensors(in_bfloat16)(folder, {})


ANEW = "merge all of them anew"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
DIFFERENCES: dict[str, Case] = {
    # tied heads
    "untied beside tied": Case("tied", another("llama"), None, ("output head of its own", HEAD, ANEW)),
    "tied beside untied": Case("llama", another("tied")),
    "a trained head that is stored though its configuration ties it": Case(
        "tied", tensors(lambda t: t.update({HEAD: 2 * t[EMBEDDING]})), None, ("output head of its own", HEAD, ANEW)
    ),
    "a head that is stored and equal though it is tied": Case(
        "tied", tensors(lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    ),
    # settings with which the same tensors are another model
    "heads": refused("llama", setting(num_attention_heads=8, num_key_value_heads=4, head_dim=6), "num_attention_heads"),
    "heads of GPT-2": refused("gpt2", setting(n_head=2), "n_head: 4 and 2"),
    "key-value heads": refused("llama", another("llama", num_key_value_heads=4), "num_key_value_heads: 2 and 4"),
    "activation": refused("llama", setting(hidden_act="gelu"), "hidden_act: silu and gelu"),
    "activation of GPT-2": refused("gpt2", setting(activation_function="relu"), "gelu_new and relu"),
    "epsilon": refused("llama", setting(rms_norm_eps=1e-2), "rms_norm_eps"),
    "sliding window": refused("mistral", setting(sliding_window=8), "sliding_window: 4 and 8"),
    "no sliding window": refused("mistral", setting(sliding_window=None), "sliding_window: 4 and None"),
    "which layers slide": refused("gemma2", setting(layer_types=["full_attention"]), "layer_types"),
    "soft caps": refused("gemma2", setting(attn_logit_softcapping=20.0), "attn_logit_softcapping: 50.0 and 20.0"),
    "weights of the chosen block experts": refused("qwen3_moe", setting(norm_topk_prob=True), "norm_topk_prob: "),
    "block experts a token": refused("mixtral", setting(num_experts_per_tok=1), "num_experts_per_tok: 2 and 1"),
    "scale of the routed": refused("deepseek_v3", setting(routed_scaling_factor=1.0), "2.5 and 1.0"),
    "multipliers": refused("granite", setting(residual_multiplier=0.5), "residual_multiplier: 1.0 and 0.5"),
    "scale of the logits": refused("cohere", setting(logit_scale=0.5), "logit_scale: 0.0625 and 0.5"),
    # positions are each expert's own
    "rope": Case("llama", setting(rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
    "rope in an older file": Case("llama", setting(rope_parameters=None, rope_theta=500.0)),
    "long context": Case("qwen2", setting(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})),
    "a part of a head that turns": refused(
        "phi",
        setting(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}),
        "rope_parameters", "cannot be held apart",
    ),
    "padding where it means nothing": Case("llama", setting(pad_token_id=7)),
    "padding from which positions are counted": refused(
        "roberta", setting(pad_token_id=7), "pad_token_id: 0 and 7", "counts positions from it"
    ),
    # tensors that one has, or that the model does not know
    "a buffer that differs": Case("deepseek_v3", lambda last, others: None),
    "biases that the configuration tells": refused(
        "llama", another("llama", attention_bias=True), "attention_bias: False and True"
    ),
    "a bias that the model has no place for": refused(
        "llama", tensors(lambda t: t.update({Q_BIAS: torch.ones(48)})), "lacks tensors", Q_BIAS
    ),
    "biases that the model has no place for, in all": refused(
        "llama", unknown(Q_BIAS, (48,)), Q_BIAS, "unknown to its architecture and differs"
    ),
    "a classifier's head that differs": refused("llama", unknown("score.weight", (2, 48)), "score.weight", "differs"),
    "a value head that differs": refused("gpt2", unknown("v_head.weight", (1, 48)), "v_head.weight", "differs"),
    "a value head of one": refused(
        "llama", unknown("v_head.summary.weight", (1, 48), others_have=None), "lacks tensors", "v_head.summary.weight"
    ),
    "a value head that is the same": Case("llama", unknown("v_head.summary.weight", (1, 48), others_have=2.0)),
    "a tower of images beside a text model": refused(
        "llama", unknown("vision_tower.patch_embedding.weight", (8, 3, 2, 2)), "vision_tower", "differs"
    ),
    # vocabularies
    "another token at the end": Case("llama", vocabulary(("<|end|>",), WIDE, ADDED, WIDE)),
    "fewer tokens": Case("tied", vocabulary((), VOCAB, ADDED, PADDED)),
    "more tokens": Case("llama", vocabulary(ADDED, WIDE), None, ("98 tokens", "96 rows", ANEW)),
    "words that contradict": refused("llama", two_words_changed_places, "token 40", "'w40'", "'w50'"),
    # how it is stored
    "a coarser dtype": Case("llama", tensors(in_bfloat16), ("`dtype:`", "float32", "bfloat16"), None),
    "a finer dtype": refused("llama", all_but_the_last_in_bfloat16, "dtype", "float32", "bfloat16"),
    "a mixture in one tensor": Case("mixtral", saved_as_the_model_holds_it),
    "a mixture matrix by matrix": Case("qwen3_moe", saved_apart_from_two_others),
    "a backbone without its prefix": Case("gpt2", without_prefix),
}  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Experts]:
    """Three experts of a kind, made once."""
    folder, made = tmp_path_factory.mktemp("originals"), dict[str, Experts]()

    def of(kind: str) -> Experts:
        if kind not in made:
            made[kind] = tiny_experts(kind, folder, config=CONFIGS[kind]())
        return made[kind]

    return of


@torch.no_grad()
def check_answers(bundle: Bundle, oracles: Mapping[str, Any]) -> None:
    """A padded batch of all against each original alone: its logits where it has tokens, and none behind its words."""
    model, names = load_model(bundle), [*oracles, *reversed(oracles)]
    ids = torch.randint(3, VOCAB, (len(names), 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1::2, :3] = 0  # padded on the left
    together = model(input_ids=ids, attention_mask=mask, experts=names).logits
    for number, name in enumerate(names):
        row, seen = slice(number, number + 1), mask[number].bool()
        expected = oracles[name](input_ids=ids[row], attention_mask=mask[row]).logits[0][seen]
        got, size = together[number][seen], expected.shape[-1]
        assert far(got[:, :size], expected) <= CLOSE, name
        assert bool((got[:, size:] == -torch.inf).all())


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_is_unlike_answers_as_it_did_or_is_refused(
    name: str, verb: str, originals: Callable[[str], Experts], tmp_path: Path
) -> None:
    case = DIFFERENCES[name]
    experts = {n: Path(shutil.copytree(path, tmp_path / n)) for n, path in originals(case.kind).items()}
    case.change(experts["e2"], {n: experts[n] for n in ("e0", "e1")})
    words = case.merge if verb == "merge" else case.add
    if words is None:
        bundle = VERBS[verb](experts, tmp_path / "bundle")
        check_answers(bundle, {n: plain(path) for n, path in experts.items()})
        return
    with pytest.raises(PolymergeError) as refusal:
        VERBS[verb](experts, tmp_path / "bundle")
    said = str(refusal.value)
    assert "\n" not in said and "e2" in said, said
    assert not [word for word in words if word not in said], said


# --- adapters ---

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "every bias and whole modules": (
        "qwen2", {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "biases of its layers": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "norms as whole modules": ("llama", {"target_modules": "all-linear", "modules_to_save": ["norm"]}),
    "patterns, rsLoRA and DoRA": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2},
            "use_rslora": True, "use_dora": True,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_answers_as_in_peft(
    name: str, verb: str, originals: Callable[[str], Experts], tmp_path: Path
) -> None:
    kind, config = ADAPTERS[name]
    experts = originals(kind)
    adapter = write_adapter(tmp_path / "adapter", experts["e2"], **config)
    sources = {**{n: experts[n] for n in ("e0", "e1")}, "e2": {"source": str(adapter), "base": str(experts["e2"])}}
    oracles = {n: plain(experts[n]) for n in ("e0", "e1")} | {"e2": by_peft(adapter, experts["e2"])}
    check_answers(VERBS[verb](sources, tmp_path / "bundle"), oracles)


@pytest.mark.parametrize("bias", ["all", "none"])
def test_an_adapter_that_stands_first_is_not_overwritten(
    bias: str, originals: Callable[[str], Experts], tmp_path: Path
) -> None:
    experts, config = originals("qwen2"), {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = write_adapter(tmp_path / "adapter", experts["e0"], bias=bias, **config)
    sources = {"e0": {"source": str(adapter), "base": str(experts["e0"])}, "e1": experts["e1"], "e2": experts["e2"]}
    oracles = {"e0": by_peft(adapter, experts["e0"])} | {n: plain(experts[n]) for n in ("e1", "e2")}
    check_answers(by_add(sources, tmp_path / "bundle"), oracles)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_an_adapter_that_unties_the_ends_is_not_added_to_a_tied_bundle(
    originals: Callable[[str], Experts], tmp_path: Path
) -> None:
    experts = originals("tied")
    adapter = write_adapter(tmp_path / "adapter", experts["e2"], target_modules=["embed_tokens", "q_proj"])
    sources = {**{n: experts[n] for n in ("e0", "e1")}, "e2": {"source": str(adapter), "base": str(experts["e2"])}}
    oracles = {n: plain(experts[n]) for n in ("e0", "e1")} | {"e2": by_peft(adapter, experts["e2"])}
    check_answers(by_merge(sources, tmp_path / "merged"), oracles)
    with pytest.raises(PolymergeError, match="'e2' has an output head of its own"):
        by_add(sources, tmp_path / "added")


# --- what no bundle holds ---

SIZES = {"vocab_size": 64, "pad_token_id": 0}
OUT_OF_SCOPE: dict[str, tuple[Callable[[], Any], str]] = {
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, **SIZES)
        ),
        "T5ForConditionalGeneration (t5) is an encoder-decoder",
    ),
    "bart": (
        lambda: transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_layers=1, decoder_layers=1,
                encoder_attention_heads=2, decoder_attention_heads=2, **SIZES,
            )
        ),
        "BartForConditionalGeneration (bart) is an encoder-decoder",
    ),
    "distilbert": (
        lambda: transformers.DistilBertForMaskedLM(
            transformers.DistilBertConfig(dim=16, hidden_dim=16, n_layers=1, n_heads=2, **SIZES)
        ),
        "DistilBertForMaskedLM (distilbert) is a masked language model",
    ),
    "llama that classifies": (
        lambda: transformers.LlamaForSequenceClassification(CONFIGS["llama"]()),
        "LlamaForSequenceClassification (llama) is a classifier",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT_OF_SCOPE)
def test_what_does_not_go_on_with_a_text_is_refused_by_name(
    name: str, originals: Callable[[str], Experts], tmp_path: Path
) -> None:
    make, words = OUT_OF_SCOPE[name]
    for folder in ("one", "two"):
        make().save_pretrained(tmp_path / folder)
    experts = {"e0": tmp_path / "one", "e1": tmp_path / "two"}
    beside = {n: originals("llama")[n] for n in ("e0", "e1")} | {"e2": tmp_path / "one"}
    for verb, sources in ((by_merge, experts), (by_add, beside)):
        with pytest.raises(PolymergeError) as refusal:
            verb(sources, tmp_path / "bundle")
        assert words in str(refusal.value) and "\n" not in str(refusal.value)
        shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
