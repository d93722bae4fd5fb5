"""Whether a bundle of one architecture answers as its experts do. All oracles are transformers' own models.

Knows one architecture at a time. Does not know which there are (`__main__`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from polymerge import Bundle, export_dense, load_model, merge
from polymerge.errors import PolymergeError

from .experts import batch, make_experts

ROWS = ("e0", "e1", "e2", None, "e1")
# Largest difference of two logits, relative to the largest logit.
CLOSE = 1e-4
# In bfloat16, the norm of the difference relative to the norm: rounding, and tokens that another block expert takes
# (both are rounded: where the original is further from itself in float32, twice that). In float32 it is CLOSE.
CLOSE_BFLOAT16 = 0.1
AVERAGES = {"embeddings": "average", "lm_head": "average"}
VARIANTS: dict[str, dict[str, Any]] = {
    "0": {"compress_rate": 0.0},
    "0.95": {"compress_rate": 0.95, **AVERAGES},
    "int4": {"compress_rate": 0.95, "code": "int4"},
}
Models = Mapping[str | None, Any]
Status = Literal["works", "refused", "wrong", "raises", "not built"]


@dataclass
class Outcome:
    """What became of one architecture.

    Attributes:
        step: the one it ended at.
        detail: one line: the refusal, or what was wrong.
        worst: the largest difference in float32.
        share: bytes of the bundle at 0.95, relative to one model; embeddings and head averaged.
        strategy: how its rows are run.
    """

    architecture: str
    status: Status = "works"
    step: str = ""
    detail: str = ""
    worst: float = 0.0
    share: float | None = None
    strategy: str = ""


class _Wrong(Exception):
    """An answer that is not the expert's."""


def check(architecture: str, *, variants: Sequence[str] = (*VARIANTS, "bfloat16")) -> Outcome:
    """Builds, merges, loads and compares."""
    outcome = Outcome(architecture)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        try:
            _check(architecture, Path(folder), outcome, variants)
        except PolymergeError as error:
            outcome.status, outcome.detail = "refused", _line(error, folder)
        except _Wrong as error:
            outcome.status, outcome.detail = "wrong", str(error)
        except Exception as error:
            outcome.status = "not built" if outcome.step == "build" else "raises"
            outcome.detail = f"{type(error).__name__}: {_line(error, folder)}"
    return outcome


def _check(architecture: str, folder: Path, outcome: Outcome, variants: Sequence[str]) -> None:
    outcome.step = "build"
    experts = make_experts(architecture, folder / "experts")
    originals = {name: _plain(path) for name, path in experts.items()}
    inputs = batch(originals["e0"])
    _check_originals(
        originals, inputs, lambda: merge({name: str(path) for name, path in experts.items()}, folder / "x")
    )
    for variant in [variant for variant in VARIANTS if variant in variants]:
        outcome.step = f"{variant}: merge"
        sources = {name: str(path) for name, path in experts.items()}
        bundle = merge({"experts": sources, **VARIANTS[variant]}, folder / variant)
        if variant == "0.95":
            outcome.share = bundle.sizes().total / bundle.sizes().one_model
        outcome.step = f"{variant}: reload"
        oracles = originals if variant == "0" else _exported(bundle, folder / f"dense-{variant}")
        _compare(bundle, {**oracles, None: _average(bundle, experts["e0"])}, outcome, variant)
    if "bfloat16" in variants:
        _check_bfloat16(architecture, folder, outcome)


def _check_originals(originals: Models, inputs: Mapping[str, torch.Tensor], merged: Callable[[], object]) -> None:
    """Raises what a model objects to that cannot go on with a text alone, unless `merged` refuses it first."""
    try:
        finite = all(bool(model(**inputs).logits.isfinite().all()) for model in originals.values())
    except Exception:
        merged()
        raise
    if not finite:
        raise ValueError("the tiny model's own logits are not finite")


def _compare(bundle: Bundle, oracles: Models, outcome: Outcome, variant: str) -> None:
    outcome.step = f"{variant}: load"
    model = load_model(bundle)
    outcome.strategy = getattr(model, "strategy", "layers")
    inputs = batch(model.hf)
    outcome.step = f"{variant}: forward"
    expected = [oracles[name](**_row(inputs, number)).logits for number, name in enumerate(ROWS)]
    mixed = model(**inputs, experts=list(ROWS)).logits
    for number, name in enumerate(ROWS):
        where = _seen(inputs, number)
        single = model(**_row(inputs, number), experts=name).logits
        whose = f"{variant}: row of {name or 'the average'}"
        _judge(outcome, f"{whose} alone", single[where], expected[number][where])
        _judge(outcome, whose, mixed[number : number + 1][where], expected[number][where])
    if torch.allclose(expected[1], oracles[None](**_row(inputs, 1)).logits, rtol=1e-3):
        raise ValueError("the experts do not differ")
    if variant != "int4":  # the same layers as at 0.95, with decoded factors
        outcome.step = f"{variant}: generate"
        _compare_generation(model, oracles, inputs, outcome, variant)


def _compare_generation(
    model: Any, oracles: Models, inputs: Mapping[str, torch.Tensor], outcome: Outcome, variant: str
) -> None:
    """Two tokens more for every row, with the cache; the second is read from it."""
    try:
        alone = [_generated(oracles[name], _row(inputs, number)) for number, name in enumerate(ROWS)]
    except Exception:  # some cannot generate from a plain batch on their own; then there is nothing to compare
        return
    plain = _generated(oracles["e1"], inputs)  # some mix the rows of a batch by themselves
    if not all(torch.allclose(p[1:2], a, atol=1e-3) for p, a in zip(plain.logits, alone[1].logits, strict=True)):
        return
    together = _generated(model, inputs, experts=list(ROWS))
    for number, name in enumerate(ROWS):
        for step, (got, expected) in enumerate(zip(together.logits, alone[number].logits, strict=True)):
            where = f"{variant}: generated token {step} of {name or 'the average'}"
            _judge(outcome, where, got[number : number + 1], expected)


def _generated(model: Any, inputs: Mapping[str, torch.Tensor], **options: Any) -> Any:
    return model.generate(
        **inputs,
        **options,
        max_new_tokens=2,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _check_bfloat16(architecture: str, folder: Path, outcome: Outcome) -> None:
    outcome.step = "bfloat16: merge"
    experts = make_experts(architecture, folder / "bfloat16-experts", dtype=torch.bfloat16)
    sources = {name: str(path) for name, path in experts.items()}
    bundle = merge({"experts": sources, "compress_rate": 0.0}, folder / "bfloat16")
    outcome.step = "bfloat16: load"
    wide = load_model(bundle)
    inputs = batch(wide.hf)
    outcome.step = "bfloat16: forward"
    exact = wide(**inputs, experts=list(ROWS)).logits
    originals = {name: _plain(path)(**inputs).logits for name, path in experts.items()}
    for number, name in enumerate(ROWS):
        if name is not None:
            expected = _plain(experts[name])(**_row(inputs, number)).logits
            where = _seen(inputs, number)
            _judge(outcome, f"bfloat16 in float32: row of {name}", exact[number : number + 1][where], expected[where])
    rounded = _in_bfloat16(experts, inputs)
    if rounded is None:  # the architecture itself cannot
        return
    narrow = load_model(bundle, dtype=torch.bfloat16)(**inputs, experts=list(ROWS)).logits.float()
    for number, name in enumerate(ROWS):
        if name is not None:
            where = _seen(inputs, number)
            expected = rounded[name][number : number + 1][where]
            noise = _far(expected, originals[name][number : number + 1][where])
            far = _far(narrow[number : number + 1][where], expected)
            if not far <= max(CLOSE_BFLOAT16, 2 * noise):
                raise _Wrong(f"bfloat16: row of {name} is {far:.2g} off, where rounding alone is {noise:.2g}")


def _in_bfloat16(experts: Mapping[str, Path], inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The originals' answers in bfloat16; None where transformers cannot run them, with a cache included."""
    models = {name: _plain(path, torch.bfloat16) for name, path in experts.items()}
    try:
        if models["e0"].can_generate():
            _generated(models["e0"], inputs)
        return {name: model(**inputs).logits.float() for name, model in models.items()}
    except RuntimeError:  # float32 and bfloat16 in one product (XLNet, Reformer)
        return None


def _far(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def _judge(outcome: Outcome, what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    far = float((got - expected).abs().max() / expected.abs().max())
    outcome.worst = max(outcome.worst, far)
    if not far <= CLOSE:
        raise _Wrong(f"{what} is {far:.2g} off")


def _plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return _class_of(folder).from_pretrained(folder, dtype=dtype).eval()


def _class_of(folder: Path) -> Any:
    """The class that saved a checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return getattr(transformers, config["architectures"][0])


def _exported(bundle: Bundle, folder: Path) -> dict[str, Any]:
    return {name: _plain(export_dense(bundle, name, folder / name)) for name in bundle.experts}


def _average(bundle: Bundle, original: Path) -> Any:
    """The bundle as transformers opens it; whatever it misses, an original must miss as well."""
    auto = _class_of(original)
    _, usual = auto.from_pretrained(original, dtype=torch.float32, output_loading_info=True)
    model, info = auto.from_pretrained(bundle.path, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        more = set(info[kind]) - set(usual[kind])
        if more:
            raise _Wrong(f"the bundle has {len(more)} {kind.replace('_', ' ')}: {sorted(map(str, more))[0]}")
    return model.eval()


def _row(inputs: Mapping[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    return {name: value[number : number + 1] for name, value in inputs.items()}


def _seen(inputs: Mapping[str, torch.Tensor], number: int) -> torch.Tensor:
    """[1, T]: where a row has tokens."""
    mask = inputs.get("attention_mask")
    return (
        _row(inputs, number)["input_ids"].new_ones(1, inputs["input_ids"].shape[1]).bool()
        if mask is None
        else (mask[number : number + 1].bool())
    )


def _line(error: BaseException, folder: str) -> str:
    """One line, without the folder that the models lay in."""
    return " ".join(str(error).replace(f"{folder}/", "").split())[:300]
