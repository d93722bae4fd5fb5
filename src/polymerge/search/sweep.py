"""How much of every expert is kept for how many bytes: a merge for every rate and code, held against the originals.

Knows the order of the work and what is measured: the distance of next-token distributions on held-out prompts, and
whether greedy decoding would give the right answers. Does not know how results are shown (`polymerge.report`,
`polymerge.cli`) nor what anyone aims at (`polymerge.search.find`).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from ..bundle.bundle import Bundle
from ..bundle.inspect import inspect_bundle
from ..engine.local.engine import HFEngine
from ..errors import RecipeError
from ..merging.executor import Executor, in_threads
from ..merging.plan import MergePlan, plan_merge
from ..merging.run import run_plan
from ..method.codes import PLAIN
from ..model.loading import load_model
from ..recipe.merge import CodeName, Recipe, RecipeLike, RecipeSettings, Source, load_recipe, read_codes
from ..recipe.rates import AnyRates, in_words
from .examples import LIMIT, Example, Prompts, read_prompts

RATES = (0.9, 0.95, 0.98)

# logits(ids [1, T]) -> [1, T, vocabulary]
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """How near a model is to an original.

    An answer is right when greedy decoding would give exactly it: every token of the answer, and the end of the text,
    is the model's likeliest after the right ones before it. That needs no generation: one forward pass tells it. It is
    another question than `polymerge.data.score` answers, which takes a generated text and forgives its form.

    Attributes:
        kl: mean KL(original || model) of the next token, in nats a token.
        top1: share of tokens at which both have the same likeliest one.
        tokens: how many were compared.
        accuracy: share of the examples with an answer on which the model is right; None where none has an answer.
        original_accuracy: the original's.
    """

    kl: float
    top1: float
    tokens: int
    accuracy: float | None = None
    original_accuracy: float | None = None

    @property
    def kept(self) -> float | None:
        """The accuracy as a share of the original's; None where that is nothing."""
        return self.accuracy / self.original_accuracy if self.accuracy is not None and self.original_accuracy else None


@dataclass(frozen=True)
class ExampleAgreement:
    """One example of an `Agreement`, for whoever pairs examples.

    Attributes:
        kl: summed over the tokens, in nats. same: tokens at which both have the same likeliest one.
        right, original_right: whether greedy decoding gives the answer; None for an example without one.
    """

    kl: float
    same: int
    tokens: int
    right: bool | None
    original_right: bool | None


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


@dataclass(frozen=True)
class _ComparedTokens:
    """Token ids of prompt and answer, and how many at the end are compared."""

    ids: list[int]
    compared: int
    has_answer: bool

    def is_greedy(self, log_probabilities: Tensor) -> bool:
        """Whether greedy decoding would give exactly the answer's tokens. [compared, vocabulary]"""
        return log_probabilities.argmax(-1).tolist() == self.ids[-self.compared :]


class Reference:
    """What an original says on its examples; other models are held against it.

    Attributes:
        accuracy: the original's own; None where no example has an answer.

    Raises:
        RecipeError: no example has two tokens. SourceError, ModelError: the original cannot be run.
    """

    def __init__(self, source: Source | str, examples: Sequence[Example], *, trust_remote_code: bool = False) -> None:
        engine = HFEngine.from_checkpoint(source, trust_remote_code=trust_remote_code)
        self._rows = [row for row in (_tokens(engine, example) for example in examples) if row.compared > 0]
        if not self._rows:
            name = source.source if isinstance(source, Source) else source
            raise RecipeError(f"{name}: none of its prompts has two tokens, so there is nothing to compare")
        self._original = list(self._log_probabilities(lambda ids: engine.model(ids).logits, engine.device))
        answered = [row.is_greedy(o) for row, o in zip(self._rows, self._original, strict=True) if row.has_answer]
        self.accuracy = sum(answered) / len(answered) if answered else None

    def against(self, logits: Logits, device: torch.device | None = None) -> Agreement:
        """Compares a model that has the original's tokens."""
        return agreement(self.each(logits, device))

    def each(self, logits: Logits, device: torch.device | None = None) -> list[ExampleAgreement]:
        """As `against`, example by example."""
        others = self._log_probabilities(logits, device)
        return [_compared(row, one, other) for row, one, other in zip(self._rows, self._original, others, strict=True)]

    def _log_probabilities(self, logits: Logits, device: torch.device | None) -> Iterator[Tensor]:
        """[compared tokens, vocabulary] of every example, on the CPU."""
        for row in self._rows:
            with torch.no_grad():
                token_logits = logits(torch.tensor([row.ids], device=device))[0, -row.compared - 1 : -1]
            yield torch.log_softmax(token_logits.float(), dim=-1).cpu()


def agreement(examples: Sequence[ExampleAgreement]) -> Agreement:
    """All examples together."""
    tokens, answered = sum(e.tokens for e in examples), [e for e in examples if e.right is not None]
    accuracy = sum(bool(e.right) for e in answered) / len(answered) if answered else None
    original = sum(bool(e.original_right) for e in answered) / len(answered) if answered else None
    kl, same = sum(e.kl for e in examples) / tokens, sum(e.same for e in examples) / tokens
    return Agreement(kl, same, tokens, accuracy, original)


def _compared(row: _ComparedTokens, original: Tensor, whole: Tensor) -> ExampleAgreement:
    other = whole[:, : original.shape[-1]]  # a bundle may hold tokens that the original does not know
    return ExampleAgreement(
        kl=float((original.exp() * (original - other)).sum()),
        same=int((original.argmax(-1) == other.argmax(-1)).sum()),
        tokens=len(original),
        right=row.is_greedy(other) if row.has_answer else None,
        original_right=row.is_greedy(original) if row.has_answer else None,
    )


def _tokens(engine: HFEngine, example: Example) -> _ComparedTokens:
    prompt = engine.chat_prompt([{"role": "user", "content": example.prompt}])
    if not example.answer:
        return _ComparedTokens(prompt, len(prompt) - 1, False)
    end = engine.tokenizer.eos_token_id
    answer = engine.encode(example.answer, special=False) + ([end] if end is not None else [])
    return _ComparedTokens(prompt + answer, len(answer), True)


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
    recipe, output = load_recipe(recipe, **settings), Path(output).expanduser()
    examples = read_prompts(prompts, limit)
    check_examples(recipe, examples)
    names = read_codes(codes)
    # at rate 1 there is no residual to store, so codes do not differ
    points_at = [(rate, code) for rate in rates for code in (names if rate < 1 else names[:1])]
    lossy = plan_merge(recipe).recipe  # whose tables those of all codes are
    recipes = [
        load_recipe(lossy if 0 < rate < 1 else recipe, compress_rate=rate, code=code) for rate, code in points_at
    ]
    say = progress or (lambda text: None)
    references = run_originals(recipe, examples, say)
    output.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    for number, changed in enumerate(recipes, 1):
        say(f"{number} of {len(recipes)}: rate {in_words(changed.compress_rate)}, {changed.code}")
        points.append(measure(plan_merge(changed), references, output))
        (output / "sweep.json").write_text(json.dumps([to_json(p, points) for p in points], indent=1) + "\n")
    return points


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
    plan: MergePlan, references: Mapping[str, Reference], folder: Path | None, executor: Executor = in_threads
) -> Point:
    """Merges, measures and deletes the bundle. The recipe's `max_error` does not count here.

    Args:
        folder: where the bundle lies for a moment; by default the system's place for such files.
    """
    recipe = plan.recipe.model_copy(update={"max_error": None})
    with tempfile.TemporaryDirectory(dir=folder, prefix=".bundle-") as place:
        began = time.monotonic()
        bundle = run_plan(replace(plan, recipe=recipe), Path(place) / "bundle", executor=executor)
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
