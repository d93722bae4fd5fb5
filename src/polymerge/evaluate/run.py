"""Runs lm-evaluation-harness on an engine, and says what it found as plain data.

Knows the harness's own function and its settings; the model's side is `polymerge.evaluate.harness_model`.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.base import Engine
from ..errors import DataError, MissingExtraError, ModelError, PolymergeError, RecipeError, install_line
from ..sources.hub import hub_answers
from ..version import __version__
from .modes import Choose
from .questions import HINT, CheckedTasks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..model.assignment import RowExpert

# Where a task measures several things, the first of these is its accuracy.
ACCURACIES = ("acc", "exact_match", "acc_norm", "pass@1", "em", "f1")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HarnessSettings:
    """The harness's settings under its own names (`lm_eval run --help`).

    Attributes:
        bootstrap_iters: of the standard errors that need resampling; 0 leaves them out.
    """

    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    gen_kwargs: str | None = None
    log_samples: bool = False
    predict_only: bool = False
    bootstrap_iters: int = 1000
    seed: int = 0


def evaluate(
    engine: Engine,
    tasks: Sequence[str | Mapping[str, Any]],
    choose: Choose | None = None,
    *,
    include_path: str | Path | None = None,
    settings: HarnessSettings | None = None,
    tokenizer: Any = None,
    tokenizer_of: Callable[[RowExpert], Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The harness's results on an engine.

    Args:
        tasks: names, patterns (`mmlu_*`), YAML files, or whole configurations (`polymerge.evaluate.tasks`).
        choose: a mode (`polymerge.evaluate.modes`); by default no expert answers.
        include_path: a folder with task YAML files of one's own, known under their names.
        tokenizer: for `apply_chat_template`.
        tokenizer_of: an expert's own; without it, all have the `tokenizer`'s template.
        about: written into the results beside the fingerprint: the mode, the router's hash.

    Returns:
        The harness's own results, and under `polymerge` the fingerprint, the settings and which expert answered how
        many questions of each task.

    Raises:
        MissingExtraError: lm-eval is not installed. RecipeError: an unknown task, or one that cannot be loaded.
        DataError: a question that measures nothing, unless answers are not judged (`predict_only`).
        ModelError: the mode, the template or a task's settings do not fit the engine.
    """
    require_harness()
    from lm_eval import simple_evaluate

    from .harness_model import PolymergeLM

    settings = settings or HarnessSettings()
    judged = not settings.predict_only
    model = PolymergeLM(engine, choose, tokenizer=tokenizer, tokenizer_of=tokenizer_of, judged=judged)
    if settings.apply_chat_template:
        model.chat_template(True)  # refuses early
    manager, loaded = _load_tasks(tasks, include_path)
    options = {key: value for key, value in asdict(settings).items() if key != "seed"}
    options["limit"] = _questions(settings.limit)
    if (settings.num_fewshot or 0) < 0:
        raise RecipeError(f"--num-fewshot {settings.num_fewshot}: is 0 or more")
    asks_hub = any(isinstance(task, str) for task in loaded)
    with _harness_errors(), _no_git(), _cache_alone() if asks_hub and not hub_answers() else nullcontext():
        results: dict[str, Any] = simple_evaluate(
            model=model,
            tasks=loaded,
            task_manager=CheckedTasks(manager, settings.limit, judged=judged),
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
            **options,
        )
    results["polymerge"] = {
        "version": __version__,
        "fingerprint": engine.fingerprint,
        "settings": asdict(settings),
        "answered_by": {task: dict(counts) for task, counts in model.chosen.items()},
        **(about or {}),
    }
    return results


def _questions(limit: float | None) -> float | None:
    """A limit in the harness's form, which takes what is below 1 for a share. Raises RecipeError."""
    if limit is None or 0 < limit < 1:
        return limit
    if not limit >= 1 or limit % 1:  # NaN is neither
        raise RecipeError(f"--limit {limit:g}: is a whole number of questions, or a share of them below 1")
    return int(limit)


def accuracy(metrics: Mapping[str, Any]) -> float | None:
    """The accuracy among a task's metrics ({"acc,none": 0.5, ...}), None where it measures something else."""
    for name in ACCURACIES:
        for key, value in metrics.items():
            if key.partition(",")[0] == name and isinstance(value, int | float):
                return float(value)
    return None


def _load_tasks(tasks: Sequence[str | Mapping[str, Any]], include_path: str | Path | None) -> tuple[Any, list[Any]]:
    """The harness's task manager and the tasks in its form; patterns are replaced by the names that they match."""
    if not tasks:
        raise RecipeError("no tasks given")
    if include_path is not None and not Path(include_path).is_dir():
        raise RecipeError(f"{include_path}: no such folder of tasks")
    for task in tasks:
        if _is_file(task) and not Path(str(task)).is_file():
            raise RecipeError(f"{task}: no such task file")
    folder = str(include_path) if include_path else None
    names = [task for task in tasks if isinstance(task, str) and not _is_file(task)]
    manager = _manager(folder, False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = _manager(folder, True)
    loaded: list[Any] = []
    for task in tasks:
        if isinstance(task, str) and not _is_file(task):
            loaded += _known(task, manager)
        else:
            loaded.append(task if isinstance(task, str) else dict(task))
    return manager, loaded


@lru_cache
def _manager(folder: str | None, defaults: bool) -> Any:
    """The harness's index of tasks. With its own thousands of tasks it takes some seconds, so it is made once."""
    from lm_eval.tasks import TaskManager

    with _harness_errors():
        return TaskManager(include_path=folder, include_defaults=defaults)


def _is_file(task: str | Mapping[str, Any]) -> bool:
    return isinstance(task, str) and Path(task).suffix in (".yaml", ".yml")


def _known(task: str, manager: Any) -> list[str]:
    names: list[str] = manager.match_tasks([task])
    if not names:
        near = difflib.get_close_matches(task, manager.all_tasks, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise RecipeError(f"unknown task {task!r}{hint}")
    return names


@contextmanager
def _harness_errors() -> Iterator[None]:
    """Whatever the harness raises, as one line."""
    try:
        yield
    except PolymergeError:
        raise
    except (ConnectionError, FileNotFoundError) as error:
        raise RecipeError(f"a task's data cannot be loaded: {_one_line(error)}") from None
    except (IndexError, ZeroDivisionError) as error:
        log.debug("the harness's own error", exc_info=True)
        raise DataError(f"a task's questions cannot be judged ({_one_line(error)}); {HINT}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        log.debug("the harness's own error", exc_info=True)
        if "Sample larger than population" in str(error):
            raise DataError("a task has fewer rows than --num-fewshot asks for beside each question") from None
        raise ModelError(f"lm-evaluation-harness: {type(error).__name__}: {_one_line(error)}") from None
    except Exception as error:  # of jinja2, PyYAML, datasets and what else reads a task
        log.debug("the harness's own error", exc_info=True)
        cause = error.__cause__ or error  # `datasets` says there what was wrong
        said = _one_line(cause) or "it holds nothing"
        raise DataError(f"a task or its data cannot be read: {said}") from None


@contextmanager
def _no_git() -> Iterator[None]:
    """The harness notes the commit of whatever repository one stands in, and where there is none its git complains on
    the terminal. The results say polymerge's version and the bundle's fingerprint in its place."""
    from lm_eval import evaluator

    asked = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked


@contextmanager
def _cache_alone() -> Iterator[None]:
    """Data sets come from the cache, and nothing is asked of a hub that does not answer: its libraries would try again
    for more than a minute, a line a try."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def require_harness() -> None:
    """Raises MissingExtraError where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise MissingExtraError(f"evaluation needs lm-eval; {install_line('eval')}") from None
