"""Where one expert's weights come from, as a YAML file or a dict says it.

Does not know checkpoints: whether a source exists is found out by `polymerge.sources.checkpoint`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..paths import expanded, here


class Source(BaseModel):
    """Where one expert's weights come from.

    `source` is a folder, a GGUF file, a hub id (`org/name` or `org/name@revision`) or `package:NAME` for a
    Python package that ships a GGUF file. `base` is the model under a PEFT adapter; by default the one that
    the adapter's own configuration names.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    base: str | None = None

    @model_validator(mode="after")
    def _one_revision(self) -> Self:
        repo, _, revision = self.source.partition("@")
        if self.revision and revision and not self.source.startswith((".", "/", "~")):
            raise ValueError(f"names the revision twice, {revision!r} and {self.revision!r}; say `source: {repo}`")
        return self


def source_of_text(value: Any) -> Any:
    """A text or a path as the mapping that it stands for; anything else as it is."""
    if isinstance(value, Path):
        value = str(value) if value.is_absolute() else f"./{value}"  # never to be taken for a hub id
    return {"source": value} if isinstance(value, str) else value


# A source as a recipe writes it: one text, or a mapping of Source's keys.
WrittenSource = Annotated[Source, BeforeValidator(source_of_text)]


def anchored(source: Source, folder: Path) -> Source:
    """A source whose relative paths are taken from a folder; hub ids and packages stay as they are."""
    return source.model_copy(
        update={"source": source_from(source.source, folder), "base": source_from(source.base, folder)}
    )


def source_from(text: str | None, folder: Path) -> str | None:
    """The text of a source, a relative path in it taken from a folder."""
    if text is None or text.startswith("package:"):
        return text
    candidate = folder / expanded(text)
    looks_local = text.startswith((".", "/", "~")) or here(candidate)
    if not looks_local:
        return text
    return str(candidate) if candidate.is_absolute() else f"./{candidate}"  # never to be taken for a hub id


def path_from(text: str | None, folder: Path) -> str | None:
    """A path that can only be local, taken from a folder."""
    return None if text is None else str(folder / expanded(text))
