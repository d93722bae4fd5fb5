"""The recipe of a merge: what a YAML file or a dict may say, checked before any tensor is read.

Knows the recipe's keys and their defaults. Does not know how a mistake finds its line (`polymerge.recipe.lines`), nor
checkpoints: whether a source exists is found out by `polymerge.sources.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, TypedDict, Unpack

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from ..errors import RecipeError
from ..method.codes import known_code
from ..naming import check_expert_names
from .lines import Lines, read_yaml, validated
from .numbers import Real, Size, Whole
from .published import PUBLISHED_METHOD, spelled_out
from .rates import PUBLISHED_RATE, NamedRates, Rates
from .response import StageSettings, ThinkerSettings
from .source import Source, WrittenSource, anchored, path_from, source_from

KeepOrAverage = Literal["keep", "average"]
# What may become of embeddings and heads.
Table = Literal["keep", "average", "compress"]
# What the experts call for (`polymerge.recipe.automatic`).
AUTO = "auto"
ChosenTable = Literal["auto", "keep", "average", "compress"]
# Of their 16-bit bytes an expert's own take a twentieth: the least that loses little (docs/codes.md).
EMBEDDING_RATE = 0.95
# What the stored base of a linear layer is: the model under all its experts' adapters, or the experts' average.
BaseKind = Literal["adapters", "average"]
DTypeName = Literal["float32", "bfloat16", "float16"]
CodeName = Annotated[str, AfterValidator(known_code)]
ChosenCode = Annotated[str, AfterValidator(lambda name: name if name == AUTO else known_code(name))]
DeviceName = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]


class Recipe(BaseModel):
    """Everything that a merge is told. Unknown keys are refused.

    Attributes:
        experts: name -> source, in the order in which experts are listed everywhere.
        method: `published` stands for the published setting of the seven keys below that decide how experts are stored;
            those that the recipe says itself count. None once it is read.
        compress_rate: share of a residual's parameters that is dropped, in [0, 1]. 0 keeps every expert
            exactly, 1 is the plain normalised average. The published setting is 0.95. One number for all matrices; a
            list of one a layer; or a mapping of patterns of names to numbers, with `default` for the rest.
        code: how residuals are stored: `factors` (published) in the bundle's dtype, or `int8` and `int4`, whole numbers
            with scales at a larger rank, in at most the bytes of 16-bit factors; or `entropy`, at a still larger one.
            `auto` is `int4`; for adapters over one model, and at a rate of 0 or 1, `factors`.
        scale: `per_expert` (published: each expert keeps its own norm per tensor) or `shared` (the norms are
            folded into the residuals, so that a plain PEFT loader is exact).
        embeddings, lm_head, norms: `keep` each expert's own tensor or `average` them into one. `norms`
            covers every tensor that is neither an embedding, the lm_head nor a linear weight (biases too). Embeddings
            and the head may be stored as linear weights are, too: `compress`, which is not published. `auto` is
            `compress` where `code` is `auto` too and becomes `int4`, and `keep` otherwise.
        embedding_rate: the compress rate of embeddings and heads with `compress`: one number, or a mapping of patterns
            of names to numbers.
        adapters: how experts are stored that are LoRA adapters over one model: `exact`, as that very model and the own
            factors of each, or `average` (published), as their average and residuals from it, as all other experts are.
        align: `permutation` for experts that do not share a base: every expert's neurons and heads are brought into the
            order in which they fit the first expert's best, which changes no expert's function.
        calibration: expert -> JSONL file of requests, of which it is seen what of its residuals counts for its answers
            (not published; docs/codes.md).
        dtype: what the bundle is stored in; by default the sources' own.
        device: where the arithmetic runs; `auto` is the GPU where there is one.
        workers: tensors in work at once. The result does not depend on it.
        seed: of the random sketches.
        n_oversamples, n_iter: the randomized SVD's (Halko, Martinsson and Tropp, 2011).
        max_error: largest relative error of a tensor that is accepted; above it the command exits with 3.
        trust_remote_code: allow a source's own modelling code to run. Off.
        config: folder with the experts' config.json, for `polymerge plan` where the sources are not here.
        thinker, staged: how the bundle answers; the merge does not look at them.
        memory_limit: bytes that bundle, thinker and their caches may take together (`48 GB`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    experts: dict[str, WrittenSource]
    method: Literal["published"] | None = None
    compress_rate: Rates = PUBLISHED_RATE
    code: ChosenCode = AUTO
    scale: Literal["per_expert", "shared"] = "per_expert"
    embeddings: ChosenTable = "auto"
    lm_head: ChosenTable = "auto"
    embedding_rate: NamedRates = EMBEDDING_RATE
    norms: KeepOrAverage = "keep"
    adapters: Literal["exact", "average"] = "exact"
    align: Literal["permutation"] | None = None
    calibration: dict[str, str] = {}
    dtype: DTypeName | None = None
    device: DeviceName = "auto"
    workers: Annotated[Whole, Field(ge=1, le=64)] = 1
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    n_oversamples: Annotated[Whole, Field(ge=0, le=256)] = 16
    n_iter: Annotated[Whole, Field(ge=0, le=8)] = 2
    max_error: Annotated[Real, Field(gt=0.0)] | None = None
    trust_remote_code: bool = False
    config: str | None = None
    thinker: ThinkerSettings | None = None
    staged: StageSettings | None = None
    memory_limit: Annotated[Size, Field(gt=0)] | None = None

    _places: dict[tuple[str, ...], str] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Wherever it was read from."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def of_tables_in_use(self) -> Self:
        """Itself without an `embedding_rate` where it compresses neither embeddings nor heads, for who tries choices of
        these."""
        in_use = "compress" in (self.embeddings, self.lm_head)
        return self if in_use else self.model_copy(update={"embedding_rate": EMBEDDING_RATE})

    def place_of(self, expert: str) -> str:
        """What an error about an expert's source begins with: the file and the line that name it, and the expert."""
        place = self._places.get(("experts", expert))
        return f"{place}: expert {expert!r}: " if place else f"expert {expert!r}: "

    def place_of_key(self, key: str) -> str:
        """What an error about a key begins with: the file and the line where it stands, and the key."""
        return f"{self._places.get((key,), 'recipe')}: {key}: "

    def from_file(self, path: Path, lines: Lines) -> Self:
        """Itself, knowing where in a file its keys and its experts stand."""
        self._places.update({keys: f"{path}, line {line}" for keys, line in lines.items()})
        self._places.update({("experts", e): str(path) for e in self.experts if ("experts", e) not in lines})
        return self

    def like(self, other: Recipe, *, but: Iterable[str] = ()) -> Self:
        """Itself, with keys and experts that stand where another recipe's do, `but` for keys that stand elsewhere."""
        self._places.update({keys: place for keys, place in other._places.items() if keys[0] not in but})
        return self

    @model_validator(mode="before")
    @classmethod
    def _method_is_spelled_out(cls, recipe: Any) -> Any:
        return spelled_out(recipe)

    @model_validator(mode="after")
    def _calibration_is_of_experts(self) -> Self:
        if stranger := next((name for name in self.calibration if name not in self.experts), None):
            raise ValueError(f"calibration: no expert {stranger!r} among {', '.join(self.experts)}")
        if self.calibration and self.align is not None:
            raise ValueError("calibration: is not there for experts that are aligned; leave one of the two out")
        return self

    @field_validator("experts")
    @classmethod
    def _names_are_safe(cls, experts: dict[str, Source]) -> dict[str, Source]:
        check_expert_names(experts)
        if len(experts) < 2:
            raise ValueError(f"a merge needs at least two experts, found {len(experts)}")
        return experts


# What stands for a recipe: a YAML file, its dict, or the experts alone as {name: source}.
RecipeLike: TypeAlias = Recipe | Mapping[str, Any] | str | Path


class RecipeSettings(TypedDict, total=False):
    """Keys of a recipe as keyword arguments, in the place of what it says; None leaves a key as it is."""

    method: str | None
    compress_rate: float | Sequence[float] | Mapping[str, float] | None
    code: str | None
    scale: str | None
    embeddings: str | None
    lm_head: str | None
    embedding_rate: float | Mapping[str, float] | None
    norms: str | None
    align: str | None
    calibration: Mapping[str, str] | None
    dtype: str | None
    device: str | None
    workers: int | None


def load_recipe(source: RecipeLike, **settings: Unpack[RecipeSettings]) -> Recipe:
    """A checked recipe from a YAML file, a dict or a recipe.

    A dict whose key `experts` holds a mapping is a recipe's; any other is read as the experts, {name: source}.
    Relative paths of a file's sources are taken from the file's own folder.

    Args:
        settings: keys of the recipe that count in the place of its own.

    Raises:
        RecipeError: one line, with the file and the line of the mistake where there is a file.
    """
    recipe = _loaded(source)
    changed = {key: value for key, value in settings.items() if value is not None}
    if changed.get("method") == "published":
        changed = {**PUBLISHED_METHOD, **changed}
    if not changed:
        return recipe
    return validated(Recipe, recipe.model_dump() | changed, where="recipe", lines={}).like(recipe, but=changed)


def read_codes(names: Iterable[str]) -> tuple[CodeName, ...]:
    """Codes that somebody named, each once. Raises RecipeError for one that does not exist."""
    try:
        codes = tuple(dict.fromkeys(map(known_code, names)))
    except ValueError as error:
        raise RecipeError(f"codes: {error}") from None
    if not codes:
        raise RecipeError("codes: an empty list has none; leave it out, or name some")
    return codes


def _loaded(source: RecipeLike) -> Recipe:
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return validated(Recipe, _with_experts(source), where="recipe", lines={})
    if not isinstance(source, str | PathLike):
        kind = type(source).__name__
        raise RecipeError(f"recipe: give a YAML file, or a mapping of names to experts; a {kind} has no names")
    path = Path(source)
    data, lines = read_yaml(path)
    recipe = validated(Recipe, data, where=str(path), lines=lines)
    experts = {name: anchored(item, path.parent) for name, item in recipe.experts.items()}
    updates: dict[str, Any] = {"experts": experts, "config": path_from(recipe.config, path.parent)}
    updates["calibration"] = {name: path_from(file, path.parent) for name, file in recipe.calibration.items()}
    if recipe.thinker:
        thinker = recipe.thinker
        anchors = {"source": source_from(thinker.source, path.parent), "config": path_from(thinker.config, path.parent)}
        updates["thinker"] = thinker.model_copy(update=anchors)
    if recipe.staged:
        templates = path_from(recipe.staged.templates, path.parent)
        updates["staged"] = recipe.staged.model_copy(update={"templates": templates})
    return recipe.model_copy(update=updates).from_file(path, lines)


def _with_experts(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe's dict, also of experts alone. What is neither stays as it is, and is refused as a recipe."""
    if isinstance(given.get("experts"), Mapping):
        return given
    only_sources = all(isinstance(value, str | Path | Source | Mapping) for value in given.values())
    return {"experts": dict(given)} if given and only_sources else given
