"""The recipe that keeps most within a budget of bytes: optuna guesses, and every guess is a merge that is measured.

What `polymerge.search.find` does for the rate and the code alone, this does for all that a recipe may choose, at the
price of more merges. Does not know what may be chosen (`polymerge.search.choices`) nor how it is shown.

Guesses are those of optuna's multi-objective TPE (Ozaki et al., 2022) over bytes and the worst expert's KL.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ..bundle.files import write_bytes
from ..bundle.place import folder_to_fill
from ..errors import needs_extra
from ..merging.plan import MergePlan, plan_merge, replanned
from ..method.codes import PLAIN
from ..recipe.merge import Recipe, RecipeLike, RecipeSettings, read_codes
from ..recipe.written import recipe_text
from .calibrate import calibrated
from .choices import Choice, Choices
from .examples import LIMIT, Prompts, read_prompts
from .find import too_small
from .sweep import Point, check_examples, front, measure, run_originals
from .target import Target, read_target

if TYPE_CHECKING:
    import optuna

TRIALS = 20
# Guesses that were made before are not merged again; after so many a trial the search has nothing new to say.
PATIENCE = 10
FILLS = (0.6, 1.0)


@dataclass(frozen=True)
class Trial:
    """A guess that was merged and measured."""

    choice: Choice
    recipe: Recipe
    point: Point

    @property
    def worst_kl(self) -> float:
        """Its point's."""
        return self.point.worst_kl

    def to_json(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """As plain data, with whether it is on the front of all trials."""
        on_front = self.point in front([trial.point for trial in trials])
        return {
            **self.point.to_json(), "choice": self.choice.to_json(), "worst_kl": self.worst_kl, "on_front": on_front,
        }  # fmt: skip


@dataclass(frozen=True)
class Explored:
    """The end of a search.

    Attributes:
        limit: bytes of the budget.
        trials: in the order in which they were made.
        best: the one whose worst expert has the least KL.
    """

    limit: int
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        return min(self.trials, key=lambda trial: (trial.worst_kl, trial.point.total_bytes))

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "limit": self.limit,
            "best": self.trials.index(self.best),
            "trials": [trial.to_json(self.trials) for trial in self.trials],
        }


def search_recipe(
    recipe: RecipeLike,
    budget: str,
    prompts: Prompts,
    output: str | Path = "search",
    *,
    trials: int = TRIALS,
    codes: Sequence[str] = PLAIN,
    limit: int = LIMIT,
    progress: Callable[[str], None] | None = None,
    **settings: Unpack[RecipeSettings],
) -> Explored:
    """Tries recipes within a budget and writes the best as `output`/recipe.yaml; `merge` it next.

    Chosen are the code, the scale, what becomes of embeddings and head, and how the rate falls over the layers; the
    rate follows from the budget. The first trial is the recipe's own settings. `output`/search.json has every trial as
    soon as it was measured; bundles are deleted once they are measured. The same seed gives the same trials.

    Args:
        budget: bytes of the bundle's weights: `20GB`, or `1.2x` for times one model.
        prompts: expert -> held-out requests, or their file.
        trials: merges that are measured, at most.
        limit: rows of each file.
        progress: called with what comes next.
        settings: keys of the recipe that count in the place of its own.

    Raises:
        MissingExtraError: optuna is not installed. TargetError: no bundle is as small as the budget. RecipeError: an
        expert without examples, an unknown code. Whatever `merge` raises.
    """
    with needs_extra("search"):
        import optuna
    target = read_target(f"size={budget}")
    plan = plan_merge(recipe, **settings)
    recipe, output, say = plan.recipe, folder_to_fill(output), progress or (lambda text: None)
    examples = read_prompts(prompts, limit)
    check_examples(recipe, examples)
    choices = Choices(recipe, target.limit(plan.base_bytes), read_codes(codes))
    _check_budget(target, choices)
    references = run_originals(recipe, examples, say)
    output.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=recipe.seed % 2**32)
    compressed = replanned(plan, embeddings="compress", lm_head="compress")  # as some trials have their tables
    with calibrated(compressed, examples, say) as calibration:
        measured = partial(measure, references=references, folder=output, calibration=calibration)
        search = _Search(choices, trials, measured, output, say)
        return search.run(optuna.create_study(directions=["minimize", "minimize"], sampler=sampler))


def _check_budget(target: Target, choices: Choices) -> None:
    if choices.plan(choices.first) is None and (least := choices.least()) > choices.limit:
        raise too_small(target, choices.limit, least)


@dataclass
class _Search:
    choices: Choices
    count: int
    measure: Callable[[MergePlan], Point]
    output: Path
    say: Callable[[str], None]
    trials: dict[tuple[Any, ...], Trial] = field(default_factory=dict)

    def run(self, study: optuna.Study) -> Explored:
        """Asks for guesses until as many as are wanted were measured."""
        options = self.choices.options()
        first = self.choices.first
        study.enqueue_trial({key: value for key, value in first.to_json().items() if len(options.get(key, (0, 1))) > 1})
        for _ in range(PATIENCE * self.count):
            if len(self.trials) == self.count:
                break
            guess = study.ask()
            measured = self._tried(_choice(guess, options))
            if measured is None:
                study.tell(guess, state=_failed())
            else:
                study.tell(guess, [measured.point.total_bytes / self.choices.limit, measured.worst_kl])
        return Explored(self.choices.limit, tuple(self.trials.values()))

    def _tried(self, choice: Choice) -> Trial | None:
        """The guess as it was measured; None where it does not fit."""
        plan = self.choices.plan(choice)
        if plan is None:
            return None
        recipe = plan.recipe
        key = (recipe.code, recipe.scale, recipe.embeddings, recipe.lm_head, str(recipe.compress_rate))
        if key not in self.trials:
            self.say(f"trial {len(self.trials) + 1} of {self.count}: {choice.words()}")
            trial = self.trials[key] = Trial(choice, recipe, self.measure(plan))
            self.say(f"trial {len(self.trials)}: {trial.point.total_bytes / 1e6:.1f} MB, worst KL {trial.worst_kl:.2g}")
            self._write()
        return self.trials[key]

    def _write(self) -> None:
        explored = Explored(self.choices.limit, tuple(self.trials.values()))
        write_bytes(self.output / "search.json", (json.dumps(explored.to_json(), indent=1) + "\n").encode())
        write_bytes(self.output / "recipe.yaml", recipe_text(explored.best.recipe).encode())


def _choice(guess: optuna.Trial, options: Any) -> Choice:
    chosen = {
        key: guess.suggest_categorical(key, allowed) if len(allowed) > 1 else allowed[0]
        for key, allowed in options.items()
    }
    return Choice(**chosen, fill=guess.suggest_float("fill", *FILLS, step=0.1))


def _failed() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL
