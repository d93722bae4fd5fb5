"""The prompt around a text, as tokens, and what happens to a text that is too long."""

import numpy as np
import pytest

from polymerge.engine.local.engine import HFEngine
from polymerge.errors import RouterError
from polymerge.model.loading import load_model
from polymerge.router.embed import ALIGNMENT_PROMPT, TASK_PROMPT, Embedder, EmbedSettings, cut_middle, default_layers
from polymerge.router.fit import fit_samples
from polymerge.router.settings import with_template
from tests.conftest import Merged
from tests.router.scripted import ScriptedEngine, make_samples
from tests.tiny import tiny_tokenizer


def test_the_prompt_is_the_published_one() -> None:
    assert ALIGNMENT_PROMPT.startswith("{input} Let's think about what task these questions belong to. ")
    assert ALIGNMENT_PROMPT.endswith("These questions belong to the field of")


def test_a_text_stands_between_the_prompts_tokens() -> None:
    engine = ScriptedEngine()
    Embedder(engine, EmbedSettings(template="before {input} after that")).embed(["sum plus"])
    assert engine.decode(engine.seen[0]) == "before sum plus after that"
    assert engine.seen[0][0] == 0 and engine.seen[0].count(0) == 1


def test_a_long_text_is_cut_in_the_middle_and_the_route_says_so() -> None:
    engine = ScriptedEngine(max_length=12)
    words = [f"n{number}" for number in range(20)]
    vectors, truncated = Embedder(engine, EmbedSettings(template="{input} the end")).embed([" ".join(words), "n1"])
    assert truncated == [20 - 9, 0] and vectors.shape[0] == 2
    assert engine.decode(engine.seen[0]) == "n0 n1 n2 n3 n4 n16 n17 n18 n19 the end"


@pytest.mark.parametrize("room", range(2, 12))
def test_a_cut_keeps_both_ends_and_counts_what_it_drops(room: int) -> None:
    kept, cut = cut_middle(range(10), room)
    assert len(kept) == min(10, room) and len(kept) + cut == 10
    assert kept[0] == 0 and kept[-1] == 9


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    with pytest.raises(RouterError, match="leaves 1 of 4 tokens"):
        Embedder(ScriptedEngine(max_length=4), EmbedSettings(template="one {input} two"))


def test_several_layers_stand_side_by_side_each_of_length_1() -> None:
    vectors, _ = Embedder(ScriptedEngine(), EmbedSettings(layers=(2, -1))).embed(["sum", "plus n1"])
    parts = vectors.reshape(2, 2, -1)
    assert np.allclose(np.linalg.norm(parts, axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "layers"), [(30, (-11, -9, -7)), (12, (-5, -4, -3)), (2, (-2, -1)), (1, (-1,)), (80, (-28, -22, -17))]
)
def test_the_default_layers_lie_where_they_do_in_a_model_of_any_depth(depth: int, layers: tuple[int, ...]) -> None:
    assert default_layers(depth) == layers


def test_a_model_of_two_layers_has_a_router_and_its_record_names_the_layers(merged: Merged) -> None:
    bundle, _ = merged("llama")
    engine = HFEngine(load_model(bundle), tiny_tokenizer(), fingerprint=bundle.digest)
    experts = dict.fromkeys(("math", "shell", "json"), engine.experts[0])
    fitted = fit_samples(bundle, engine, make_samples(3), experts=experts)
    assert fitted.router.record.embed.layers == (-2, -1) == default_layers(engine.depth)


def test_a_layer_that_is_asked_for_and_not_there_is_refused(merged: Merged) -> None:
    engine = HFEngine(load_model(merged("llama")[0]), tiny_tokenizer(), fingerprint="")
    with pytest.raises(RouterError, match=r"layers \(-11, -9\): the model has fewer"):
        Embedder(engine, EmbedSettings(layers=(-11, -9))).embed(["a text"])


@pytest.mark.parametrize(
    ("fewest", "template"), [(1, ALIGNMENT_PROMPT), (2, TASK_PROMPT), (15, TASK_PROMPT), (16, ALIGNMENT_PROMPT)]
)
def test_few_samples_are_asked_with_the_task_prompt(merged: Merged, fewest: int, template: str) -> None:
    """As long as nobody chose a prompt, and only of a model that knows the marks in it."""
    assert with_template(EmbedSettings(), ScriptedEngine(), fewest).template == template
    chosen = EmbedSettings(template="{input}")
    assert with_template(chosen, ScriptedEngine(), fewest) is chosen
    without_marks = HFEngine(load_model(merged("llama")[0]), tiny_tokenizer(), fingerprint="")
    assert with_template(EmbedSettings(), without_marks, fewest).template == ALIGNMENT_PROMPT
