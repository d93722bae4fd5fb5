"""A router without labels: what it is fitted to, what it notes, and what it does not claim."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polymerge.bundle.bundle import Bundle
from polymerge.errors import RouterError
from polymerge.router.described import FORMS, by_name, described_samples
from polymerge.router.feedback import learn
from polymerge.router.fit import fit_samples
from polymerge.router.kinds import made_samples
from polymerge.router.router import Router
from polymerge.router.samples import Sample
from tests.conftest import Merged
from tests.router.scripted import ScriptedEngine, make_samples

WORDS = {"math": "sum plus times", "shell": "files folder grep", "json": "object key array"}
EXPERTS = {"math": "e0", "shell": "e1", "json": "e2"}


@pytest.fixture
def bundle(merged: Merged, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(merged("llama")[0].path, tmp_path / "bundle"))


@pytest.fixture
def engine() -> Any:
    return ScriptedEngine(("e0", "e1", "e2"))


def test_names_become_words_and_descriptions_sentences() -> None:
    assert by_name(["sql_fix", "bank-support"]) == {"sql_fix": "sql fix", "bank-support": "bank support"}
    samples = described_samples({"math": " word {problems} "})
    assert len(samples) == len(FORMS) and samples[0] == Sample("word {problems}", "math")
    assert any(sample.text.startswith("Word {problems}:") for sample in samples)


@pytest.mark.parametrize(("words", "fault"), [({"math": " "}, "empty description"), ({"none": "rest"}, "'none'")])
def test_descriptions_that_say_nothing_are_refused(words: dict[str, str], fault: str) -> None:
    with pytest.raises(RouterError, match=fault):
        described_samples(words)


def test_a_router_of_descriptions_alone_finds_the_field_and_claims_no_accuracy(bundle: Bundle, engine: Any) -> None:
    fitted = fit_samples(bundle, engine, [], made=described_samples(WORDS), descriptions=WORDS, experts=EXPERTS)
    fitted.router.save(bundle)
    router = Router.load(bundle, engine)
    assert router.record.labelled == 0 and router.record.descriptions == WORDS
    asked = make_samples(8)
    routes = router.route([sample.text for sample in asked])
    assert sum(route.field == sample.field for route, sample in zip(routes, asked, strict=True)) >= 20
    report = fitted.report
    assert (
        report["measured_on"] is report["accuracy"] is report["calibration_error"] is report["new_wording_kept"] is None
    )
    # what the threshold promises is read off the background
    assert report["strangers_refused"] == pytest.approx(0.95, abs=0.02)


def test_samples_go_beside_descriptions_and_feedback_keeps_them_apart(bundle: Bundle, engine: Any) -> None:
    samples = make_samples(2)
    made = described_samples(WORDS)
    fitted = fit_samples(
        bundle, engine, samples, make_samples(4, seed=1), made=made, descriptions=WORDS, experts=EXPERTS
    )
    assert fitted.router.record.labelled == len(samples) and fitted.report["measured_on"] == "validation"
    again = learn(bundle, fitted.router, make_samples(3, seed=2), [])
    assert again.router.record.labelled == len(samples) + 9
    assert again.router.record.descriptions == WORDS
    assert len(again.router.samples) == len(samples) + 9 + len(made)


def test_words_beside_samples_move_the_classifier_alone(bundle: Bundle, engine: Any) -> None:
    samples, made = make_samples(3), described_samples(WORDS)
    alone = fit_samples(bundle, engine, samples, experts=EXPERTS)
    beside = fit_samples(bundle, engine, samples, beside=made, descriptions=WORDS, experts=EXPERTS)
    before, after = (fitted.router.head.to_arrays() for fitted in (alone, beside))
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {
        "classifier.weights", "classifier.bias"
    }  # fmt: skip
    assert beside.router.samples == alone.router.samples and beside.report["labelled"] == len(samples)
    part = [sample for sample in made if sample.field != "math"]  # of other fields nothing is known
    same = fit_samples(bundle, engine, samples, beside=part, experts=EXPERTS).router.head.to_arrays()
    assert all(np.array_equal(before[name], same[name]) for name in before)


def test_feedback_makes_what_stood_beside_samples_again(bundle: Bundle, engine: Any) -> None:
    samples, held, new = make_samples(3), make_samples(4, seed=1), make_samples(2, seed=2)
    words: dict[str, Any] = {"beside": made_samples(engine, WORDS), "descriptions": WORDS, "experts": EXPERTS}
    again = learn(bundle, fit_samples(bundle, engine, samples, held, **words).router, new, []).router
    whole = fit_samples(bundle, engine, [*samples, *new], held, **words).router
    plain = fit_samples(bundle, engine, [*samples, *new], held, experts=EXPERTS).router
    weights = [router.head.classifier.arrays["weights"] for router in (again, whole, plain)]
    assert np.array_equal(weights[0], weights[1]) and not np.array_equal(weights[0], weights[2])
    assert again.record.descriptions == WORDS


def test_made_samples_are_learned_from_and_never_measured_on(bundle: Bundle, engine: Any) -> None:
    turned = {"math": "shell", "shell": "json", "json": "math"}
    samples = [Sample(sample.text, turned[sample.field]) for sample in make_samples(2)]  # against the descriptions
    made = described_samples(WORDS)
    report = fit_samples(bundle, engine, samples, made=made, descriptions=WORDS, experts=EXPERTS).report
    assert report["measured_on"] == "cross-validation" and report["labelled"] == len(samples)
    assert report["accuracy"] in {n / len(samples) for n in range(3)}  # 6 samples, and not 18
