"""An assessment: every candidate on every field, each in a process of its own, remembered as soon as it is measured.

Knows the order of things and the cache; what a worker does is in `polymerge.assess.worker`. A candidate that cannot be
measured is a row with its reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..bundle.files import write_bytes
from ..data.rows import content_hash
from ..data.schema import AnsweredRow, read_all
from ..errors import PolymergeError, RecipeError, install_line
from ..host import cache_folder, pick_device
from ..model.quantised import check_base, held_digest
from ..recipe.source import Source
from ..sources.fingerprint import digest_beside
from ..sources.opening import open_checkpoint
from ..version import __version__
from .measure import AskSettings, Measurement
from .process import run_in_process
from .propose import Choices, Proposals, propose
from .recipe import DATA_SUFFIXES, TASK_SUFFIXES, AssessRecipe
from .results import Assessment, Candidate
from .sizes import dense_bytes, families
from .worker import CandidateJob, measurement

# Runs a job and yields what its worker says.
RunJob = Callable[[CandidateJob], Iterator[dict[str, Any]]]
# (expert or None, task) -> the name under which its measurement is remembered
Keys = dict[tuple[str | None, str], str]


@dataclass(frozen=True)
class AssessProgress:
    """What is being done: questions of a task (or chunks of them) of a candidate.

    Attributes:
        step, steps: pairs of candidate and task, remembered ones included.
    """

    candidate: str
    task: str
    step: int
    steps: int
    done: int = 0
    total: int = 0


OnAssess = Callable[[AssessProgress], None]


def assess(
    recipe: AssessRecipe,
    *,
    fresh: bool = False,
    cache: Path | None = None,
    progress: OnAssess | None = None,
    run: RunJob = run_in_process,
) -> Assessment:
    """Measures every candidate and thinker, and proposes a set.

    Args:
        fresh: measure again what is remembered.
        cache: the folder of what is remembered; by default inside polymerge's own.
        run: how a job is run.

    Raises:
        DataError: a data set or task file that cannot be read. Whatever else goes wrong is a row of the result.
    """
    measuring = _Run(recipe, fresh, cache or cache_folder() / "assess", progress, run)
    rows = [measuring.candidate(name, source, "candidate") for name, source in recipe.candidates.items()]
    rows += [measuring.candidate(name, source, "thinker") for name, source in recipe.thinkers.items()]
    return Assessment(recipe.fields, tuple(rows), _proposals(recipe, rows), _settings(recipe))


def assess_bundle(
    bundle: Bundle | str | Path,
    recipe: AssessRecipe,
    *,
    base: str = "16bit",
    fresh: bool = False,
    cache: Path | None = None,
    progress: OnAssess | None = None,
    run: RunJob = run_in_process,
) -> Assessment:
    """Measures a bundle's own experts and its average inside the bundle, in one process. Proposes nothing.

    Args:
        recipe: of its fields and settings; its candidates are not looked at.
        base: of the average in memory, as `load_model` takes it.

    Raises:
        ModelError, MissingExtraError: this machine cannot hold that base.
    """
    check_base(base, pick_device(recipe.device))
    bundle = Bundle.open(bundle)
    measuring = _Run(recipe, fresh, cache or cache_folder() / "assess", progress, run)
    rows = measuring.bundle(bundle, base)
    return Assessment(recipe.fields, tuple(rows), None, {**_settings(recipe), "bundle": bundle.digest, "base": base})


class _Run:
    """One assessment's tasks, cache and listeners."""

    def __init__(self, recipe: AssessRecipe, fresh: bool, cache: Path, progress: OnAssess | None, run: RunJob) -> None:
        self.recipe, self.fresh, self.cache, self.progress, self.run = recipe, fresh, cache, progress, run
        fields = AskSettings.__dataclass_fields__
        self.ask = AskSettings(**{name: getattr(recipe, name) for name in fields})
        self.tasks = {task: _identity(task) for tasks in recipe.fields.values() for task in tasks}
        self.step, self.steps = 0, len(self.tasks) * (len(recipe.candidates) + len(recipe.thinkers))

    def candidate(self, name: str, source: Source, role: str) -> Candidate:
        row = Candidate(name, source.source, role)
        try:
            fingerprint = _fingerprint(source)
        except PolymergeError as error:
            row.failed[""] = str(error)
            self.step += len(self.tasks)
            return row
        keys: Keys = {(None, task): self._key(fingerprint, task) for task in self.tasks}
        self._measure(source.model_dump(exclude_none=True), fingerprint, keys, {None: row})
        return row

    def bundle(self, bundle: Bundle, base: str) -> list[Candidate]:
        rows: dict[str | None, Candidate] = {None: Candidate("average", str(bundle.path))}
        rows |= {name: Candidate(name, str(bundle.path)) for name in bundle.experts}
        self.steps = len(self.tasks) * len(rows)
        digest = held_digest(bundle.digest, base)
        keys = {(expert, task): self._key(f"{digest}/{expert or ''}", task) for expert in rows for task in self.tasks}
        self._measure({"bundle": str(bundle.path), "base": base}, digest, keys, rows)
        return [*(row for name, row in rows.items() if name), rows[None]]

    def _measure(
        self,
        source: dict[str, Any],
        fingerprint: str,
        keys: Keys,
        rows: Mapping[str | None, Candidate],
    ) -> None:
        """Fills the rows: from the cache first, then from a worker."""
        left = []
        for (expert, task), key in keys.items():
            known = None if self.fresh else self._known(key)
            if known is None:
                left.append((expert, task, task.endswith(DATA_SUFFIXES)))
            else:
                self.step += 1
                self._put(rows[expert], task, known)
        if not left:
            return
        recipe = self.recipe
        answers = self.cache / f"{fingerprint[:40]}.sqlite"
        if self.fresh:
            answers.unlink(missing_ok=True)
        job = CandidateJob(
            source,
            left,
            self.ask,
            recipe.device,
            recipe.dtype,
            recipe.batch_tokens,
            recipe.trust_remote_code,
            str(answers),
        )
        if self._listen(job, keys, rows):
            answers.unlink(missing_ok=True)  # only what was interrupted needs them again

    def _listen(self, job: CandidateJob, keys: Keys, rows: Mapping[str | None, Candidate]) -> bool:
        """Takes in what the worker says. False where the model could not be loaded or the process died."""
        place: tuple[str | None, str] = job.work[0][:2]
        pending = {item[:2] for item in job.work}
        for event in self.run(job):
            kind = event["event"]
            if kind == "failed" and event["task"] is None:
                for expert, task in pending:
                    self._fail(rows[expert], task, event["reason"])
                    self.step += 1
                return False
            if kind == "progress":
                self._tell(rows[place[0]].name, place[1], event["done"], event["total"])
                continue
            if kind == "loaded":
                continue
            place = (event["expert"], event["task"])
            if kind == "begins":
                self._tell(rows[place[0]].name, place[1])
                continue
            self.step += 1
            pending.discard(place)
            if kind == "failed":
                self._fail(rows[place[0]], place[1], event["reason"])
            else:
                write_bytes(self.cache / f"{keys[place]}.json", json.dumps(event["measurement"]).encode())
                self._put(rows[place[0]], place[1], measurement(event["measurement"]))
        return True

    def _put(self, row: Candidate, task: str, measured: Measurement) -> None:
        for name, tasks in self.recipe.fields.items():
            if task in tasks:
                row.measured.setdefault(name, {})[task] = measured

    def _fail(self, row: Candidate, task: str, reason: str) -> None:
        for name, tasks in self.recipe.fields.items():
            if task in tasks:
                row.failed[name] = reason
        if row.failed.keys() >= self.recipe.fields.keys() and len(set(row.failed.values())) == 1:
            row.failed = {"": reason}

    def _key(self, fingerprint: str, task: str) -> str:
        recipe = self.recipe
        return _hash([__version__, fingerprint, self.tasks[task], asdict(self.ask), recipe.device, recipe.dtype])

    def _known(self, key: str) -> Measurement | None:
        try:
            return measurement(json.loads((self.cache / f"{key}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _tell(self, candidate: str, task: str, done: int = 0, total: int = 0) -> None:
        if self.progress:
            self.progress(AssessProgress(candidate, task, self.step + 1, self.steps, done, total))


def _identity(task: str) -> list[str]:
    """What a task is: the content of a file, or a name in a version of the harness."""
    if task.endswith(DATA_SUFFIXES):
        read_all(AnsweredRow, task)
        return ["rows", content_hash(Path(task))]
    try:
        harness = version("lm-eval")
    except PackageNotFoundError:
        raise RecipeError(f"task {task!r} is the harness's; {install_line('eval')}") from None
    return ["harness", harness, task, content_hash(Path(task)) if task.endswith(TASK_SUFFIXES) else ""]


def _fingerprint(source: Source) -> str:
    checkpoint = open_checkpoint(source)
    return _hash([checkpoint.fingerprint(), checkpoint.config, digest_beside(checkpoint.folder)])


def _proposals(recipe: AssessRecipe, rows: list[Candidate]) -> Proposals | None:
    reached = {row.name: row.accuracies(recipe.fields) for row in rows}
    measured = [row.name for row in rows if row.role == "candidate" and reached[row.name]]
    if not measured:
        return None
    sources = {name: recipe.candidates[name] for name in measured}
    groups, notes = families(sources, recipe.merge_recipe, recipe.merge.get("dtype"))
    thinkers = {
        row.name: dense_bytes(recipe.thinkers[row.name], recipe.dtype)
        for row in rows
        if row.role == "thinker" and reached[row.name]
    }
    return propose(
        Choices(
            fields=list(recipe.fields),
            accuracy=reached,
            families=groups,
            thinkers=thinkers,
            working={row.name: row.working_memory for row in rows},
            limit=None if recipe.memory_gb is None else recipe.memory_gb * 1e9,
            most=recipe.max_experts,
        ),
        notes=notes,
    )


def _settings(recipe: AssessRecipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude={"candidates", "thinkers"}, exclude_none=True)


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:40]
