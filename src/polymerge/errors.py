"""What can go wrong, as one tree. Every message is one line that names the file or tensor and the fix.

PolymergeError                  a user's mistake or bad input; the command line prints it and exits with 2
├── RecipeError                 the recipe: unknown key, wrong type, duplicate or unsafe expert name
├── DataError                    a data file: missing, not JSONL, a row without what is needed
├── TargetError                 a target that cannot be read, or that no rate and code reaches
├── SourceError                 a checkpoint: missing, truncated, hostile, not finite, other architecture
├── BundleError                 a bundle: missing or changed files, wrong format version
├── DeviceError                 a device or a dtype that this machine lacks
├── ModelError                  a request to a loaded bundle: unknown expert, wrong batch length
├── EngineBusyError             a running engine whose queue is full; the request may come again later
├── EngineDownError             a running engine that restarts or has stopped
├── DeadlineError               an answer that was not whole in time
├── RouterError                 a router: none fitted, one of another bundle, samples or texts that it cannot use
├── OutputExistsError           the output is already there
├── LockedError                 another process is writing to the same output
├── DiskSpaceError              too little room for what would be written
└── MissingExtraError           an optional dependency that is not installed
ErrorBudgetExceeded             the merge is whole, but a tensor's error is over the recipe's `max_error` (exits with 3)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class PolymergeError(Exception):
    """Bad input. `str(error)` is the one line that a user sees."""

    exit_code = 2


class RecipeError(PolymergeError):
    """The recipe cannot be used as it is written."""


class DataError(PolymergeError):
    """A data file is missing, is not of its form, or has a row without what is needed."""


class TargetError(PolymergeError):
    """What a search is to reach cannot be read, or no rate and code reaches it."""


class SourceError(PolymergeError):
    """A source checkpoint cannot be read or does not fit the others."""


class BundleError(PolymergeError):
    """A bundle on disk is incomplete, changed or of another format version."""


class DeviceError(PolymergeError):
    """This machine lacks the device, or the name is no dtype for weights."""


class ModelError(PolymergeError):
    """A loaded bundle was asked for something that it does not hold."""


class EngineBusyError(PolymergeError):
    """The engine's queue is full. The same request may be taken later."""


class EngineDownError(PolymergeError):
    """The engine is restarting or has stopped."""


class DeadlineError(PolymergeError):
    """The answer was not whole within the time that it was given."""


class RouterError(PolymergeError):
    """A router is missing or not this bundle's, or it was given samples or texts that it cannot use."""


class OutputExistsError(PolymergeError):
    """The output exists and `--overwrite` was not given."""


class LockedError(PolymergeError):
    """Another process is writing to the same output."""


class DiskSpaceError(PolymergeError):
    """The file system has too little room."""


class MissingExtraError(PolymergeError):
    """An optional dependency is missing; the message names the extra to install."""


class ErrorBudgetExceeded(PolymergeError):
    """The bundle was written, but some tensors lost more than the recipe's `max_error` allows."""

    exit_code = 3


def install_line(extra: str) -> str:
    """What brings an extra: polymerge is installed from a clone of its repository."""
    return f"pip install -e '.[{extra}]' in your clone of polymerge"


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """What is imported inside belongs to an extra.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{error.name} is not installed; {install_line(extra)}") from None


def on_one_line(text: str) -> str:
    """A user's words as they are, or with what cannot be printed written out."""
    return text if text.isprintable() else repr(text)[1:-1]


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's problems as one line, behind the key that it is about where it is about one."""
    first = error.errors()[0]
    key = on_one_line(".".join(str(part) for part in first["loc"]))
    said = "is missing" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
    return f"{key + ': ' if key else ''}{said}"
