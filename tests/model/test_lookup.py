"""Embeddings and heads with residuals, against transformers' own forward on the dense experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from polymerge import load_model, merge
from polymerge.errors import ModelError
from polymerge.merging import run
from polymerge.merging.proof import Proof
from polymerge.model.lookup import MixedEmbedding, MixedHead
from polymerge.model.own import OwnTensor, OwnWeight
from polymerge.recipe.merge import EMBEDDING_RATE
from tests.model.test_mixed import ROWS, batch, dense_models, distance, plain, row
from tests.tiny import COMMON, make_experts

pytestmark = pytest.mark.usefixtures("one_thread", "unproved")
# Two tables, one that is both, an embedding that scales, transposed layers and positions, a head with a bias, positions
# that are looked up by other numbers than they are given.
KINDS: dict[str, Any] = {
    "untied": lambda: hf.LlamaConfig(**COMMON),
    "tied": lambda: hf.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "scaled": lambda: hf.Gemma3TextConfig(**COMMON, head_dim=12, sliding_window=64),
    "transposed": lambda: hf.GPT2Config(
        n_embd=48, n_layer=2, n_head=4, vocab_size=96, n_positions=128, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "bias": lambda: hf.PhiConfig(**{**COMMON, "num_key_value_heads": 4}),
    "moved": lambda: hf.OPTConfig(
        hidden_size=48, num_hidden_layers=2, ffn_dim=80, num_attention_heads=4, vocab_size=96, pad_token_id=1,
        max_position_embeddings=128, word_embed_proj_dim=48,
    ),
}  # fmt: skip
COMPRESS = {"embeddings": "compress", "lm_head": "compress", "embedding_rate": 0.6, "compress_rate": 0.6}
KEEP = {"embeddings": "keep", "lm_head": "keep", "embedding_rate": EMBEDDING_RATE}


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof before a merge does the same with other numbers."""
    monkeypatch.setattr(run, "prove", lambda *args, **more: Proof("any", True, "layers"))


def merged(kind: str, folder: Path, **recipe: Any) -> Any:
    experts = make_experts(kind, folder, config=KINDS[kind]())
    return merge({"experts": {n: str(p) for n, p in experts.items()}, **COMPRESS, **recipe}, folder / "bundle")


@pytest.mark.parametrize(
    ("kind", "code"), [*((kind, "int4") for kind in KINDS), ("tied", "factors"), ("bias", "factors")]
)
@torch.no_grad()
def test_a_mixed_batch_says_what_each_dense_expert_says(kind: str, code: str, tmp_path: Path) -> None:
    bundle = merged(kind, tmp_path, code=code)
    model, dense, inputs = load_model(bundle), dense_models(bundle, tmp_path), batch()
    if kind == "moved":
        inputs.pop("position_ids")
    got = model(**inputs, experts=ROWS).logits
    for number, expert in enumerate(ROWS):
        alone = row(inputs, number)
        expected = dense[expert](**alone).logits
        assert distance(got[number : number + 1], expected, alone["attention_mask"]) < 1e-5
    assert distance(model(**inputs, experts="e1").logits, dense["e1"](**inputs).logits, inputs["attention_mask"]) < 1e-5
    inputs.pop("position_ids", None)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answers = model.generate(**inputs, experts=ROWS, **greedy)
    for number, expert in enumerate(ROWS):
        assert torch.equal(answers[number], dense[expert].generate(**row(inputs, number), **greedy)[0])


@torch.no_grad()
def test_a_tied_head_and_its_embedding_share_one_table_and_nothing_is_made_whole(tmp_path: Path) -> None:
    model = load_model(merged("tied", tmp_path, code="int4"))
    head, embedding = model.hf.get_output_embeddings(), model.hf.get_input_embeddings()
    [lookup] = [part for part in model.modules() if isinstance(part, MixedEmbedding)]
    assert isinstance(head, MixedHead) and head.table is lookup.table and lookup.inner is embedding
    assert head.weight is embedding.weight is lookup.table.weight
    assert not any(isinstance(t, OwnWeight) for part in model.stand_ins for t in getattr(part, "tensors", ()))


@torch.no_grad()
def test_a_mixture_is_the_model_of_the_mixed_tables(tmp_path: Path) -> None:
    bundle = merged("tied", tmp_path)
    weights = {
        name: 0.25 * bundle.reconstruct("e0", name) + 0.75 * bundle.reconstruct("e2", name) for name in bundle.layers
    }
    mixed = plain(bundle.path)
    mixed.load_state_dict(weights, strict=False)
    inputs = batch()
    experts = ["e1", {"e0": 1.0, "e2": 3.0}, None, {"e0": 0.25, "e2": 0.75}, "e0"]
    got = load_model(bundle)(**inputs, experts=experts).logits
    for number in (1, 3):
        alone = row(inputs, number)
        assert distance(got[number : number + 1], mixed(**alone).logits, alone["attention_mask"]) < 1e-5


@pytest.mark.parametrize("kind", ["tied", "scaled"])
@torch.no_grad()
def test_in_bfloat16_it_is_as_near_as_the_dense_model_in_bfloat16(kind: str, tmp_path: Path) -> None:
    bundle = merged(kind, tmp_path, code="int4")
    exact, inputs = dense_models(bundle, tmp_path), batch()
    got = load_model(bundle, dtype="bfloat16")(**inputs, experts=ROWS).logits.float()
    mine = theirs = 0.0
    for number, expert in enumerate(ROWS):
        alone = row(inputs, number)
        expected, seen = exact[expert](**alone).logits, alone["attention_mask"].bool()
        rounded = copy.deepcopy(exact[expert]).to(torch.bfloat16)(**alone).logits.float()
        mine += float((got[number : number + 1] - expected)[seen].square().sum())
        theirs += float((rounded - expected)[seen].square().sum())
    assert 0 < mine < 2 * theirs


class Halved(torch.nn.Embedding):
    """What it gives depends on the ids themselves."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) / (1 + ids[..., None] % 2)


def test_a_lookup_is_known_by_what_it_does() -> None:
    assert MixedEmbedding.fits(torch.nn.Embedding(50, 8, padding_idx=40))
    assert MixedEmbedding.fits(KINDS_OF_LOOKUP["scaled"])
    assert not MixedEmbedding.fits(Halved(50, 8))
    assert not MixedEmbedding.fits(torch.nn.Linear(50, 8, bias=False))


KINDS_OF_LOOKUP = {
    "scaled": hf.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding(50, 8, 0, embed_scale=8**0.5)
}


@torch.no_grad()
def test_rows_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    model = load_model(merged("untied", tmp_path))
    with model.assigned(["e0", "e1"], 2), pytest.raises(ModelError, match="cannot be told apart"):
        model.hf.get_input_embeddings()(torch.zeros(3, 4, dtype=torch.long))


@pytest.mark.parametrize("recipe", [{}, KEEP])
@torch.no_grad()
def test_a_tied_table_stays_one_when_the_model_moves(tmp_path: Path, recipe: dict[str, Any]) -> None:
    model = load_model(merged("tied", tmp_path, **recipe))
    model.to(torch.bfloat16)
    head, embedding = model.hf.get_output_embeddings(), model.hf.get_input_embeddings()
    assert head.weight.data_ptr() == embedding.weight.data_ptr()
    of_experts: dict[int, set[int]] = {}
    for part in model.stand_ins:
        for tensor in getattr(part, "tensors", ()):
            for number, value in enumerate(tensor.values):
                if value is not None and value.shape == embedding.weight.shape:
                    of_experts.setdefault(number, set()).add(value.data_ptr())
                    assert value.dtype is torch.bfloat16
    assert all(len(places) == 1 for places in of_experts.values())
    assert len(of_experts) == (3 if recipe else 0)


@torch.no_grad()
def test_a_mixture_makes_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = merged("tied", tmp_path, **KEEP)
    model, inputs, made = load_model(bundle), batch(), OwnTensor.of
    expected = model(**inputs, experts={"e0": 1.0, "e2": 3.0}).logits

    def of(self: OwnTensor, weights: tuple[float, ...]) -> torch.Tensor:
        assert 1.0 in weights, "a table of a mixture"
        return made(self, weights)

    monkeypatch.setattr(OwnTensor, "of", of)
    got = model(**inputs, experts=["e1", {"e0": 1.0, "e2": 3.0}, None, {"e0": 0.25, "e2": 0.75}, "e0"]).logits
    assert distance(got[1::2], expected[1::2], inputs["attention_mask"][1::2]) < 1e-5
