"""Opens an expert as it is found: a folder, a hub id, a GGUF file, a package that ships one, or an adapter over its
base.

Knows which kind a source is, how a hub id becomes a folder, and which model lies under an adapter. How each kind is
read is in `checkpoint.py`, `gguf.py` and `adapter.py`, which know nothing of each other.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import SourceError
from ..recipe.merge import Source
from .adapter import ADAPTER_CONFIG, check_adapter, open_adapter
from .checkpoint import Checkpoint, open_folder
from .gguf import open_gguf, open_package

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
    if text.startswith("package:"):
        return open_package(text.removeprefix("package:"), label=text)
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(path, label=text)
    if path.is_file():
        raise SourceError(f"{text}: a file, but not a .gguf; give the folder that holds the checkpoint")
    folder = path if path.is_dir() else _download(text, source.revision)
    if (folder / ADAPTER_CONFIG).exists():
        return open_adapter(folder, label=text, base=_open_base(folder, label=text, base=source.base))
    return open_folder(folder, label=text)


def _open_base(folder: Path, label: str, base: str | None) -> Checkpoint:
    """The model under an adapter: the one that the user names, or else the one that its configuration does."""
    named = base or check_adapter(folder, label).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        raise SourceError(f"{label}: the adapter does not name its base; say `base:` beside `source:` in the recipe")
    if (Path(named).expanduser() / ADAPTER_CONFIG).is_file():
        raise SourceError(f"{label}: its base {named} is an adapter too; a base must be a full model")
    try:
        return open_checkpoint(named)
    except SourceError as error:
        raise SourceError(f"{label}: the adapter's base cannot be opened: {error}") from None


def _download(text: str, revision: str | None) -> Path:
    """The local snapshot of a hub id, downloaded where needed."""
    repo, _, tag = text.partition("@")
    if not HUB_ID.fullmatch(repo):
        raise SourceError(f"{text}: no such folder or file, and not a hub id (org/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    for weights in ("*.safetensors", "*.bin"):
        try:
            folder = Path(
                snapshot_download(repo, revision=revision or tag or None, allow_patterns=[*HUB_FILES, weights])
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SourceError(f"{text}: not a local folder, and the hub could not give it ({reason})") from None
        if any(folder.glob(weights)):
            return folder
    return folder
