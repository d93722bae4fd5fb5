"""The commands around routing, on a tiny bundle with a tokenizer: fit, evaluate, route, generate."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polymerge import Bundle, merge
from polymerge.cli.main import main
from polymerge.engine.local.engine import HFEngine
from polymerge.router.described import described_samples
from tests.tiny import make_experts, tiny_tokenizer

WORDS = {"e0": range(5, 25), "e1": range(30, 50), "e2": range(60, 80)}
HOW = ["--template", "{input}", "--layers", "0", "--pooling", "mean"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("routed")
    experts = make_experts("llama", folder)
    for path in experts.values():
        tiny_tokenizer().save_pretrained(path)
    return merge({"experts": {name: str(path) for name, path in experts.items()}}, folder / "bundle")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for field, words in WORDS.items():
        (folder / field).mkdir()
        for split, count in (("train", 40), ("validation", 12), ("test", 6)):
            texts = [" ".join(f"w{rng.choice(words)}" for _ in range(8)) for _ in range(count)]
            rows = [json.dumps({"prompt": text, "answer": "w3", "expert": field}) for text in texts]
            (folder / field / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["polymerge", *map(str, words)])
        with pytest.raises(SystemExit) as raised:
            main()
            raise SystemExit(0)
        said = capsys.readouterr()
        return int(raised.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def fitted(bundle: Bundle, data: Path, run: Run) -> Bundle:
    code, _, err = run("router", "fit", bundle.path, "--data", data, *HOW, "--quiet")
    assert code == 0, err
    return bundle


def test_fit_prints_the_learning_curve_and_json_holds_it(bundle: Bundle, data: Path, run: Run) -> None:
    code, out, _ = run("router", "fit", bundle.path, "--data", data, *HOW)
    assert code == 0 and "learning curve" in out and "e0 → e0" in out
    code, out, _ = run("router", "fit", bundle.path, "--data", data, *HOW, "--json")
    assert [point["samples"] for point in json.loads(out)["learning_curve"]] == [4, 8, 16, 32, 40]


@pytest.mark.parametrize("words", [(), ("--describe", "e0=w5 w6 w7", "--describe", "e1=w30 w31")])
def test_fit_without_data_takes_descriptions_or_names_and_says_that_nothing_is_measured(
    bundle: Bundle, run: Run, words: tuple[str, ...]
) -> None:
    code, out, err = run("router", "fit", bundle.path, *words, *HOW)
    assert code == 0 and "not measured: fitted without labels" in out, err
    record = json.loads((bundle.path / "router" / "router.json").read_text())
    assert record["labelled"] == 0
    assert record["descriptions"] == ({"e0": "w5 w6 w7", "e1": "w30 w31"} if words else {n: n for n in WORDS})


@pytest.mark.parametrize(("fields", "leans"), [("e0 e1 e2", True), ("e0 e1", False)])
def test_descriptions_of_all_fields_stand_beside_samples(
    bundle: Bundle, data: Path, run: Run, fields: str, leans: bool
) -> None:
    words = [f"--describe={field}=w{WORDS[field][0]} w{WORDS[field][1]}" for field in fields.split()]
    code, _, err = run("router", "fit", bundle.path, "--data", data, "--samples", "3", *words, *HOW)
    record = json.loads((bundle.path / "router" / "router.json").read_text())
    assert code == 0 and record["labelled"] == 9, err
    assert sorted(record["descriptions"]) == (fields.split() if leans else [])


@pytest.mark.parametrize("words", [(), ("--describe", "e0=w5 w6 w7", "--describe", "e1=w30 w31")])
def test_whoever_embeds_experts_are_asked_where_nothing_but_names_is_known(
    bundle: Bundle, run: Run, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "polymerge.router.training.made_samples",
        lambda engine, words, experts, **_: asked.append(experts) or described_samples(words),
    )
    other = bundle.manifest.experts["e1"].source
    code, _, err = run("router", "fit", bundle.path, *words, *HOW, "--embed-with", other)
    assert code == 0, err
    assert [engine and engine.experts for engine in asked] == [None if words else list(WORDS)]


def test_eval_prints_the_confusion_and_leaves_other_fields_out(
    fitted: Bundle, data: Path, run: Run, tmp_path: Path
) -> None:
    code, out, _ = run("router", "eval", fitted.path, "--data", data)
    assert code == 0 and "accuracy     100.0%" in out
    mixed = tmp_path / "mixed.jsonl"
    rows = [
        {"prompt": "w5 w6 w7", "expert": "e0"},
        {"prompt": "w90 w91", "expert": "none"},
        {"prompt": "w3", "expert": "x"},
    ]
    mixed.write_text("\n".join(map(json.dumps, rows)))
    code, out, err = run("router", "eval", fitted.path, "--file", mixed, "--json")
    printed = json.loads(out)
    assert (code, printed["samples"], printed["outside"]) == (0, 1, 1)
    assert "1 of x" in err


def test_route_prints_expert_field_confidence_and_neighbours(fitted: Bundle, data: Path, run: Run) -> None:
    code, out, _ = run("route", fitted.path, "w31 w32 w33 w34")
    assert code == 0 and "expert       e1" in out and "field        e1" in out and out.count(" e1: ") == 3
    code, out, _ = run("route", fitted.path, "w31 w32 w33 w34", "--json")
    assert {"expert", "field", "confidence", "scores"} <= set(json.loads(out))


def test_route_streams_a_file(fitted: Bundle, data: Path, run: Run) -> None:
    code, out, _ = run("route", fitted.path, "--file", data / "e2/test.jsonl", "--json")
    assert code == 0
    assert [json.loads(line)["field"] for line in out.splitlines()] == ["e2"] * 6
    code, out, _ = run("route", fitted.path, "--file", data / "e2/test.jsonl")
    assert all(line.startswith("e2\te2\t") for line in out.splitlines())


def test_generate_auto_asks_the_router(fitted: Bundle, run: Run) -> None:
    code, out, err = run("generate", fitted.path, "w61 w62 w63", "--expert", "auto", "--max-new-tokens", 2, "--json")
    assert code == 0, err
    assert json.loads(out)["expert"] == "e2"


def test_every_model_that_generate_loads_is_on_the_device(
    bundle: Bundle, data: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeds = bundle.manifest.experts["e0"].source
    code, _, err = run("router", "fit", bundle.path, "--data", data, *HOW, "--embed-with", embeds, "--quiet")
    assert code == 0, err
    places: dict[str, str | None] = {}
    load = HFEngine.from_checkpoint

    def noted(source: str, *, device: str | None = None, **options: Any) -> HFEngine:
        places[source] = device
        return load(source, device=device, **options)

    monkeypatch.setattr(HFEngine, "from_checkpoint", noted)
    words = ("generate", bundle.path, "w61 w62", "--expert", "auto", "--max-new-tokens", 2, "--device", "cpu")
    code, _, err = run(*words)
    assert code == 0 and places == {embeds: "cpu"}, err
    places.clear()
    thinker = bundle.manifest.experts["e1"].source
    code, _, err = run(*words, "--staged", "--thinker", thinker, "--policy", "always", "--thought-tokens", 2)
    assert code == 0 and places == {embeds: "cpu", thinker: "cpu"}, err


def test_feedback_is_learned_from_a_file(bundle: Bundle, data: Path, run: Run, tmp_path: Path) -> None:
    code, _, err = run("router", "fit", bundle.path, "--data", data, *HOW, "--quiet")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "w82 w83 w84", "expert": "e2", "verdict": "right"}))
    code, out, err = run("router", "feedback", bundle.path, "--file", file, "--json")
    assert code == 0, err
    assert json.loads(out)["samples"] == 1


def test_a_text_longer_than_the_context_is_routed_with_a_note(fitted: Bundle, run: Run) -> None:
    code, out, _ = run("route", fitted.path, "w31 w32 w33 w34 w35 w36 w37 " * 100)
    assert code == 0 and "field        e1" in out and "tokens were cut from the middle" in out


def test_samples_label_themselves_by_their_best_expert(bundle: Bundle, data: Path, run: Run) -> None:
    code, out, err = run("router", "fit", bundle.path, "--data", data, *HOW, "--self-label", "--no-chat", "--json")
    if code == 0:
        assert set(json.loads(out)["fields"]) <= {"e0", "e1", "e2"}
    else:  # random experts may leave one of them with no sample or a single one
        assert "training sample" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["route", "BUNDLE", " "], "is empty"),
        (["route", "BUNDLE", "--file", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["route", "BUNDLE", "--file", "DATA/bad.jsonl"], "line 1: not a JSON object"),
        (["route", "BUNDLE", "--file", "DATA/empty.jsonl"], "line 2: prompt: must not be empty"),
        (["router", "fit", "BUNDLE", "--data", "nowhere"], "nowhere: no such folder"),
        (["router", "fit", "BUNDLE", "--data", "DATA", "--fields", "e0,law"], "no field 'law'"),
        (["router", "fit", "BUNDLE", "--data", "DATA", "--assign", "e0=e9"], "did you mean"),
        (["router", "fit", "BUNDLE", "--data", "DATA", "--table", "DATA/table.json"], "'e7'"),
        (["router", "fit", "BUNDLE", "--data", "DATA", "--classifier", "svm"], "classifier"),
        (["router", "fit", "BUNDLE", "--data", "DATA", "--fallback", "e8"], "the fallback"),
        (["router", "fit", "BUNDLE", "--data", "DATA", "--layers", "-9"], "the model has fewer"),
    ],
)
def test_bad_input_is_one_line(fitted: Bundle, data: Path, run: Run, words: list[str], message: str) -> None:
    (data / "bad.jsonl").write_text("{")
    (data / "empty.jsonl").write_text('{"prompt": "w5"}\n{"prompt": " "}\n')
    (data / "table.json").write_text(json.dumps({"fields": {"e0": {"e7": 0.5}}}))
    places: dict[str, Any] = {"BUNDLE": str(fitted.path), "DATA": str(data)}
    replaced = [next((w.replace(k, v) for k, v in places.items() if w.startswith(k)), w) for w in words]
    code, _, err = run(*replaced)
    lines = [line for line in err.splitlines() if line.startswith("polymerge: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0]
    assert "Traceback" not in err


def test_a_bundle_without_a_router_says_what_to_run(bundle: Bundle, run: Run, tmp_path: Path) -> None:
    from shutil import copytree, rmtree

    bare = copytree(bundle.path, tmp_path / "bare")
    rmtree(bare / "router", ignore_errors=True)
    for words in (
        ["route", bare, "w5"],
        ["generate", bare, "w5", "--expert", "auto"],
        ["router", "eval", bare, "--data", "x"],
    ):
        code, _, err = run(*words)
        assert code == 2 and "run `polymerge router fit" in err


def test_a_router_copied_from_another_bundle_is_refused(fitted: Bundle, run: Run, tmp_path: Path) -> None:
    from shutil import copytree

    experts = make_experts("llama", tmp_path, count=3, seed=5)
    for path in experts.values():
        tiny_tokenizer().save_pretrained(path)
    other = merge({"experts": {name: str(path) for name, path in experts.items()}}, tmp_path / "other")
    copytree(fitted.path / "router", other.path / "router")
    code, _, err = run("route", other.path, "w5")
    assert code == 2 and "fitted for another bundle" in err
