"""The rate and code that reach a target with the fewest bytes.

For KL and accuracy every guess is a merge that is measured (`polymerge.search.sweep.measure`); a size is found by
arithmetic alone (`polymerge.search.fitting`). Does not write the bundle that is wanted: that is a merge of the recipe
that is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..bundle.bundle import Bundle
from ..errors import TargetError
from ..merging.align import aligned
from ..merging.calibration import Calibration
from ..merging.executor import Executor, in_threads
from ..merging.plan import plan_merge, replanned
from ..method.codes import PLAIN, code_of
from ..recipe.merge import CodeName, Recipe, load_recipe, read_codes
from ..recipe.rates import in_words
from .agreement import Reference
from .calibrate import calibrated
from .examples import Example
from .fitting import STEPS, Fitting, has_full_rank
from .sweep import Point, check_examples, measure, run_originals
from .target import Target, read_target

# A search ends when a bundle that is smaller by no more than this share has missed the target.
TOLERANCE = 0.02
# Where a search starts when the recipe's own rate has no residuals, or nothing but residuals.
FIRST_RATE = 0.95
# Until the target is reached, every guess keeps so many times the last one's residuals.
GROWTH = 4


@dataclass(frozen=True)
class Found:
    """The end of a search.

    Attributes:
        recipe: the one that was given, settled, with the rate and the code that reach the target.
        merges: how many were made and measured on the way.
        point: what was measured of this rate and code; None for a size.
        limit: bytes that the bundle's weights may take; None for KL and accuracy.
    """

    recipe: Recipe
    merges: int
    point: Point | None = None
    limit: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The found rate and code, and what was measured of them."""
        point = self.point.to_json() if self.point else None
        keys = ("compress_rate", "code", "embeddings", "lm_head")
        values = {key: getattr(self.recipe, key) for key in keys}
        return {**values, "merges": self.merges, "limit": self.limit, "point": point}

    def check(self, bundle: Bundle) -> None:
        """Raises TargetError where a merged bundle is larger than the target allows."""
        total = bundle.sizes().total
        if self.limit is not None and total > self.limit:
            raise TargetError(
                f"{bundle.path}: its weights take {total} bytes, {total - self.limit} more than the target; "
                "the bundle stays; search for a smaller size"
            )


def find(
    recipe: Recipe | dict[str, Any] | str | Path,
    target: Target | str,
    examples: Mapping[str, Sequence[Example]] | None = None,
    *,
    codes: Sequence[str] = PLAIN,
    tolerance: float = TOLERANCE,
    folder: Path | None = None,
    executor: Executor = in_threads,
    progress: Callable[[str], None] | None = None,
    calibration: Calibration | None = None,
) -> Found:
    """The recipe with the rate and code that reach the target with the fewest bytes; `merge` it next.

    A size merges nothing: the lowest rate that fits is taken, with the code of the fewest bits a number, or the next
    one where a matrix would have its full rank. For KL and accuracy the codes are merged at equal bytes, and the one
    whose worst expert has the smallest KL is taken to the smallest bundle that reaches the target; the next one only
    where it cannot reach it. Of all bundles with that code none that is smaller by more than `tolerance` reaches the
    target, where a lower rate is always nearer.

    Args:
        examples: expert -> held-out requests, for KL and accuracy.
        codes: those that may be used.
        folder: where bundles that are measured lie for a moment; by default the system's place for such files.
        progress: called with what comes next, and with what was measured.
        calibration: what counts of the experts' residuals, where somebody has it; else it is seen here, where the
            recipe says so.

    Raises:
        TargetError: the target cannot be read or reached. RecipeError: an expert without examples, an unknown code.
        Whatever `merge` raises.
    """
    target = read_target(target) if isinstance(target, str) else target
    recipe = load_recipe(recipe)
    names = list(read_codes(codes))
    # where no factors are stored, a bundle is as published
    names.sort(key=lambda name: code_of(name, torch.float32).format_version)
    say, examples = progress or (lambda text: None), examples or {}
    if target.kind in ("size", "times"):
        if examples:
            raise TargetError(f"target {target.text!r}: a size needs no prompts; leave --prompts out")
        return _find_size(recipe, target, names)
    check_examples(recipe, examples)
    for name in (n for n in recipe.experts if target.kind == "accuracy" and not any(e.answer for e in examples[n])):
        raise TargetError(f"target {target.text!r}: none of the prompts of expert {name!r} has an answer")
    plan = aligned(plan_merge(recipe))
    fitting = Fitting.of(plan)
    references = run_originals(recipe, examples, say)
    for name in (n for n, r in references.items() if target.kind == "accuracy" and not r.accuracy):
        raise TargetError(f"target {target.text!r}: the original of {name!r} is right on none of its prompts")
    with nullcontext(calibration) if calibration else calibrated(plan, examples, say) as seen:
        search = _Search(fitting, target, references, tolerance, folder, executor, say, seen)
        code, keep = search.run(names)
    changed = fitting.at(keep, code).recipe
    # it may have been measured at another rate that gives the same ranks
    point = replace(search.point(keep, code), compress_rate=changed.compress_rate, code=code)
    return Found(changed, len(search.measured), point)


def _find_size(recipe: Recipe, target: Target, codes: Sequence[CodeName]) -> Found:
    plan = plan_merge(recipe)
    fitting = Fitting.of(plan)
    limit = target.limit(plan.base_bytes)
    by_bits = sorted(codes, key=lambda name: code_of(name, plan.dtype).bytes(128, 128, 1))
    kept = {code: fitting.most(limit, code) for code in by_bits}
    plans = [fitting.at(keep, code) for code, keep in kept.items() if keep is not None]
    if not plans:
        raise too_small(target, limit, fitting.bytes(fitting.at(0, codes[0])))
    chosen = next((plan for plan in plans if not has_full_rank(plan)), plans[-1])
    if not any(task.rank for task in chosen.tasks):
        chosen = replanned(chosen, compress_rate=chosen.recipe.compress_rate, code=codes[0])
    return Found(chosen.recipe, 0, limit=limit)


def too_small(target: Target, limit: int, least: int) -> TargetError:
    """For a size under that of a bundle without residuals."""
    return TargetError(
        f"target {target.text!r}: is {limit / 1e6:.1f} MB, but the average and what every expert keeps of its own "
        f"(embeddings, norms) take {least / 1e6:.1f} MB"
    )


@dataclass
class _Search:
    """Guesses that are merged and measured; two plans that would give the same bundle are measured once."""

    fitting: Fitting
    target: Target
    references: Mapping[str, Reference]
    tolerance: float
    folder: Path | None
    executor: Executor
    say: Callable[[str], None]
    calibration: Calibration | None
    measured: dict[Hashable, Point] = field(default_factory=dict)

    def run(self, codes: Sequence[CodeName]) -> tuple[CodeName, int]:
        """The code, and the ten-thousandths to keep."""
        if self._reached(0, codes[0]):
            return codes[0], 0
        rate = self.fitting.plan.recipe.compress_rate
        begins = isinstance(rate, float) and 0 < rate < 1
        first = round(STEPS * (1 - (rate if isinstance(rate, float) and begins else FIRST_RATE))) or 1
        limit = min(self._bytes(first, code) for code in codes)
        starts = {code: self._start(first, limit, code) for code in codes}
        for code in sorted(codes, key=lambda code: self._worst_kl(starts[code], code)) if len(codes) > 1 else codes:
            keep = self._narrowed(code, starts[code])
            if keep is not None:
                return code, keep
        nearest = min(self.measured.values(), key=lambda point: point.worst_kl)
        raise TargetError(
            f"target {self.target.text!r}: only compress_rate 0, which keeps every expert whole, is sure to reach it; "
            f"the nearest was {self.target.words(nearest)} at rate {in_words(nearest.compress_rate)} with "
            f"{nearest.code}"
        )

    def point(self, keep: int, code: CodeName) -> Point:
        """What such a bundle is measured at."""
        plan = self.fitting.at(keep, code)
        ranks = tuple((task.treatment, task.rank) for task in plan.tasks)
        key = (code if any(rank for _, rank in ranks) else None, ranks)
        if key not in self.measured:
            number = len(self.measured) + 1
            what = f"rate {in_words(plan.recipe.compress_rate)}, {code}" if keep else "the average"
            self.say(f"merge {number}: {what}, about {self.fitting.bytes(plan) / 1e6:.1f} MB")
            point = self.measured[key] = measure(plan, self.references, self.folder, self.executor, self.calibration)
            verdict = "reached" if self.target.is_reached(point) else "missed"
            self.say(f"merge {number}: {self.target.words(point)}, {verdict}")
        return self.measured[key]

    def _narrowed(self, code: CodeName, guess: int) -> int | None:
        """The least to keep of the residuals, within the tolerance; None where nothing reaches the target.

        Between a bundle that misses the target and one that reaches it the next guess is their geometric mean.
        """
        low, high = 0, None  # missed, reached
        while True:
            if self._reached(guess, code):
                high = guess
            else:
                low = guess
            if high is None:
                if low == self._end(code):
                    return None
                guess = min(low * GROWTH, self._end(code))
                continue
            if high - low <= 1 or self._bytes(high, code) <= (1 + self.tolerance) * self._bytes(low, code):
                return high
            guess = min(max(round(math.sqrt(low * high)) if low else high // GROWTH, low + 1), high - 1)

    def _start(self, first: int, limit: int, code: CodeName) -> int:
        """The most that fits; the first guess itself where it is as large."""
        most = first if self._bytes(first, code) == limit else self.fitting.most(limit, code) or 1
        return min(most, self._end(code))

    def _end(self, code: CodeName) -> int:
        """Beyond it every matrix is whole, and the search has nothing to say."""
        return max(1, self.fitting.most_compressed(code))

    def _reached(self, keep: int, code: CodeName) -> bool:
        return self.target.is_reached(self.point(keep, code))

    def _bytes(self, keep: int, code: CodeName) -> int:
        return self.fitting.bytes(self.fitting.at(keep, code))

    def _worst_kl(self, keep: int, code: CodeName) -> float:
        return self.point(keep, code).worst_kl
