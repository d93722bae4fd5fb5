"""Opens an expert as it is found: a folder, a hub id, a GGUF file, a package that ships one, or an adapter over its
base.

Knows which kind a source is, how a hub id becomes a folder, and which model lies under an adapter. How each kind is
read is in `checkpoint.py`, `gguf.py`, `quantised.py` and `adapter.py`, which know nothing of each other.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ..errors import SourceError
from ..paths import here
from ..recipe.source import Source
from .adapter import open_adapter
from .adapter_config import ADAPTER_CONFIG, check_adapter
from .checkpoint import Checkpoint, Origin, open_folder
from .gguf import open_gguf, open_package
from .hub import download_begins, hub_answers
from .memory import PREFIX
from .names import by_architecture
from .quantised import dequantised

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What a hub download needs: weights, configuration, tokenizer and chat templates; never code.
HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*"]


def open_checkpoint(source: Source | str | Path) -> Checkpoint:
    """Finds and checks a checkpoint without reading its tensors.

    Raises:
        SourceError: not found, incomplete, corrupt or unsafe; one line that names the file and the fix.
    """
    if not isinstance(source, Source):
        source = Source(source=str(source))
    text = source.source
    path = here(text)
    if text.startswith(PREFIX):
        raise SourceError(f"{text}: was a model in memory when it was merged; give a folder that holds it")
    if text.startswith("package:"):
        checkpoint = open_package(text.removeprefix("package:"), label=text)
    elif path and path.is_file() and path.suffix == ".gguf":
        checkpoint = open_gguf(path, label=text)
    elif path and path.is_file():
        raise SourceError(f"{text}: a file, but not a .gguf; give the folder that holds the checkpoint")
    else:
        return _open_folder(path if path and path.is_dir() else None, source)
    checkpoint.origin = Origin(text)
    return checkpoint


def open_source(source: Source) -> Checkpoint:
    """As `open_checkpoint`, of what a user says.

    Raises:
        SourceError: as there; or a revision or a base that the source has no use for.
    """
    checkpoint = open_checkpoint(source)
    if source.revision and checkpoint.whence.revision is None:
        raise SourceError(f"{source.source}: is on this machine and has no revision {source.revision!r}; leave it out")
    if source.base and checkpoint.whence.base is None:
        raise SourceError(f"{source.source}: is no adapter and has no base {source.base!r}; leave it out")
    return checkpoint


def opened_again(origin: Origin) -> Checkpoint:
    """What came from there, as it was: a hub id at the same commit, an adapter over the same base."""
    base = origin.base
    if base and origin.base_revision:
        base = _at(base, origin.base_revision)
    source = _at(origin.source, origin.revision) if origin.revision else origin.source
    checkpoint = open_checkpoint(Source(source=source, base=base))
    checkpoint.origin = replace(checkpoint.whence, source=origin.source)
    return checkpoint


def _at(repo: str, revision: str) -> str:
    """A hub id at this revision, whatever it was named at."""
    return f"{repo.partition('@')[0]}@{revision}"


def _open_folder(local: Path | None, source: Source) -> Checkpoint:
    """A folder on disk, or else of the hub."""
    text = source.source
    folder = local or _download(text, source.revision)
    revision = None if local else _commit(folder) or source.revision
    if (folder / ADAPTER_CONFIG).exists():
        base = _open_base(folder, label=text, base=source.base)
        checkpoint: Checkpoint = open_adapter(folder, text, base)
        checkpoint.origin = Origin(text, revision, base.whence.source, base.whence.revision)
        return checkpoint
    checkpoint = by_architecture(dequantised(open_folder(folder, label=text)))
    checkpoint.origin = Origin(text, revision)
    return checkpoint


def _open_base(folder: Path, label: str, base: str | None) -> Checkpoint:
    """The model under an adapter: the one that the user names, or else the one that its configuration does, at the
    revision that it was trained on."""
    settings = check_adapter(folder, label)
    trained_on, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    named = base or trained_on
    if not named or not isinstance(named, str):
        raise SourceError(f"{label}: the adapter does not name its base; say `base:` beside `source:` in the recipe")
    if revision is not None and not isinstance(revision, str):
        raise SourceError(f"{folder / ADAPTER_CONFIG}: revision must be a text, found {revision!r}")
    if here(Path(named) / ADAPTER_CONFIG):
        raise SourceError(f"{label}: its base {named} is an adapter too; a base must be a full model")
    try:
        return open_checkpoint(Source(source=named, revision=revision if _is_open(named, trained_on) else None))
    except SourceError as error:
        raise SourceError(f"{label}: the adapter's base cannot be opened: {error}") from None


def _is_open(named: str, trained_on: object) -> bool:
    """Whether the revision is not said yet, of the very base that the adapter names."""
    return named == trained_on and "@" not in named


def _commit(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache."""
    return folder.name if folder.parent.name == "snapshots" else None


def _download(text: str, revision: str | None) -> Path:
    """The local snapshot of a hub id, downloaded where needed."""
    repo, _, tag = text.partition("@")
    if not HUB_ID.fullmatch(repo):
        raise SourceError(f"{text}: no such folder or file, and not a hub id (org/name)")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cached = not hub_answers()
    if not cached:
        download_begins()
    for weights in ("*.safetensors", "*.bin"):
        patterns = [*HUB_FILES, weights]
        try:
            folder = Path(
                snapshot_download(
                    repo, revision=revision or tag or None, allow_patterns=patterns, local_files_only=cached
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            if cached and isinstance(error, LocalEntryNotFoundError):
                reason = f"it is not in the cache, and {constants.ENDPOINT} cannot be reached"
            raise SourceError(f"{text}: not a local folder, and the hub could not give it ({reason})") from None
        if any(folder.glob(weights)):
            return folder
    return folder
