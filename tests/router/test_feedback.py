"""A router that learns from use: what rows mean, what is kept, and that it never gets worse."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from polymerge import Bundle
from polymerge.errors import DataError, RouterError
from polymerge.router import feedback
from polymerge.router.feedback import learn_from_feedback, sort_rows
from polymerge.router.fit import fit_samples
from polymerge.router.router import Router
from polymerge.router.samples import Sample
from polymerge.serve.feedback import Feedback
from tests.conftest import Merged
from tests.router.scripted import ScriptedEngine, make_samples

EXPERTS = {"math": "e0", "shell": "e1", "json": "e2"}


@pytest.fixture
def fitted(merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bundle, Any]:
    made, _ = merged("llama")
    bundle, engine = Bundle.open(copytree(made.path, tmp_path / "bundle")), ScriptedEngine(("e0", "e1", "e2"))
    fit_samples(bundle, engine, make_samples(12), make_samples(8, seed=7), experts=EXPERTS).router.save(bundle)
    monkeypatch.setattr(feedback, "load_router", lambda given, device: Router.load(given, engine))
    return bundle, engine


def rows(folder: Path, *triples: tuple[str, str, str]) -> Path:
    file = folder / "rows.jsonl"
    lines = [json.dumps(dict(zip(("prompt", "expert", "verdict"), triple, strict=True))) for triple in triples]
    file.write_text("\n".join(lines))
    return file


def test_what_was_right_and_wrong_is_learned_and_kept(fitted: tuple[Bundle, Any], tmp_path: Path) -> None:
    bundle, engine = fitted
    before = Router.load(bundle, engine)
    told = rows(
        tmp_path,
        ("zeta eta theta", "e1", "right"),
        ("object omega psi", "e2", "wrong"),
        ("zeta eta", "e0", "wrong"),
        ("zeta eta", "e1", "right"),
        ("chi rho", "average", "right"),
    )
    learned = learn_from_feedback(bundle, told)
    after = Router.load(bundle, engine)
    assert (learned.samples, learned.strangers) == (2, 2)
    assert {*after.samples} - {*before.samples} == {Sample("zeta eta theta", "shell"), Sample("zeta eta", "shell")}
    assert {s.text for s in after.held} - {s.text for s in before.held} == {"object omega psi", "chi rho"}
    route = after.route(["eta zeta theta"])[0]
    assert route.field == "shell" and route.scores["shell"] > before.route(["eta zeta theta"])[0].scores["shell"]
    known = [router.judge(router.embedder.embed(["object psi omega"]).vectors).known[0] for router in (before, after)]
    assert known[1] < known[0]
    again = learn_from_feedback(bundle, told).fitted.router
    assert again.samples == after.samples and again.held == after.held


@pytest.mark.parametrize("version", [2, 3])
def test_thresholds_stay_unless_they_are_of_an_older_routers_space(
    fitted: tuple[Bundle, Any], tmp_path: Path, version: int
) -> None:
    bundle, engine = fitted
    router = Router.load(bundle, engine)
    router.record = router.record.model_copy(update={"format_version": version, "threshold": 0.0123})
    samples = [Sample("zeta eta theta", "shell")]
    record = feedback.learn(bundle, router, samples, []).router.record
    assert (record.threshold == 0.0123) is (version == 3) and record.format_version == 3


def test_feedback_that_makes_it_worse_changes_nothing(fitted: tuple[Bundle, Any], tmp_path: Path) -> None:
    bundle, engine = fitted
    record = Router.load(bundle, engine).record
    spoilt = [(sample.text, EXPERTS["math"], "right") for sample in make_samples(60, seed=3, fields=["shell"])]
    with pytest.raises(RouterError, match="the router stays as it is"):
        learn_from_feedback(bundle, rows(tmp_path, *spoilt))
    assert Router.load(bundle, engine).record == record


def test_rows_that_say_nothing_are_one_line(fitted: tuple[Bundle, Any], tmp_path: Path) -> None:
    bundle, _ = fitted
    with pytest.raises(DataError, match=r"line 1.*sends nothing to an expert 'e9'"):
        learn_from_feedback(bundle, rows(tmp_path, ("sum", "e9", "right")))
    with pytest.raises(DataError, match=r"line 1.*verdict"):
        learn_from_feedback(bundle, rows(tmp_path, ("sum", "e0", "good")))


def test_thumbs_that_the_server_kept_are_read_as_they_are(fitted: tuple[Bundle, Any], tmp_path: Path) -> None:
    router = Router.load(*fitted)
    file = tmp_path / "thumbs.jsonl"
    thumbs = [("zeta eta", "e1", True), ("chi rho", "e0", False)]
    file.write_text("".join(Feedback(prompt=p, expert=e, right=r).model_dump_json() + "\n" for p, e, r in thumbs))
    assert sort_rows(router, file) == ([Sample("zeta eta", "shell")], ["chi rho"])
    for wrong in ({}, {"right": True, "verdict": "right"}, {"right": "yes"}):
        file.write_text(json.dumps({"prompt": "sum", "expert": "e0", **wrong}))
        with pytest.raises(DataError, match="line 1"):
            sort_rows(router, file)


def test_a_router_without_validation_samples_is_refused(fitted: tuple[Bundle, Any], tmp_path: Path) -> None:
    bundle, engine = fitted
    fit_samples(bundle, engine, make_samples(12), experts=EXPERTS).router.save(bundle)
    with pytest.raises(RouterError, match="kept no validation samples"):
        learn_from_feedback(bundle, rows(tmp_path, ("sum", "e0", "right")))
