"""How much of every expert is kept for how many bytes: a merge for every rate and code, held against the originals.

Knows the order of the work. Does not know what is measured (`polymerge.search.agreement`), how results are shown
(`polymerge.report`, `polymerge.cli`) nor what anyone aims at (`polymerge.search.find`).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from ..bundle.bundle import Bundle
from ..bundle.inspect import inspect_bundle
from ..bundle.place import folder_to_fill
from ..errors import RecipeError
from ..merging.calibration import Calibration
from ..merging.executor import Executor, in_threads
from ..merging.plan import MergePlan, plan_merge
from ..merging.run import run_plan
from ..method.codes import PLAIN
from ..model.loading import load_model
from ..recipe.merge import CodeName, Recipe, RecipeLike, RecipeSettings, load_recipe, read_codes
from ..recipe.rates import AnyRates, in_words, read_named_rates
from .agreement import Agreement, Reference
from .calibrate import calibrated
from .examples import LIMIT, Example, Prompts, read_prompts

RATES = (0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Point:
    """One rate and code. Bytes of the whole bundle's weights, and of all experts' residuals alone."""

    code: CodeName
    compress_rate: AnyRates
    total_bytes: int
    residual_bytes: int
    share_of_one_model: float
    seconds: float
    experts: Mapping[str, Agreement]

    @property
    def kl(self) -> float:
        """Mean of the experts'."""
        return sum(agreement.kl for agreement in self.experts.values()) / len(self.experts)

    @property
    def worst_kl(self) -> float:
        """Of the expert that lost most, in nats a token."""
        return max(agreement.kl for agreement in self.experts.values())

    @property
    def top1(self) -> float:
        """Mean of the experts'."""
        return sum(agreement.top1 for agreement in self.experts.values()) / len(self.experts)

    @property
    def kept(self) -> float | None:
        """Mean of the experts', without those that have none."""
        known = [agreement.kept for agreement in self.experts.values() if agreement.kept is not None]
        return sum(known) / len(known) if known else None

    def to_json(self) -> dict[str, Any]:
        """As plain data, with the means."""
        return asdict(self) | {"kl": self.kl, "top1": self.top1, "kept": self.kept}


def sweep(
    recipe: RecipeLike,
    prompts: Prompts,
    output: str | Path = "sweep",
    *,
    rates: Sequence[float] = RATES,
    codes: Sequence[str] = PLAIN,
    limit: int = LIMIT,
    progress: Callable[[str], None] | None = None,
    **settings: Unpack[RecipeSettings],
) -> list[Point]:
    """Merges at every rate with every code and measures each bundle. Writes `output`/sweep.json after every merge.

    The bundles are deleted once they are measured.

    Args:
        prompts: expert -> held-out requests, or their file.
        limit: rows of each file.
        progress: called with what comes next.
        settings: keys of the recipe that count in the place of its own.

    Raises:
        RecipeError: an expert without examples. Whatever `merge` raises.
    """
    recipe, output = load_recipe(recipe, **settings), folder_to_fill(output)
    examples = read_prompts(prompts, limit)
    check_examples(recipe, examples)
    names, rates = read_codes(codes), _numbers(rates)
    # at rate 1 there is no residual to store, so codes do not differ
    points_at = [(rate, code) for rate in rates for code in (names if rate < 1 else names[:1])]
    plan = plan_merge(recipe)
    lossy = plan.recipe  # whose tables those of all codes are
    ends = recipe.of_tables_in_use()  # where a code is named, `auto` keeps them
    recipes = [load_recipe(lossy if 0 < rate < 1 else ends, compress_rate=rate, code=code) for rate, code in points_at]
    say = progress or (lambda text: None)
    references = run_originals(recipe, examples, say)
    output.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    with calibrated(plan, examples, say) as calibration:
        for number, changed in enumerate(recipes, 1):
            say(f"{number} of {len(recipes)}: rate {in_words(changed.compress_rate)}, {changed.code}")
            points.append(measure(plan_merge(changed), references, output, calibration=calibration))
            (output / "sweep.json").write_text(json.dumps([to_json(p, points) for p in points], indent=1) + "\n")
    return points


def _numbers(rates: Iterable[float]) -> list[float]:
    """Raises RecipeError for what is no rate for all layers."""
    try:
        numbers = [read_named_rates(rate) for rate in rates]
    except (TypeError, ValueError) as error:
        raise RecipeError(f"rates: {error}") from None
    if not numbers or not all(isinstance(number, float) for number in numbers):
        raise RecipeError("rates: give one number or more, each from 0 to 1")
    return numbers


def check_examples(recipe: Recipe, examples: Mapping[str, Sequence[Example]]) -> None:
    """Raises RecipeError unless the experts, all of them and nothing else, have examples."""
    unknown = [name for name in examples if name not in recipe.experts]
    if unknown:
        raise RecipeError(f"--prompts {unknown[0]}: no such expert; the recipe has {', '.join(recipe.experts)}")
    lacking = [name for name in recipe.experts if not examples.get(name)]
    if lacking:
        raise RecipeError(f"expert {lacking[0]!r}: no held-out prompts; give --prompts {lacking[0]}=FILE.jsonl")


def run_originals(
    recipe: Recipe, examples: Mapping[str, Sequence[Example]], say: Callable[[str], None]
) -> dict[str, Reference]:
    """Every expert's original on its examples, one after the other. Raises what `Reference` raises."""
    references = {}
    for name, source in recipe.experts.items():
        say(f"original {name}")
        references[name] = Reference(source, examples[name], trust_remote_code=recipe.trust_remote_code)
    return references


def measure(
    plan: MergePlan,
    references: Mapping[str, Reference],
    folder: Path | None,
    executor: Executor = in_threads,
    calibration: Calibration | None = None,
) -> Point:
    """Merges, measures and deletes the bundle. The recipe's `max_error` does not count here.

    Args:
        folder: where the bundle lies for a moment; by default the system's place for such files.
        calibration: what counts of the experts' residuals, where their recipe has it seen.
    """
    recipe = plan.recipe.model_copy(update={"max_error": None})
    with tempfile.TemporaryDirectory(dir=folder, prefix=".bundle-") as place:
        began = time.monotonic()
        plan = replace(plan, recipe=recipe, calibration=calibration)
        bundle = run_plan(plan, Path(place) / "bundle", executor=executor)
        seconds = time.monotonic() - began
        inspection, sizes, experts = inspect_bundle(bundle), bundle.sizes(), agreements(bundle, references)
    residuals = sum(expert.residual_bytes for expert in inspection.experts)
    share = sizes.total / sizes.one_model
    return Point(recipe.code, recipe.compress_rate, sizes.total, residuals, share, round(seconds, 1), experts)


def agreements(bundle: Bundle, references: Mapping[str, Reference]) -> dict[str, Agreement]:
    """How near every expert of a bundle is to its original."""
    model = load_model(bundle)
    return {
        name: reference.against(lambda ids, name=name: model(ids, experts=name).logits, model.device)  # type: ignore[misc]
        for name, reference in references.items()
    }


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both bytes and KL, smallest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.total_bytes, p.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    return best


def to_json(point: Point, points: Sequence[Point]) -> dict[str, Any]:
    """A point as plain data, with its means and whether it is on the front of all points."""
    return point.to_json() | {"on_front": point in front(points)}
