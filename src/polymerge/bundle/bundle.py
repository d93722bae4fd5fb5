"""A bundle, opened: its files are there and no others would be loaded. What it is, what it weighs, what lies beside
its weights, and its dense tensors.

Knows the format (docs/format.md). Does not know how a bundle is made (`polymerge.merging.run`) or run
(`polymerge.model`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.rows import read_rows
from ..data.shown import table
from ..errors import BundleError
from ..paths import path_of
from ..recipe.rates import in_words
from ..sources.checkpoint import read_json
from ..sources.packed import PackedCheckpoint
from ..sources.persona import Persona, read_persona
from .base import base_of
from .expert import ExpertReader
from .files import FileEntry
from .folder import BundleFolder
from .hub import fetched, hub_id
from .lock import come_back
from .manifest import MANIFEST, STATS, Manifest, read_manifest
from .personas import stored_persona
from .sizes import Sizes
from .unlisted import check_shadows, leads_outside


class Bundle(BundleFolder):
    """An opened bundle. Reads tensors when asked for and holds none."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        super().__init__(path, manifest)
        self._personas: dict[str | None, Persona] = {}

    def __repr__(self) -> str:
        method = self.manifest.method
        kind = f"{self.manifest.architecture}, {method.code} at {in_words(method.compress_rate)}"
        return f"Bundle({str(self.path)!r}: {', '.join(self.experts)}; {kind})"

    def _repr_html_(self) -> str:
        sources = {name: record.source for name, record in self.manifest.experts.items()}
        return table(repr(self), sources)

    @classmethod
    def open(cls, path: str | Path | Bundle) -> Bundle:
        """Opens a bundle's folder, or by its hub id one of the hub, from the hub's cache if it is there.

        Raises:
            BundleError: not a bundle, another format version, a file that the manifest lists is missing, or one that it
                does not list would be loaded.
            LockedError: another process is moving it to its place.
        """
        if isinstance(path, Bundle):
            return path
        remote = hub_id(path)
        path = fetched(remote) if remote else path_of(path, "bundle")
        come_back(path)
        manifest = read_manifest(path)
        check_shadows(path, manifest)
        for name, entry in manifest.files.items():
            file = path / name
            if leads_outside(file, path):
                raise BundleError(f"{path / MANIFEST}: lists {name!r}, outside the bundle's folder; refused")
            if not file.is_file():
                raise BundleError(f"{file}: missing; copy the bundle again or merge again")
            if file.stat().st_size != entry.bytes:
                raise BundleError(
                    f"{file}: has {file.stat().st_size} bytes, the manifest says {entry.bytes}; copy it again"
                )
        return cls(path, manifest)

    def only(self, experts: Iterable[str]) -> Bundle:
        """The same bundle with some of its experts, to load no others.

        Raises:
            BundleError: it has no such expert, or its experts are not each for itself: one's factors are another's too,
                or the average is made of them.
        """
        chosen = tuple(experts)
        for name in chosen:
            self.expert_folder(name)
        if self.shared:
            raise BundleError(f"{self.path}: its experts share factors, so they are loaded all together")
        made = type(self)(self.path, self.manifest)
        made._chosen = chosen
        return made

    @property
    def shared(self) -> bool:
        """Whether one expert's factors are another's too, or the average is made of them: all are loaded, or none."""
        return any(layer.base != "average" or layer.borrowed for layer in self.manifest.layers)

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of all files: the key for whatever is derived from this bundle."""
        lines = (f"{name} {entry.sha256}\n" for name, entry in sorted(self.manifest.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def average_tensor(self, tensor: str) -> Tensor:
        """One tensor of the average: as stored, or float32 where that is the mean of what the experts are now."""
        if self.layers[tensor].base == "average":
            return self.base_tensor(tensor)
        total = torch.zeros(self.layers[tensor].shape)
        for expert in self.manifest.experts:
            total += self.reconstruct(expert, tensor)
        return total / len(self.manifest.experts)

    @cached_property
    def table_rows(self) -> int | None:
        """Rows of the tables with a row a token; None where there is none."""
        text = self.persona().config.get("text_config")
        rows = {**(text if isinstance(text, Mapping) else {}), **self.persona().config}.get("vocab_size")
        return rows if isinstance(rows, int) else None

    def persona(self, expert: str | None = None) -> Persona:
        """What an expert has beside its weights; of None, the average's. Raises BundleError for an unknown name."""
        if expert is not None:
            self.expert_folder(expert)
        if expert not in self._personas:
            if expert is None:
                self._personas[None] = read_persona(self.path, read_json(self.path / "config.json"))
            else:
                groups = self.manifest.experts[expert].persona
                self._personas[expert] = stored_persona(self.path, expert, groups, self.persona())
        return self._personas[expert]

    def stats(self) -> list[dict[str, Any]]:
        """The lines of merge_stats.jsonl."""
        file = self.path / STATS
        if not file.exists():
            return []
        return [line for _, line in read_rows(file) if line["expert"] in self.manifest.experts]

    def packed(self) -> PackedCheckpoint | None:
        """The base as it is stored in fewer bits; None where it is not."""
        stored = base_of(self.path, ())
        return stored if isinstance(stored, PackedCheckpoint) else None

    def _weights(self, folder: str = "") -> dict[str, FileEntry]:
        """The files of weights that lie right in the bundle's folder, or in one inside it."""
        files = self.manifest.files.items()
        return {n: e for n, e in files if n.rpartition("/")[0] == folder and n.endswith(".safetensors")}

    def base_hashes(self) -> dict[str, str]:
        """Of the files of the average's weights: bundles with the same ones have the same average."""
        return {name: entry.sha256 for name, entry in self._weights().items()}

    def sizes(self) -> Sizes:
        """Bytes of the base's and the experts' weight files."""
        base, experts = self._bytes_of(""), {name: self._bytes_of(f"experts/{name}") for name in self.experts}
        return Sizes(base, experts, self._one_model() if self.manifest.base_code else base)

    def _bytes_of(self, folder: str) -> int:
        return sum(entry.bytes for entry in self._weights(folder).values())

    def _one_model(self) -> int:
        infos = self.base.tensors.values()
        return sum(info.numel * (info.dtype.itemsize if info.dtype else 1) for info in infos)

    def expert_reader(self, expert: str) -> ExpertReader:
        """Rebuilds an expert's dense tensors one at a time."""
        return ExpertReader(self, expert)

    def reconstruct(self, expert: str, tensor: str) -> Tensor:
        """One dense tensor of an expert, float32, in the checkpoint's layout."""
        return self.expert_reader(expert).read(tensor)

    def damaged_files(self) -> Iterator[tuple[str, str]]:
        """(file, what is wrong) for every file whose content is not the manifest's. Reads the whole bundle."""
        for name, entry in self.manifest.files.items():
            with (self.path / name).open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
            if digest != entry.sha256:
                yield name, "its SHA-256 is not the manifest's; the file was changed or damaged"
