"""The drop-in for the starter kit: what its `main.py` and `evaluation.py` call, answered by a bundle.

The kit (llm-merging/LLM-Merging) makes an instance with a name, calls `merge`, `get_name` and `save_model`, and then,
for every batch of rows (a dict of lists), `predict_multiple_choice` or `generate`. Nothing of the kit is imported.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.bundle import Bundle
from ..bundle.lock import writing
from ..bundle.place import begin_work, check_output, publish, restore, work_folder
from ..bundle.reading import steady
from ..errors import OutputExistsError, PolymergeError
from ..search.merge import merge
from ..staged.exact import exact_scores
from ..staged.formatter import Question
from ..staged.opening import open_pipeline
from ..staged.pipeline import Pipeline
from .run import MAX_NEW_TOKENS
from .table import parse_choices

if TYPE_CHECKING:
    from torch import Tensor


class PolymergeMerges:
    """A bundle as a method of the kit. Make a subclass that says which, or set `POLYMERGE_BUNDLE`.

    Attributes:
        bundle: its folder.
        recipe: merged into `bundle` where that is not there yet; its `thinker` and `staged` count.
        staged: ask the thinker. Off, the answers are the kit's own: greedy, and summed log-likelihoods.
        expert: of all rows; by default the bundle's router chooses where there is one, and else the average answers.
        max_gen_len: tokens of a generated answer, as in the kit.
        exact: score choices as the kit's code does to the letter: it reads a choice's first token, which with many
            tokenizers is a special one, and scores those after it (docs/competition.md).
    """

    bundle: str | None = None
    recipe: str | None = None
    staged: bool = False
    expert: str | None = None
    max_gen_len: int = MAX_NEW_TOKENS
    exact: bool = False

    def __init__(self, name: str = "polymerge") -> None:
        self.name = name
        self._pipeline: Pipeline | None = None

    def get_name(self) -> str:
        """The name under which the kit keeps its output."""
        return self.name

    def merge(self) -> Any:
        """Merges the recipe unless the bundle is there, and loads the bundle.

        Raises:
            PolymergeError: neither says which bundle.
        """
        folder = self.bundle or os.environ.get("POLYMERGE_BUNDLE")
        if not folder:
            raise PolymergeError("PolymergeMerges: say `bundle` in a subclass, or set POLYMERGE_BUNDLE")
        if self.recipe and not Path(folder).exists():
            merge(self.recipe, folder, resume=True)
        self._pipeline = open_pipeline(
            folder, recipe=self.recipe, staged=self.staged, expert=self.expert, chat=False, low_memory=False
        )
        self.bundle = folder
        return self._pipeline

    @property
    def pipeline(self) -> Pipeline:
        """What answers; there after `merge`."""
        if self._pipeline is None:
            raise PolymergeError("PolymergeMerges: call merge() first")
        return self._pipeline

    def predict_multiple_choice(self, batch: Mapping[str, Sequence[Any]]) -> tuple[Tensor, Tensor]:
        """Scores every choice of every row.

        Args:
            batch: lists `input` (texts or numbers) and `answer_choices` (lists, or a list as text).

        Returns:
            The best choices [rows], int64, and all scores [rows, most choices], float32; a row with fewer choices than
            another has -inf in their place.
        """
        import torch

        choices = [_choices(value) for value in batch["answer_choices"]]
        questions = [Question(str(text), listed) for text, listed in zip(batch["input"], choices, strict=True)]
        if self.exact:
            rows = [self._exact(question) for question in questions]
        else:
            rows = [response.scores for response in self.pipeline.respond(questions)]
        width = max(map(len, rows), default=0)
        scores = torch.tensor([[*row, *[float("-inf")] * (width - len(row))] for row in rows]).reshape(-1, width)
        return scores.argmax(dim=1), scores

    def generate(self, batch: Mapping[str, Sequence[Any]]) -> tuple[list[list[int]], list[str]]:
        """Token ids of every prompt with its answer, and the answers."""
        questions = [Question(str(text), max_new_tokens=self.max_gen_len) for text in batch["input"]]
        responses, engine = self.pipeline.respond(questions), self.pipeline.engine
        pairs = zip(questions, responses, strict=True)
        ids = [
            [*engine.encode(q.text, expert=r.expert), *engine.encode(r.text, special=False, expert=r.expert)]
            for q, r in pairs
        ]
        return ids, [response.text for response in responses]

    def save_model(self, output_dir: str | Path) -> None:
        """Puts the bundle into the kit's folder: links where the file system can, copies elsewhere.

        Raises:
            OutputExistsError: the bundle itself lies there or around it, or what lies there is no bundle.
        """
        folder, target = Path(str(self.bundle)).resolve(), (Path(output_dir) / "bundle").resolve()
        if target.is_relative_to(folder) or folder.is_relative_to(target):
            raise OutputExistsError(f"{target}: is the bundle's own place; give save_model another folder")
        check_output(target, overwrite=True)
        with writing(target), steady(Bundle.open(folder)):
            restore(target)
            copy = begin_work(work_folder(target), "copy") / "bundle"
            shutil.copytree(folder, copy, copy_function=_link)
            publish(copy, target)

    def _exact(self, question: Question) -> tuple[float, ...]:
        (step,) = self.pipeline.steps([question])
        return exact_scores(self.pipeline.engine, question.text, question.choices, step.expert)


def _choices(value: Any) -> tuple[str, ...]:
    try:
        choices = parse_choices(value) if isinstance(value, str) else tuple(str(choice) for choice in value)
    except ValueError as error:
        raise PolymergeError(f"answer_choices: {error}") from None
    if not choices:
        raise PolymergeError("answer_choices: a row of multiple_choice has none")
    return choices


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
