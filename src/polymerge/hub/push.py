"""A bundle's files and its model card to the hub, in one commit.

Knows which files are the bundle's, and what to refuse before the first byte is sent. What huggingface_hub has sent
already it does not send again, so a push that was stopped goes on by running it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..bundle.hub import hub_errors
from ..bundle.manifest import MANIFEST
from ..bundle.verify import verify_files
from ..errors import BundleError
from ..sources.hub import hub_answers
from ..sources.opening import HUB_ID
from .card import is_hub_id, model_card
from .licences import licence_of

CARD = "README.md"
# What a repository has of the hub's own, and what of it a push leaves alone.
KEPT = (".gitattributes", CARD)


@dataclass(frozen=True)
class Pushed:
    """What a push has put where. `notes` are what its owner should know, such as paths that the manifest names."""

    repo: str
    url: str
    private: bool
    files: int
    bytes: int
    notes: tuple[str, ...] = ()


def push_bundle(
    bundle: Bundle | str | Path,
    repo: str,
    *,
    public: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
) -> Pushed:
    """Writes a bundle to a repository of the hub, which is made where there is none, and private unless it is said to
    be public. Run again after it was stopped, it sends what is missing.

    Args:
        repo: `org/name`.
        public: of a repository that is made; one that is there stays as it is.
        overwrite: also where the repository holds something else than a bundle.
        say: told what is being done.

    Raises:
        BundleError: before anything is sent: not a whole bundle, no hub id, no token, no hub, or a repository that
            holds something else. Later: the hub refused.
    """
    bundle, tell = Bundle.open(bundle), say or (lambda text: None)
    _check(repo)
    tell(f"checking {bundle.path}")
    result = verify_files(bundle, None)
    if not result.ok:
        raise BundleError(f"{bundle.path}: {result.problems[0]}; nothing was sent")
    files = files_of(bundle)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT)
    there = _what_is_there(api, repo)
    if there and MANIFEST not in there and set(there) - set(KEPT) and not overwrite:
        raise BundleError(f"{repo}: holds something that is no bundle; give another name, or --overwrite")
    licences = {name: licence_of(record) for name, record in bundle.manifest.experts.items()}
    card = model_card(bundle, repo, licences).encode()
    with hub_errors(repo):
        made = api.create_repo(repo, private=not public, exist_ok=True)
        size = sum((bundle.path / name).stat().st_size for name in files)
        tell(f"sending {len(files)} files to {made}")
        added = [CommitOperationAdd(name, bundle.path / name) for name in files]
        stale = set(there) - set(files) - set(KEPT)
        operations: list[Any] = [*added, CommitOperationAdd(CARD, card)]
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        api.create_commit(repo, operations, commit_message=f"polymerge bundle {bundle.digest[:16]}")
        private = bool(api.model_info(repo).private)
    return Pushed(repo, str(made), private, len(files) + 1, size + len(card), _notes(bundle))


def files_of(bundle: Bundle) -> list[str]:
    """Names of what belongs to a bundle: no hidden files, no links, no card of another place."""
    root = bundle.path
    names = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]
    return [
        name.as_posix()
        for name in names
        if not any(part.startswith(".") for part in name.parts) and name.as_posix() != CARD and name.suffix != ".py"
    ]


def _check(repo: str) -> None:
    """Raises BundleError for what no push could succeed with."""
    from huggingface_hub import constants, get_token

    if not HUB_ID.fullmatch(repo):
        raise BundleError(f"{repo}: not a hub id; write org/name")
    if not hub_answers():
        raise BundleError(f"{repo}: {constants.ENDPOINT} cannot be reached, so nothing was sent")
    if get_token() is None:
        raise BundleError(f"{repo}: no token to write with; `hf auth login`, or set HF_TOKEN")


def _what_is_there(api: Any, repo: str) -> list[str]:
    """The files of a repository; none where it is not there yet."""
    with hub_errors(repo):
        if not api.repo_exists(repo):
            return []
        names: list[str] = api.list_repo_files(repo)
        return names


def _notes(bundle: Bundle) -> tuple[str, ...]:
    paths = [r.source for r in bundle.manifest.experts.values() if not is_hub_id(r.source) and "/" in r.source]
    if not paths:
        return ()
    return (f"{MANIFEST} names where the experts lay on this machine, such as {paths[0]}; the card does not",)
