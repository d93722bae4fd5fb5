"""The folder that describes an adapter's model: the base's, or a copy of its small files with what the adapter changes.

A changed configuration (ends that are no longer tied, another vocabulary) and a tokenizer that was saved with the
adapter belong to the expert. Knows nothing of weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..host import cache_folder

# What describes a model beside its weights.
KINDS = (".json", ".jinja", ".model", ".txt", ".py")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model")
TEMPLATES = ("chat_template.*", "additional_chat_templates/*.jinja")
PROCESSORS = ("*processor_config.json",)
OWN = (*TOKENIZER, *TEMPLATES, *PROCESSORS, "generation_config.json")


def adapter_folder(adapter: Path, base: Path, config: Mapping[str, Any], *, changed: bool) -> Path:
    """Where the configuration and the tokenizer of the adapter's model lie.

    Args:
        changed: `config` is not the one in the base's folder.
    """
    adapter_files = _matching(adapter, OWN)
    if not adapter_files and not changed:
        return base
    files = _base_files(base, adapter_files) | adapter_files
    text = json.dumps(config, indent=2, sort_keys=True)
    stats = [(name, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for name, file in files.items()]
    key = hashlib.sha256(json.dumps([text, sorted(stats)]).encode()).hexdigest()[:16]
    target = cache_folder() / "adapters" / f"{adapter.resolve().name}-{key}"
    if not (target / "config.json").is_file():
        _copy(files, text, target)
    return target


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return {str(file.relative_to(folder)): file for file in sorted(files)}


def _base_files(base: Path, adapter_files: Mapping[str, Path]) -> dict[str, Path]:
    """The base's small files, without those in whose place the adapter has another form of its own."""
    files = {file.name: file for file in sorted(base.iterdir()) if file.is_file() and file.suffix in KINDS}
    files |= _matching(base, TEMPLATES)
    if any(name.startswith(("tokenizer", "vocab", "spiece")) for name in adapter_files):
        replaced = {*_matching(base, TOKENIZER), *_matching(base, TEMPLATES)}
        files = {name: file for name, file in files.items() if name not in replaced}
    if any(name.endswith("processor_config.json") for name in adapter_files):
        files = {name: file for name, file in files.items() if not name.endswith("processor_config.json")}
    return {name: file for name, file in files.items() if not name.endswith(".index.json") and name != "config.json"}


def _copy(files: Mapping[str, Path], config: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".copy-") as scratch:
        staged = Path(scratch) / "model"
        staged.mkdir()
        for name, file in files.items():
            (staged / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, staged / name)
        (staged / "config.json").write_text(config, encoding="utf-8")
        try:
            staged.rename(target)
        except OSError:  # another process was first, with the same result
            if not (target / "config.json").is_file():
                raise
