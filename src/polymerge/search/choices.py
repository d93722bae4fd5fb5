"""What a search over recipes may choose, and the plan that fills a budget of bytes with it.

How much is kept is never chosen: it follows from the budget by arithmetic (`polymerge.search.fitting`), so that every
guess is one that fits. Knows nothing of quality, nor of how guesses are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from ..merging.align import aligned
from ..merging.plan import MergePlan, plan_merge
from ..recipe.merge import AUTO, CodeName, Recipe, load_recipe
from .fitting import Fitting

# Of the layers: the first keeps 4 times what the middle ones do, and so on to a quarter.
TILTS = (-2.0, -1.0, 0.0, 1.0, 2.0)


@dataclass(frozen=True)
class Choice:
    """One guess: keys of a recipe, how the rate falls over the layers, and the share of the budget that is used."""

    code: CodeName
    scale: str
    embeddings: str
    lm_head: str
    tilt: float = 0.0
    fill: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def words(self) -> str:
        """What differs between guesses, in a line."""
        tilt = f", tilt {self.tilt:+g}" if self.tilt else ""
        return f"{self.code}, {self.scale}, embeddings {self.embeddings}, lm_head {self.lm_head}{tilt}"


@dataclass
class Choices:
    """All guesses for one recipe and one budget.

    Attributes:
        recipe: whose other keys hold.
        limit: bytes that the bundle's weights may take.
        codes: those that may be used.
    """

    recipe: Recipe
    limit: int
    codes: Sequence[CodeName]
    _fittings: dict[tuple[str, ...], Fitting] = field(default_factory=dict)

    @property
    def first(self) -> Choice:
        """The recipe's own."""
        own = self.recipe
        code = own.code if own.code in self.codes else self.codes[0]
        return Choice(code, own.scale, own.embeddings, own.lm_head)

    def options(self) -> Mapping[str, Sequence[Any]]:
        """Key -> what it may be; a key that makes no difference to these experts has one option."""
        allowed = {key: _literals(key) for key in ("scale", "embeddings", "lm_head")}
        if not any(task.record.role == "lm_head" for task in self.fitting(self.first).plan.tasks):
            allowed["lm_head"] = (self.recipe.lm_head,)
        return {"code": tuple(self.codes), **allowed, "tilt": TILTS}

    def fitting(self, choice: Choice) -> Fitting:
        """The experts under a choice, at any rate."""
        key = (choice.scale, choice.embeddings, choice.lm_head)
        if key not in self._fittings:
            names = ("scale", "embeddings", "lm_head")
            recipe = load_recipe(self.recipe, **dict(zip(names, key, strict=True)))  # type: ignore[arg-type]
            self._fittings[key] = Fitting.of(aligned(plan_merge(recipe.of_tables_in_use())))
        known = self._fittings[key]
        return Fitting(known.plan, known.shared, choice.tilt)

    def plan(self, choice: Choice) -> MergePlan | None:
        """The plan that keeps the most of the residuals within its share of the budget; None where nothing fits."""
        fitting = self.fitting(choice)
        keep = fitting.most(int(choice.fill * self.limit), choice.code)
        return None if keep is None else fitting.at(keep, choice.code)

    def least(self) -> int:
        """Bytes of the smallest bundle that any choice has: without residuals."""
        options = self.options()
        guesses = (
            Choice(self.codes[0], scale, embeddings, lm_head)
            for scale in options["scale"]
            for embeddings in options["embeddings"]
            for lm_head in options["lm_head"]
        )
        fittings = ((self.fitting(guess), guess.code) for guess in guesses)
        return min(fitting.bytes(fitting.at(0, code)) for fitting, code in fittings)


def _literals(key: str) -> tuple[str, ...]:
    return tuple(name for name in get_args(Recipe.model_fields[key].annotation) if name != AUTO)
