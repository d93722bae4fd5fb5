"""Vocabularies that share a beginning: the bundle's table holds the union, and every expert keeps its own rows.

The oracles are transformers' own forward and tables on the originals.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polymerge import Bundle, add_expert, export_dense, load_model, merge, plan_merge, remove_expert, verify
from polymerge.bundle.adapter import adapter_shapes
from polymerge.errors import SourceError
from polymerge.merging.vocabulary import numbers_of, ranges_of
from polymerge.sources.checkpoint import SafetensorsCheckpoint
from tests.fine_tunes import Original
from tests.killed import content
from tests.tiny import VOCAB, make_experts, tiny_tokenizer
from tests.vocabularies import ADDED, HEADS, PADDED, WIDE, kin, tokenizer_with

pytestmark = pytest.mark.usefixtures("one_thread")
EMBEDDING = "model.embed_tokens.weight"
NAMES = ("plain", "wide", "padded")
SIZES = {"plain": VOCAB, "wide": WIDE, "padded": PADDED}
TOKENS: tuple[tuple[str, ...], ...] = ((), ADDED, ("<|end|>",))
# Of `padded`: `wide` has another token at the first, and one where it has padding at the second.
OWN = [VOCAB, VOCAB + 1]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Original]]:
    folder = tmp_path_factory.mktemp("kin")
    return {
        head: dict(zip(NAMES, kin(folder / head, head, list(SIZES.values()), TOKENS), strict=True)) for head in HEADS
    }


def merged(originals: dict[str, Original], out: Path, *names: str, average: bool = False, **recipe: Any) -> Bundle:
    ends = dict.fromkeys(("embeddings", "lm_head", "norms"), "average") if average else {}
    experts = {name: str(originals[name].path) for name in names or NAMES}
    return merge({"experts": experts, "compress_rate": 0.0, **ends, **recipe}, out)


def alone(original: Original, out: Path, **recipe: Any) -> Bundle:
    """One expert under two names."""
    return merged({"first": original, "again": original}, out, "first", "again", **recipe)


def tables(original: Original) -> dict[str, Tensor]:
    model = original.model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    found = {"embedding": embedding.weight, "head": head.weight, "bias": head.bias}
    return {name: table.detach() for name, table in found.items() if table is not None}


def check_same(bundle: Bundle, originals: dict[str, Original]) -> None:
    """A mixed batch against every original: its logits, and none behind its vocabulary."""
    model, names = load_model(bundle), list(originals)
    ids = torch.randint(3, VOCAB, (len(names), 6), generator=torch.Generator().manual_seed(1))
    logits = model(ids, experts=names).logits
    for row, name in enumerate(names):
        with torch.no_grad():
            expected = originals[name].model(ids[row : row + 1]).logits[0]
        size = expected.shape[-1]
        torch.testing.assert_close(logits[row, :, :size], expected, rtol=1e-5, atol=1e-5)
        assert bool((logits[row, :, size:] == -torch.inf).all())


@pytest.mark.parametrize("head", HEADS)
def test_every_expert_answers_as_its_original(
    originals: dict[str, dict[str, Original]], head: str, tmp_path: Path
) -> None:
    bundle = merged(originals[head], tmp_path / "bundle")
    check_same(bundle, originals[head])
    manifest = bundle.manifest
    assert manifest.format_version == 4 and manifest.vocabulary == VOCAB
    assert [record.vocabulary for record in manifest.experts.values()] == [VOCAB, WIDE, None]
    assert "experts have their own vocabularies (plain 96, wide 98, padded 128); the average has 'plain's" in (
        " ".join(manifest.notes).replace("''s", "'s")
    )
    result = verify(bundle, sources=True)
    assert result.ok and all(check.exact == check.tensors for check in result.sources)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_a_dense_export_has_the_expert_s_own_size(
    originals: dict[str, dict[str, Original]], head: str, average: bool, tmp_path: Path
) -> None:
    bundle = merged(originals[head], tmp_path / "bundle", average=average)
    dense = {name: Original(export_dense(bundle, name, tmp_path / name)) for name in NAMES}
    check_same(bundle, dense)
    for name, original in originals[head].items():
        assert dense[name].model.config.vocab_size == SIZES[name] == len(tables(dense[name])["embedding"])
        assert dense[name].tokenizer.get_vocab() == original.tokenizer.get_vocab()
        if not average:
            check_same(bundle, {name: original})


@pytest.mark.parametrize("head", HEADS)
def test_an_averaged_row_is_the_mean_of_those_that_have_its_token(
    originals: dict[str, dict[str, Original]], head: str, tmp_path: Path
) -> None:
    bundle = merged(originals[head], tmp_path / "bundle", average=True)
    plain, wide, padded = (tables(originals[head][name]) for name in NAMES)
    for kind in plain:
        common = torch.stack([t[kind][:VOCAB] for t in (plain, wide, padded)]).mean(0)
        expected = {
            "plain": common,
            "wide": torch.cat([common, wide[kind][VOCAB:]]),
            "padded": torch.cat([common, padded[kind][VOCAB:]]),
        }
        for name, rows in expected.items():
            stored = tables(Original(export_dense(bundle, name, tmp_path / f"{kind}-{name}")))[kind]
            torch.testing.assert_close(stored, rows)
    assert [record.own_rows for record in bundle.manifest.experts.values()] == [[], [], OWN]
    stored = {name: adapter_shapes(bundle, name).get(EMBEDDING) for name in NAMES}
    assert stored == {"plain": None, "wide": None, "padded": (len(OWN), 48)}
    assert verify(bundle, sources=True).ok


@pytest.mark.parametrize("average", [False, True])
def test_tokens_trained_into_padding_rows_are_their_expert_s(average: bool, tmp_path: Path) -> None:
    pair = kin(tmp_path, "tied", (PADDED, PADDED), ((), ADDED))
    made = dict(zip(("plain", "trained"), pair, strict=True))
    bundle = merged(made, tmp_path / "bundle", *made, average=average)
    rows = torch.tensor(OWN)
    plain, trained = (tables(original)["embedding"] for original in pair)
    base = bundle.base_tensor(EMBEDDING)
    assert torch.equal(base[rows], trained[rows]) and not torch.equal(base[:VOCAB], trained[:VOCAB])
    assert torch.equal(bundle.reconstruct("plain", EMBEDDING)[rows], plain[rows])
    assert bundle.manifest.format_version == (4 if average else 3)
    assert bundle.manifest.experts["plain"].own_rows == (OWN if average else [])
    if not average:
        check_same(bundle, made)


def test_a_frozen_table_is_stored_once_and_own_rows_beside_it(tmp_path: Path) -> None:
    pair = kin(tmp_path, "tied", (WIDE, WIDE), (ADDED, ("<|end|>",)))
    for original in pair:
        with torch.no_grad():
            original.model.model.embed_tokens.weight[:VOCAB] = 0.1
        original.model.save_pretrained(original.path)
    made = dict(zip(("one", "two"), pair, strict=True))
    bundle = merged(made, tmp_path / "bundle", *made)
    assert EMBEDDING not in adapter_shapes(bundle, "one") and adapter_shapes(bundle, "two")[EMBEDDING] == (2, 48)
    check_same(bundle, made)
    assert verify(bundle, sources=True).ok


def test_tables_padded_alone_are_not_a_difference_of_tokens(tmp_path: Path) -> None:
    pair = kin(tmp_path, "untied", (VOCAB, 64 * 2), ((), ()))
    made = dict(zip(("plain", "padded"), pair, strict=True))
    bundle = merged(made, tmp_path / "bundle", *made, average=True)
    assert [record.rows for record in bundle.manifest.experts.values()] == [(), ()]
    assert bundle.vocabulary("plain") == VOCAB and bundle.vocabulary("padded") is None
    padded = tables(pair[1])["embedding"]
    assert torch.equal(bundle.base_tensor(EMBEDDING)[VOCAB:], padded[VOCAB:])


def contradicting(folder: Path) -> dict[str, str]:
    """Two words changed their places."""
    paths = make_experts("llama", folder, count=2)
    tiny_tokenizer().save_pretrained(paths["e0"])
    tiny_tokenizer().save_pretrained(paths["e1"])
    file = paths["e1"] / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace('"w40"', '"x"').replace('"w50"', '"w40"').replace('"x"', '"w50"'))
    return {name: str(path) for name, path in paths.items()}


def test_vocabularies_that_contradict_each_other_are_refused_before_a_tensor_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = contradicting(tmp_path)
    monkeypatch.setattr(SafetensorsCheckpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(SafetensorsCheckpoint, "read_rows", lambda *_: pytest.fail("a tensor was read"))
    words = r"expert 'e0' and expert 'e1' have other vocabularies: token 40 is 'w40' in one and 'w50' in the other"
    with pytest.raises(SourceError, match=words):
        plan_merge({"experts": sources})


def test_one_that_contradicts_is_not_added(tmp_path: Path) -> None:
    sources = contradicting(tmp_path)
    bundle = alone(Original(Path(sources["e0"])), tmp_path / "bundle")
    before = content(bundle.path)
    with pytest.raises(SourceError, match="the average and expert 'e1' have other vocabularies: token 40"):
        add_expert(bundle, "e1", sources["e1"])
    assert content(bundle.path) == before


@pytest.mark.parametrize("head", HEADS)
def test_an_expert_with_fewer_tokens_is_added(
    originals: dict[str, dict[str, Original]], head: str, tmp_path: Path
) -> None:
    of = originals[head]
    bundle = alone(of["padded"], tmp_path / "bundle")
    assert bundle.manifest.format_version == 1
    for name in ("plain", "wide"):
        bundle = add_expert(bundle, name, of[name].path).bundle
    check_same(bundle, {"plain": of["plain"], "wide": of["wide"], "first": of["padded"]})
    assert verify(bundle, sources=True).ok and bundle.manifest.format_version == 4
    assert bundle.manifest.vocabulary is None  # the average's are all rows, as they were
    for name in ("plain", "wide"):
        bundle = remove_expert(bundle, name)
    assert bundle.manifest.format_version == 1 and not any(layer.table for layer in bundle.manifest.layers)


def test_one_that_is_added_keeps_its_own_rows_where_others_are_averaged(
    originals: dict[str, dict[str, Original]], tmp_path: Path
) -> None:
    of = originals["untied"]
    bundle = alone(of["padded"], tmp_path / "bundle", average=True)
    bundle = add_expert(bundle, "wide", of["wide"].path).bundle
    assert bundle.manifest.experts["wide"].own_rows == OWN
    own, base = tables(of["wide"]), bundle.base_tensor(EMBEDDING)
    for tensor, kind in ((EMBEDDING, "embedding"), ("lm_head.weight", "head")):
        stored = bundle.reconstruct("wide", tensor)
        assert len(stored) == WIDE and torch.equal(stored[OWN], own[kind][OWN])
    assert torch.equal(bundle.reconstruct("wide", EMBEDDING)[:VOCAB], base[:VOCAB])
    assert verify(bundle, sources=True).ok


def test_an_expert_with_more_tokens_is_refused_with_one_line(
    originals: dict[str, dict[str, Original]], tmp_path: Path
) -> None:
    bundle = alone(originals["tied"]["plain"], tmp_path / "bundle")
    before = content(bundle.path)
    with pytest.raises(SourceError, match=r"expert 'wide' has 98 tokens, .* 96 rows; merge all of them anew"):
        add_expert(bundle, "wide", originals["tied"]["wide"].path)
    assert content(bundle.path) == before


def test_verify_sees_own_rows_and_sizes_that_are_not_the_source_s(
    originals: dict[str, dict[str, Original]], tmp_path: Path
) -> None:
    of = originals["untied"]
    bundle = merged(of, tmp_path / "bundle", average=True)
    changed = Original(Path(export_dense(merged(of, tmp_path / "exact"), "padded", tmp_path / "changed")))
    with torch.no_grad():
        changed.model.model.embed_tokens.weight[OWN[1]] += 1
    changed.model.save_pretrained(changed.path)
    [problem] = verify(bundle, source={"padded": str(changed.path)}).problems
    assert problem.startswith(f"expert 'padded': tensor {EMBEDDING!r} is ")
    wide = {"plain": str(of["wide"].path)}
    assert "expert 'plain': its vocabulary has 96 tokens, that of " in " ".join(verify(bundle, source=wide).problems)


@pytest.mark.parametrize("code", ["factors", "int4"])
def test_the_same_bytes_again_whatever_the_code(
    originals: dict[str, dict[str, Original]], code: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"average": True, "code": code, "compress_rate": 0.5}
    one, two = (merged(originals["tied"], tmp_path / out, **options) for out in ("one", "two"))
    assert content(one.path) == content(two.path)
    own = tables(originals["tied"]["padded"])["embedding"]
    assert torch.equal(one.reconstruct("padded", EMBEDDING)[VOCAB:], own[VOCAB:])
    assert verify(one, sources=True).ok


def test_who_has_no_tokenizer_speaks_with_the_first_that_there_is(tmp_path: Path) -> None:
    paths = make_experts("llama", tmp_path, count=2)
    tokenizer_with(*ADDED[:0]).save_pretrained(paths["e0"])
    plan = plan_merge({"experts": {name: str(path) for name, path in paths.items()}})
    assert plan.tables is None


def test_ranges_are_their_numbers() -> None:
    for rows in ([], [3], [0, 1, 2], [1, 3, 4, 9]):
        assert numbers_of(ranges_of(rows)) == rows
    assert ranges_of([1, 3, 4, 9]) == ((1, 2), (3, 5), (9, 10))


def test_verify_sees_a_table_of_the_base_that_is_not_the_mean_of_its_makers(
    originals: dict[str, dict[str, Original]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = originals["untied"]
    monkeypatch.setattr("polymerge.merging.vocabulary._own", lambda *_: ())  # a merge that mixes other tokens
    wrong = merged(of, tmp_path / "wrong", average=True)
    monkeypatch.undo()
    assert [record.rows for record in wrong.manifest.experts.values()] == [()] * 3
    problems = verify(wrong, sources=True).problems
    assert any(f"base: tensor {EMBEDDING!r} is " in problem for problem in problems)


def unreadable(path: Path) -> None:
    """A tokenizer of a class that this machine does not have."""
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "NobodysTokenizer"}))


@pytest.mark.parametrize("table", ["embeddings", "lm_head"])
def test_tokens_that_cannot_be_read_are_said_and_never_averaged(table: str, tmp_path: Path) -> None:
    pair = kin(tmp_path, "untied", (VOCAB, VOCAB), ((), ()))
    unreadable(pair[1].path)
    made = dict(zip(("one", "two"), pair, strict=True))
    words = "the tokenizer of expert 'two' cannot be opened here"
    bundle = merged(made, tmp_path / "bundle", *made)
    assert any(note.startswith(words) for note in bundle.manifest.notes)
    with pytest.raises(SourceError, match=f"{words}.*averaged"):
        merged(made, tmp_path / "averaged", *made, **{table: "average"})
    of_one = alone(pair[0], tmp_path / "of-one")
    assert add_expert(of_one, "two", pair[1].path).note.startswith(words)
    averaged = alone(pair[0], tmp_path / "of-one-averaged", **{table: "average"})
    with pytest.raises(SourceError, match=f"{words}.*averaged"):
        add_expert(averaged, "two", pair[1].path)
