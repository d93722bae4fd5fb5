"""Routers fitted, stored, loaded and asked, on scripted vectors: what is kept, what is refused, what falls back."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

import polymerge.router.router as router_module
from polymerge import Bundle, remove_expert, verify
from polymerge.bundle.lock import writing
from polymerge.errors import LockedError, RouterError
from polymerge.router.classify import KINDS
from polymerge.router.embed import TASK_PROMPT
from polymerge.router.evaluation import measure_router, save_evaluation
from polymerge.router.fit import Fitted, fit_samples
from polymerge.router.record import router_folder
from polymerge.router.router import Router
from polymerge.router.samples import Sample, samples_of
from polymerge.router.settings import FitSettings, fit_settings
from tests.conftest import Merged
from tests.router.scripted import ScriptedEngine, make_samples, strangers

EXPERTS = {"math": "e0", "shell": "e1", "json": "e2"}
TRAIN, HELD, TEST = make_samples(24), make_samples(16, seed=7), make_samples(20, seed=8)


@pytest.fixture
def bundle(merged: Merged, tmp_path: Path) -> Bundle:
    """A copy of a tiny bundle, whose router folder is this test's own."""
    made, _ = merged("llama")
    return Bundle.open(copytree(made.path, tmp_path / "bundle"))


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(("e0", "e1", "e2"))


def fit(bundle: Bundle, engine: Any, held: Any = HELD, **settings: Any) -> Fitted:
    return fit_samples(bundle, engine, TRAIN, held, settings=FitSettings(**settings), experts=EXPERTS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_answers_the_same_after_it_was_stored(bundle: Bundle, engine: Any, kind: Any) -> None:
    router = fit(bundle, engine, classifier=kind).router
    texts = [sample.text for sample in [*TEST, *strangers(10)]]
    before = router.route(texts)
    router.save(bundle)
    assert Router.load(bundle, engine).route(texts) == before
    assert Router.load(bundle, engine).fingerprint == router.fingerprint
    assert not [file for file in router_folder(bundle.path).rglob("*") if file.suffix in (".pkl", ".joblib", ".pt")]


@pytest.mark.parametrize("kind", KINDS)
def test_known_texts_meet_their_expert_and_strangers_the_fallback(bundle: Bundle, engine: Any, kind: Any) -> None:
    router = fit(bundle, engine, classifier=kind, coverage=0.9).router
    evaluation = measure_router(router, [*TEST, *strangers(40)])
    assert evaluation.accuracy is not None and evaluation.accuracy > 0.95
    assert evaluation.auroc is not None and evaluation.auroc > 0.9
    assert evaluation.outside_to_fallback is not None and evaluation.outside_to_fallback > 0.6
    for sample, route in zip(TEST, router.route([sample.text for sample in TEST]), strict=True):
        assert sum(route.scores.values()) == pytest.approx(1)
        assert route.fallback == (route.confidence < router.record.threshold)
        if not route.fallback:
            assert route.expert == EXPERTS[route.field]
        assert [n.similarity for n in route.neighbours] == sorted(
            (n.similarity for n in route.neighbours), reverse=True
        )
        assert route.to_json()["field"] == route.field and sample.text


def test_writing_a_router_does_not_change_the_bundle(bundle: Bundle, engine: Any) -> None:
    digest = bundle.digest
    fit(bundle, engine).router.save(bundle)
    assert Bundle.open(bundle.path).digest == digest
    assert not list(Bundle.open(bundle.path).damaged_files())


def test_a_second_fit_leaves_one_router(bundle: Bundle, engine: Any) -> None:
    for kind in KINDS:
        fit(bundle, engine, classifier=kind).router.save(bundle)
    names = sorted(file.suffix for file in router_folder(bundle.path).iterdir())
    assert names == [".json", ".jsonl", ".jsonl", ".safetensors"]
    assert Router.load(bundle, engine).record.classifier == KINDS[-1]


def test_a_kill_between_two_files_leaves_the_router_before(
    bundle: Bundle, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(bundle, engine).router.save(bundle)
    before = Router.load(bundle, engine).route(["sum n1"])
    from polymerge.router import record

    real, written = record.write_bytes, []

    def dies(target: Path, data: bytes) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(target)
        return real(target, data)

    monkeypatch.setattr(record, "write_bytes", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(bundle, engine, classifier="knn").router.save(bundle)
    assert Router.load(bundle, engine).route(["sum n1"]) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "router.json").unlink(), "run `polymerge router fit"),
        (lambda folder: (folder / "router.json").write_text("{"), "cannot be read"),
        (lambda folder: _edit(folder, bundle="0" * 64), "fitted for another bundle"),
        (lambda folder: _edit(folder, fields=["math"], experts={"math": "gone"}), "routes to 'gone'"),
        (lambda folder: _edit(folder, temperature="warm"), "temperature"),
        (lambda folder: _edit(folder, surprise=1), "surprise"),
        (lambda folder: _edit(folder, format_version=4), "format version 4"),
        (lambda folder: _edit(folder, weights="../../elsewhere"), "weights"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "missing"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"x"), "not what its name says"),
        (lambda folder: next(folder.glob("*.jsonl")).write_text(""), "not what its name says"),
    ],
)
def test_a_router_that_is_not_this_bundles_or_not_whole_is_one_line(
    bundle: Bundle, engine: Any, damage: Callable[[Path], object], message: str
) -> None:
    fit(bundle, engine).router.save(bundle)
    damage(router_folder(bundle.path))
    with pytest.raises(RouterError, match=message) as raised:
        Router.load(bundle, engine)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "router.json").write_text("{"), "router/router.json: "),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "is missing"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"x"), "not what its name says"),
        (lambda folder: next(folder.glob("samples-*")).write_text(""), "not what its name says"),
    ],
)
def test_verify_finds_a_router_that_is_not_whole(
    bundle: Bundle, engine: Any, damage: Callable[[Path], object], message: str
) -> None:
    fit(bundle, engine).router.save(bundle)
    assert verify(bundle).ok
    damage(router_folder(bundle.path))
    [problem] = verify(bundle).problems
    assert message in problem and "polymerge router fit" in problem


def test_verify_finds_every_changed_digit_of_a_routers_record(bundle: Bundle, engine: Any) -> None:
    fit_samples(
        bundle, engine, TRAIN, HELD, table={"math": {"e0": 0.2, "e1": 0.9}}, experts={"shell": "e2", "json": "e1"}
    ).router.save(bundle)
    file = router_folder(bundle.path) / "router.json"
    whole = file.read_text()
    missed, damages = [], 0
    for at in (number for number, letter in enumerate(whole) if letter.isdigit()):
        file.write_text(f"{whole[:at]}{(int(whole[at]) + 1) % 10}{whole[at + 1 :]}")
        damages += json.loads(file.read_text()) != json.loads(whole)  # a float's last digit may round away
        if verify(bundle).ok and json.loads(file.read_text()) != json.loads(whole):
            missed.append(file.read_text()[at - 20 : at + 5])
    assert damages > 100 and not missed
    older = {name: value for name, value in json.loads(whole).items() if name != "digest"}
    file.write_text(json.dumps(older))
    assert verify(bundle).ok and Router.load(bundle, engine).record.digest is None


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "router.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_another_model_that_embeds_must_be_the_one_of_the_fit(bundle: Bundle, engine: Any) -> None:
    fit_samples(bundle, engine, TRAIN, HELD, experts=EXPERTS, model="some/encoder").router.save(bundle)
    assert Router.load(bundle, engine).record.model == "some/encoder"
    engine.fingerprint = "other"
    with pytest.raises(RouterError, match="that model has changed"):
        Router.load(bundle, engine)


@pytest.mark.parametrize(
    ("training", "held", "options", "message"),
    [
        ([], [], {}, "no training samples"),
        ([*make_samples(4, fields=["math"]), Sample("grep", "shell")], [], {}, "'shell' has one training sample"),
        ([*TRAIN, Sample("n1", "none")], [], {}, "cannot be called 'none'"),
        (TRAIN, [Sample("n1", "law")], {}, "'law' has validation samples but no training"),
        ([*TRAIN, Sample("  ", "math")], [], {}, "is empty"),
        (TRAIN, HELD, {"experts": {}}, "no expert's name"),
        (TRAIN, HELD, {"experts": {**EXPERTS, "math": "e9"}}, "no expert 'e9' in the bundle"),
        (TRAIN, HELD, {"experts": {**EXPERTS, "law": "e0"}}, "'law' is given an expert but has no samples"),
        (TRAIN, HELD, {"table": {"math": {"e7": 0.5}}}, "no expert 'e7' in the bundle"),
        (TRAIN, HELD, {"settings": FitSettings(fallback="e5")}, "the fallback: no expert 'e5'"),
    ],
)
def test_samples_and_names_that_cannot_be_used_are_one_line(
    bundle: Bundle, engine: Any, training: Any, held: Any, options: Any, message: str
) -> None:
    with pytest.raises(RouterError, match=message) as raised:
        fit_samples(bundle, engine, training, held, **{"experts": EXPERTS, **options})
    assert len(str(raised.value).splitlines()) == 1


def test_two_samples_a_field_and_no_validation_are_enough(bundle: Bundle, engine: Any) -> None:
    few = make_samples(2)
    fitted = fit_samples(bundle, engine, few, experts=EXPERTS)
    assert fitted.report["measured_on"] == "cross-validation"
    assert [route.field for route in fitted.router.route([s.text for s in few])] == [s.field for s in few]


def test_two_fields_are_enough(bundle: Bundle, engine: Any) -> None:
    fields = ["math", "shell"]
    router = fit_samples(
        bundle, engine, make_samples(12, fields=fields), experts={f: EXPERTS[f] for f in fields}
    ).router
    routes = router.route(["sum plus", "grep files"])
    assert [route.field for route in routes] == fields
    assert all(set(route.scores) == set(fields) for route in routes)


@pytest.mark.parametrize("fields", [["math"], ["math", "shell"]])
def test_one_field_or_two_refuse_strangers(bundle: Bundle, engine: Any, fields: list[str]) -> None:
    samples, experts = make_samples(24, fields=fields), {f: EXPERTS[f] for f in fields}
    router = fit_samples(bundle, engine, samples, experts=experts).router
    evaluation = measure_router(router, [*make_samples(30, seed=5, fields=fields), *strangers(60)])
    assert evaluation.auroc is not None and evaluation.auroc > 0.95
    assert evaluation.kept is not None and evaluation.kept > 0.9
    assert evaluation.outside_to_fallback is not None and evaluation.outside_to_fallback > 0.8
    router.save(bundle)
    texts = [sample.text for sample in samples]
    assert Router.load(bundle, engine).route(texts) == router.route(texts)


def test_validation_samples_that_are_training_samples_are_left_out_and_said(bundle: Bundle, engine: Any) -> None:
    twice = [Sample(sample.text.upper() + " ", sample.field) for sample in TRAIN[:5]]
    fitted = fit(bundle, engine, [*HELD, *twice])
    assert fitted.report["repeated"] == 5
    assert fitted.router.record == fit(bundle, engine).router.record


def test_a_router_of_an_earlier_version_answers_as_it_did(bundle: Bundle, engine: Any) -> None:
    """No thresholds of fields, no samples held: what version 1 of the file first had."""
    router = fit(bundle, engine).router
    router.save(bundle)
    folder = router_folder(bundle.path)
    record = json.loads((folder / "router.json").read_text())
    arrays = dict(router.head.to_arrays())
    arrays["outside.calibration"] = np.array([2.0, 0.5, 0.4, 3.0])
    for name in ("outside.weights", "outside.bias"):
        arrays[name] = arrays[name][:3]  # a claim a field, no topics
    del arrays["axes"], arrays["gains"], arrays["outside.fields"]
    data = save(arrays)
    record["weights"] = f"weights-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    del record["thresholds"], record["held"]
    record["format_version"] = 1
    (folder / record["weights"]).write_bytes(data)
    (folder / "router.json").write_text(json.dumps(record))
    opened = Router.load(bundle, engine)
    raw = opened.embedder.embed(["sum plus n1", "n3 n4 n5"]).vectors
    vectors = opened.head.space(raw).astype(np.float64)
    claims = vectors @ arrays["outside.weights"].T.astype(np.float64) + arrays["outside.bias"]
    far = 1 - np.sort(vectors @ arrays["vectors"].T.astype(np.float64), axis=1)[:, -5:].mean(axis=1)
    expected = 1 / (1 + np.exp(3.0 * (-2.0 * claims.max(axis=1) + 0.5 * far - 0.4)))
    assert np.allclose(opened.judge(raw).known, expected, atol=1e-6)


def test_the_table_sends_a_field_to_its_best_expert(bundle: Bundle, engine: Any) -> None:
    table = {
        "math": {"e0": 0.2, "e1": 0.9, "average": 0.3},
        "shell": {"e0": 0.4, "e2": 0.4},
        "json": {"e0": 0.1, "average": 0.6},
    }
    router = fit_samples(bundle, engine, TRAIN, HELD, table=table).router
    assert router.record.experts == {"math": "e1", "shell": "e0", "json": "average"}
    assert router.route(["object key nested"])[0].expert is None


@pytest.mark.parametrize(("fallback", "expected"), [("average", None), ("e1", "e1"), ("mixture", {"e0", "e1", "e2"})])
def test_the_fallback_is_the_one_that_was_chosen(bundle: Bundle, engine: Any, fallback: str, expected: Any) -> None:
    router = fit(bundle, engine, fallback=fallback).router
    route = router.route(["n1 n2 n3"])[0]
    assert route.fallback
    if isinstance(expected, set):
        assert isinstance(route.expert, dict) and set(route.expert) == expected
        assert sum(route.expert.values()) == pytest.approx(1)
    else:
        assert route.expert == expected
    assert "under the threshold" in route.reason


def test_the_learning_curve_grows_with_the_samples(bundle: Bundle, engine: Any) -> None:
    curve = fit(bundle, engine).report["learning_curve"]
    assert [point["samples"] for point in curve] == [4, 8, 16, 24]
    assert curve[0]["accuracy"] <= curve[-1]["accuracy"] + 0.01
    assert all(point["lowest"] <= point["accuracy"] <= point["highest"] for point in curve)


def test_the_same_samples_give_the_same_router(bundle: Bundle, engine: Any) -> None:
    first, again = (fit(bundle, engine).router for _ in range(2))
    for one, two in zip(first.head.to_arrays().values(), again.head.to_arrays().values(), strict=True):
        assert np.array_equal(one, two)
    assert first.record == again.record


def test_an_evaluation_is_stored_beside_the_router(bundle: Bundle, engine: Any) -> None:
    router = fit(bundle, engine).router
    evaluation = measure_router(router, [*TEST, *strangers(5)])
    stored = json.loads(save_evaluation(bundle, evaluation).read_text())
    assert stored["samples"] == len(TEST) and stored["outside"] == 5
    assert sum(sum(row.values()) for row in stored["confusion"].values()) == len(TEST) + 5
    assert {point["field"] for point in stored["picture"]} == {"math", "shell", "json", "none"}


@pytest.mark.parametrize(("samples", "message"), [([], "no samples"), ([Sample("a", "law")], "'law' is none of")])
def test_an_evaluation_on_nothing_or_on_other_fields_is_one_line(
    bundle: Bundle, engine: Any, samples: Any, message: str
) -> None:
    with pytest.raises(RouterError, match=message):
        measure_router(fit(bundle, engine).router, samples)


def test_no_text_gives_no_route_and_an_empty_one_is_refused(bundle: Bundle, engine: Any) -> None:
    router = fit(bundle, engine).router
    assert router.route([]) == []
    with pytest.raises(RouterError, match="text 2 of 2 is empty"):
        router.route(["sum", " \n"])
    with pytest.raises(RouterError, match="give a list of texts"):
        router.route("sum")


@pytest.mark.parametrize("texts", ["w3 w4", b"w3", ["w3", None], ["w3", 4]], ids=str)
def test_texts_of_a_field_are_a_list_of_texts(texts: Any) -> None:
    with pytest.raises(RouterError, match="field 'math': give a list of texts"):
        samples_of({"math": texts, "code": ["a", "b"]}, "train")


def test_samples_at_hand_are_as_many_a_field_as_are_asked_for() -> None:
    at_hand = {"math": ["a", "b", "c"], "code": ["d"]}
    wanted = [("a", "math"), ("b", "math"), ("d", "code")]
    for data in (at_hand, samples_of(at_hand, "train")):
        assert [(sample.text, sample.field) for sample in samples_of(data, "train", limit=2)] == wanted


def test_an_engine_of_another_width_is_one_line(bundle: Bundle, engine: Any) -> None:
    router = fit(bundle, engine).router
    with pytest.raises(RouterError, match=r"have \d+ dimensions, the router was fitted to"):
        router.judge(router.embedder.embed(["sum"]).vectors[:, 1:])


def test_settings_that_cannot_be_used_are_one_line() -> None:
    for given in (
        {"template": "no place"},
        {"layers": "x"},
        {"pooling": "max"},
        {"coverage": 0},
        {"classifier": "svm"},
    ):
        with pytest.raises(RouterError) as raised:
            fit_settings(**given)  # type: ignore[arg-type]
        assert len(str(raised.value).splitlines()) == 1
    assert fit_settings(layers="4,-1").embed.layers == (4, -1)
    assert fit_settings(template="none").embed.template == "{input}"
    assert fit_settings(template="task").embed.template == TASK_PROMPT
    assert fit_settings().embed.template is None  # the fit's choice


def test_a_router_is_saved_only_into_the_bundle_that_it_was_fitted_for(bundle: Bundle, engine: Any) -> None:
    router = fit(bundle, engine).router
    remove_expert(bundle, "e2")
    with pytest.raises(RouterError, match="the bundle was changed while the router was fitted; fit it again"):
        router.save(bundle.path)
    assert not router_folder(bundle.path).exists()


def test_a_router_is_saved_by_one_process_at_a_time(
    bundle: Bundle, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "PATIENCE", 0.1)
    router = fit(bundle, engine).router
    with writing(bundle.path), pytest.raises(LockedError, match="another polymerge process"):
        router.save(bundle)


def test_saving_a_router_removes_its_own_old_files_alone(bundle: Bundle, engine: Any) -> None:
    fit(bundle, engine).router.save(bundle)
    folder = router_folder(bundle.path)
    for name in ("weights-mine.safetensors", "samples-2.jsonl", "weights-0123456789abcdef.safetensors.bak"):
        (folder / name).write_text("mine")
    old = {file.name for file in folder.iterdir()}
    fit(bundle, engine, coverage=0.5, classifier="knn").router.save(bundle)
    gone = old - {file.name for file in folder.iterdir()}
    assert len(gone) == 1 and gone.pop().startswith("weights-")
