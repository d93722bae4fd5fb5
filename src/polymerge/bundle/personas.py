"""Where a bundle keeps what an expert has beside its weights: `experts/<name>/persona/`, whole groups of files.

The bundle's own persona lies in its folder, the first expert's. An expert that differs has the groups in which it does,
each whole (`ExpertRecord.persona` says which); transformers opens the folder of one that has its own tokenizer. Knows
files; which groups differ is `polymerge.sources.persona`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import BundleError, PolymergeError
from ..sources.checkpoint import read_json
from ..sources.persona import (
    DEFAULT,
    GENERATION,
    MORE_TEMPLATES,
    TEMPLATE,
    Group,
    Persona,
    Templates,
    read_persona,
)
from .files import FileEntry, write_bytes, write_json

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


def home_of(expert: str) -> str:
    """The folder of an expert's persona, from the bundle's."""
    return f"experts/{expert}/persona"


def write_persona(
    folder: Path, expert: str, persona: Persona, groups: Sequence[Group], config: Mapping[str, Any], *, code: bool
) -> dict[str, FileEntry]:
    """The groups of an expert's persona. Returns paths relative to `folder`.

    Args:
        config: its config.json, as the bundle would write it.
        code: Python files beside its tokenizer come along.
    """
    home = folder / home_of(expert)
    written = write_files(home, persona, groups, code=code)
    if set(groups) - {"template"}:
        written[CONFIG] = write_json(home / CONFIG, config)
    return {f"{home_of(expert)}/{name}": entry for name, entry in written.items()}


def write_files(home: Path, persona: Persona, groups: Sequence[Group], *, code: bool = False) -> dict[str, FileEntry]:
    """The files of these groups but config.json, by their names in `home`."""
    written = {}
    if "tokenizer" in groups:
        scripts = [file.name for file in sorted(persona.folder.glob("*.py"))] if code else []
        for name in (*persona.files, *scripts):
            written[name] = write_bytes(home / name, _tokenizer_file(persona.folder / name))
    if "tokenizer" in groups or "template" in groups:
        written |= write_templates(home, persona.templates)
    if "generation" in groups:
        written[GENERATION] = write_json(home / GENERATION, dict(persona.generation))
    if "processor" in groups:
        written |= {name: write_json(home / name, data) for name, data in persona.processors.items()}
    return written


def write_model_files(path: Path, folder: Path, persona: Persona, config: Mapping[str, Any]) -> dict[str, FileEntry]:
    """All that describes an expert's dense model but its weights; Python files are the bundle's.

    Args:
        path: the bundle's folder.
    """
    written = {CONFIG: write_json(folder / CONFIG, config)}
    groups: list[Group] = ["tokenizer", "template", "processor", *(["generation"] if persona.generation else [])]  # type: ignore[list-item]
    written |= write_files(folder, persona, groups, code=persona.folder != path)
    for file in sorted(path.glob("*.py")):
        written.setdefault(file.name, write_bytes(folder / file.name, file.read_bytes()))
    return written


def write_templates(home: Path, templates: Templates) -> dict[str, FileEntry]:
    """Chat templates as the files that transformers looks for first."""
    names = {name: TEMPLATE if name == DEFAULT else f"{MORE_TEMPLATES}/{name}.jinja" for name in templates}
    return {file: write_bytes(home / file, templates[name].encode()) for name, file in names.items()}


def stored_persona(path: Path, expert: str, groups: Sequence[Group], base: Persona) -> Persona:
    """An expert's persona: its own groups, and the bundle's in the place of the others. Raises BundleError."""
    if not groups:
        return base
    home = path / home_of(expert)
    try:
        config = read_json(home / CONFIG) if (home / CONFIG).is_file() else base.config
        kept = read_persona(home, config)
    except PolymergeError as error:
        raise BundleError(f"{error}; copy the bundle again") from None
    persona = replace(base, config=config, config_folder=home) if config is not base.config else base
    if "tokenizer" in groups:
        persona = replace(persona, folder=home, files=kept.files)
    if "tokenizer" in groups or "template" in groups:
        persona = replace(persona, templates=kept.templates)
    if "processor" in groups:
        persona = replace(persona, processors=kept.processors)
    return replace(persona, generation=kept.generation) if "generation" in groups else persona


def persona_problems(path: Path, expert: str, groups: Sequence[Group], files: Sequence[str]) -> Iterator[str]:
    """Where the files of a persona are not those of its groups.

    Args:
        files: all that the manifest lists.
    """
    home, label = home_of(expert), f"expert {expert!r}: persona"
    stored = {name.removeprefix(f"{home}/") for name in files if name.startswith(f"{home}/")}
    if stored and not groups:
        yield f"{label}: has files, but the manifest says that it does not differ from the bundle's"
        return
    wanted = {"generation": GENERATION, "positions": CONFIG, "tokenizer": CONFIG}
    for group in groups:
        if group in wanted and wanted[group] not in stored:
            yield f"{label}: its own {group} without {wanted[group]}"
    try:
        kept = read_persona(path / home, {})
    except PolymergeError as error:
        yield f"{label}: {error}"
        return
    for group, there in (("tokenizer", kept.files), ("processor", kept.processors)):
        if (group in groups) != bool(there):
            yield f"{label}: {'no' if group in groups else 'unlisted'} {group} files"


def _tokenizer_file(file: Path) -> bytes:
    """As it is, but without chat templates, which are files of their own."""
    data = file.read_bytes()
    if file.name != TOKENIZER_CONFIG:
        return data
    settings = read_json(file)
    if "chat_template" not in settings:
        return data
    del settings["chat_template"]
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
