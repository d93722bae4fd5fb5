"""What an expert does not know it can't say, whoever else is in its batch. The oracle is transformers' own forward."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers as hf

from polymerge import Bundle, export_dense, export_peft, load_model, merge
from polymerge.bundle.adapter import adapter_shapes
from polymerge.engine.base import GenerateRequest, ScoreRequest
from polymerge.engine.local.engine import HFEngine
from polymerge.errors import ModelError
from polymerge.export import plan_vllm
from polymerge.model import loading as loading_module
from polymerge.model.mixed import MixedModel
from polymerge.serve.probe import probe
from tests.fine_tunes import CHATML, PLAIN, ROOM, TEXT, Original
from tests.tiny import VOCAB
from tests.vocabularies import ADDED, PADDED, WIDE, kin, tokenizer_with

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("plain", "wide", "padded")
SIZES = (VOCAB, WIDE, PADDED)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Original]:
    """Their new rows are large, so that they would be the likeliest tokens of those that do not know them."""
    made = kin(tmp_path_factory.mktemp("kin"), "tied", SIZES, ((), ADDED, ("<|end|>",)), spread=0.08)
    for original, template in zip(made, (PLAIN, CHATML, PLAIN), strict=True):
        with torch.no_grad():
            original.model.model.embed_tokens.weight[VOCAB:] *= 20
        original.model.save_pretrained(original.path)
        tokenizer = original.tokenizer
        tokenizer.chat_template = template
        tokenizer.save_pretrained(original.path)
    return {name: Original(original.path) for name, original in zip(NAMES, made, strict=True)}


@pytest.fixture(scope="module")
def bundle(originals: dict[str, Original], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    sources = {name: str(original.path) for name, original in originals.items()}
    return merge({"experts": sources, "compress_rate": 0.0}, tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> MixedModel:
    return load_model(bundle, device="cpu")


def expected(original: Original, ids: torch.Tensor, **options: object) -> list[int]:
    with torch.no_grad():
        made = original.model.generate(ids[None], max_new_tokens=8, do_sample=False, eos_token_id=None, **options)
    new: list[int] = made[0, len(ids) :].tolist()
    return new


@pytest.mark.parametrize("beams", [1, 2])
def test_a_mixed_batch_generates_what_each_original_does(
    model: MixedModel, originals: dict[str, Original], beams: int
) -> None:
    ids = torch.randint(3, VOCAB, (len(NAMES), 5), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "num_beams": beams, "pad_token_id": 0}
    made = model.generate(ids, experts=list(NAMES), **options)[:, ids.shape[1] :].tolist()
    assert made == [expected(originals[name], ids[row], num_beams=beams) for row, name in enumerate(NAMES)]
    average = model.generate(ids, **options)[:, ids.shape[1] :]
    assert int(average.max()) < VOCAB


def test_without_the_masks_it_would_not(
    bundle: Bundle, originals: dict[str, Original], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading_module, "place_vocabularies", lambda *_: None)
    model = load_model(bundle, device="cpu")
    ids = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(3))
    made = model.generate(ids, experts="plain", max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert int(made.max()) >= VOCAB


def test_logits_have_one_shape_and_no_place_for_the_unknown(model: MixedModel, originals: dict[str, Original]) -> None:
    ids = torch.tensor([[5, 9, 11]] * 3)
    whole = model(ids, experts=list(NAMES)).logits
    assert whole.shape == (3, 3, PADDED)
    for row, size in enumerate(SIZES):
        assert bool((whole[row, :, size:] == -torch.inf).all()) and bool(whole[row, :, :size].isfinite().all())
    pair = model(ids[:1], experts="plain", return_dict=False)
    torch.testing.assert_close(pair[0], whole[:1])
    average = model(ids[:1]).logits
    assert bool((average[..., VOCAB:] == -torch.inf).all())
    average = model(ids[:1], experts=["average"]).logits
    assert bool((average[..., VOCAB:] == -torch.inf).all())


def test_a_token_that_an_expert_does_not_know_is_refused(model: MixedModel) -> None:
    ids = torch.tensor([[5, 9], [5, VOCAB]])
    model(ids, experts=["plain", "wide"])
    for experts, name in ((["wide", "plain"], "plain"), (None, "average")):
        with pytest.raises(ModelError, match=rf"token {VOCAB}: the vocabulary of '{name}' ends at {VOCAB - 1}"):
            model(ids, experts=experts)
        with pytest.raises(ModelError, match=f"token {VOCAB}"):
            model.generate(ids, experts=experts, max_new_tokens=1)
    padding = torch.tensor([[1, 1], [1, 0]])  # is seen by nobody
    model(ids, experts="plain", attention_mask=padding)


def test_a_loss_over_tokens_that_are_not_known_is_refused(model: MixedModel) -> None:
    ids = torch.tensor([[5, 9]])
    with pytest.raises(ModelError, match=r"labels: .*take it from the logits"):
        model(ids, experts="plain", labels=ids)


def test_mixtures_know_what_all_their_members_know(tmp_path: Path) -> None:
    pair = kin(tmp_path, "untied", (VOCAB, PADDED), ((), ()))  # one tokenizer
    sources = {name: str(original.path) for name, original in zip(("plain", "padded"), pair, strict=True)}
    model = load_model(merge({"experts": sources}, tmp_path / "bundle"), device="cpu")
    logits = model(torch.tensor([[5, 9]] * 2), experts=[{"plain": 1.0, "padded": 1.0}, "padded"]).logits
    assert bool((logits[0, :, VOCAB:] == -torch.inf).all()) and bool(logits[1].isfinite().all())


def test_the_engine_answers_and_scores_as_each_original(bundle: Bundle, originals: dict[str, Original]) -> None:
    engine = HFEngine.from_bundle(bundle, device="cpu")
    prompts = {name: engine.chat_prompt([{"role": "user", "content": TEXT}], expert=name) for name in NAMES}
    assert prompts == {name: originals[name].prompt() for name in NAMES}
    requests = [GenerateRequest(prompts[name], name, ROOM) for name in NAMES * 2]
    answers = [generation.text for generation in engine.generate(requests)]
    assert answers == [originals[name].answer() for name in NAMES * 2]
    scores = engine.loglikelihood([ScoreRequest(prompts[name], [7, 8, 9], name) for name in NAMES])
    for name, score in zip(NAMES, scores, strict=True):
        ids = torch.tensor([[*prompts[name], 7, 8, 9]])
        with torch.no_grad():
            chances = originals[name].model(ids).logits[0].log_softmax(-1)
        wanted = float(chances[-4:-1].gather(1, ids[0, -3:, None]).sum())
        assert score.log_likelihood == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(("name", "size"), [("plain", VOCAB), ("wide", WIDE), (None, VOCAB)])
def test_the_engine_refuses_tokens_that_an_expert_does_not_know(bundle: Bundle, name: str | None, size: int) -> None:
    engine = HFEngine.from_bundle(bundle, device="cpu")
    for request in (ScoreRequest([5, size], [7], name), ScoreRequest([5], [size], name)):
        with pytest.raises(ModelError, match=f"token {size}: the vocabulary ends at {size - 1}"):
            engine.loglikelihood([request])


def test_the_server_s_probe_takes_it(bundle: Bundle) -> None:
    probe(HFEngine.from_bundle(bundle, device="cpu"), bundle)


def test_plain_peft_runs_who_knows_all_rows_and_others_are_refused_by_name(
    bundle: Bundle, originals: dict[str, Original], tmp_path: Path
) -> None:
    ids = torch.tensor([[5, 9, VOCAB]])
    exported = export_peft(bundle, "padded", tmp_path / "adapter")
    base = hf.AutoModelForCausalLM.from_pretrained(bundle.path)
    with torch.no_grad():
        logits = peft.PeftModel.from_pretrained(base, exported.folder)(ids).logits
        torch.testing.assert_close(logits, originals["padded"].model(ids).logits, rtol=1e-5, atol=1e-4)
    for name, size in (("plain", VOCAB), ("wide", WIDE)):
        words = f"expert '{name}': its vocabulary has {size} tokens, and the average, .* {PADDED}, .*--to dense"
        with pytest.raises(ModelError, match=words):
            export_peft(bundle, name, tmp_path / "no")


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_plain_peft_reads_own_rows(head: str, tmp_path: Path) -> None:
    pair = kin(tmp_path, head, (WIDE, WIDE), (ADDED, ("<|end|>",)))
    sources = {name: str(original.path) for name, original in zip(("one", "two"), pair, strict=True)}
    ends = {"embeddings": "average", "lm_head": "average", "scale": "shared"}
    bundle = merge({"experts": sources, "compress_rate": 0.5, **ends}, tmp_path / "bundle")
    assert adapter_shapes(bundle, "two")["model.embed_tokens.weight"] == (2, 48)
    ids = torch.tensor([[5, 9, VOCAB, VOCAB + 1]])
    dense = Original(export_dense(bundle, "two", tmp_path / "dense"))
    base = hf.AutoModelForCausalLM.from_pretrained(bundle.path)
    with torch.no_grad():
        logits = peft.PeftModel.from_pretrained(base, export_peft(bundle, "two", tmp_path / "peft").folder)(ids).logits
        torch.testing.assert_close(logits, dense.model(ids).logits, rtol=1e-4, atol=1e-4)
        mixed = load_model(bundle, device="cpu")(ids, experts="two").logits
    torch.testing.assert_close(mixed, dense.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_vllm_refuses_tables_of_another_size_by_name(tmp_path: Path) -> None:
    pair = kin(tmp_path, "untied", (PADDED, VOCAB), ((), ()))  # one tokenizer
    sources = {name: str(original.path) for name, original in zip(("padded", "plain"), pair, strict=True)}
    bundle = merge({"experts": sources}, tmp_path / "bundle")
    with pytest.raises(ModelError, match="expert 'plain' has its own vocabulary"):
        plan_vllm(bundle)


def test_a_resized_adapter_s_expert_has_its_own_size(tmp_path: Path) -> None:
    """PEFT's own `save_embedding_layers`, over a base that is an expert too."""
    [base] = kin(tmp_path, "untied", (VOCAB,), ((),))
    tuned = hf.AutoModelForCausalLM.from_pretrained(base.path)
    tuned.resize_token_embeddings(WIDE, mean_resizing=False)
    adapted = peft.get_peft_model(tuned, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=4))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer_with(*ADDED).save_pretrained(tmp_path / "adapter")
    sources = {"plain": str(base.path), "tuned": {"source": str(tmp_path / "adapter"), "base": str(base.path)}}
    bundle = merge({"experts": sources, "compress_rate": 0.0}, tmp_path / "bundle")
    assert [bundle.vocabulary(name) for name in bundle.experts] == [VOCAB, None]
    ids = torch.tensor([[5, 9, 11]] * 2)
    logits = load_model(bundle, device="cpu")(ids, experts=["plain", "tuned"]).logits
    with torch.no_grad():
        torch.testing.assert_close(logits[1:], adapted.eval()(ids[:1]).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[:1, :, :VOCAB], base.model(ids[:1]).logits, rtol=1e-4, atol=1e-4)
