"""polymerge.json: what a bundle says of itself, and the names of its files.

Knows the format's versions and checks what it reads. Does not know how a bundle is written (`polymerge.bundle.write`)
or read (`polymerge.bundle.bundle`).
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..errors import BundleError
from ..host import DTYPES
from ..method.code import Code
from ..method.codes import PUBLISHED, code_of
from ..naming import check_expert_names, check_paths
from ..recipe.merge import EMBEDDING_RATE, CodeName, Table
from ..recipe.rates import NamedRates, Rates
from ..sources.persona import Group
from .files import FileEntry
from .layer import BundleLayer, Strict, stored_layers, without_expert
from .sealed import sealed, without_seal
from .versioned import read_versioned

FORMAT = "polymerge-bundle"
# Version 1 holds residuals as published; version 2 differs only in that they have a code; version 3 in that experts
# have personas, tensors dtypes, or layers compress rates of their own; version 4 in that tensors are stored with others
# in one, or that experts have other rows or tokens in their tables; version 5 in that residuals have ranks of their
# own, are taken against the model under the experts' adapters, are one for two experts, or are those of embeddings and
# heads, or that experts have processors of their own; version 6 in that of a table a few rows are an expert's, or that
# two experts have a tensor alike; version 7 in that the base is stored in fewer bits, or a residual
# of a bundle with a code as numbers.
FormatVersion = Literal[1, 2, 3, 4, 5, 6, 7]
# How linear layers of the base are stored, where not in the bundle's dtype (`polymerge.sources.packed`).
BaseCode = Literal["int8", "int4"]
MANIFEST = "polymerge.json"
STATS = "merge_stats.jsonl"
# PEFT's name for an adapter's weights. What an expert's file is called in a bundle says its code.
ADAPTER_FILE = "adapter_model.safetensors"
SCALES_FILE = "scales.safetensors"
# Factors that an expert had of another one's, which is gone.
INHERITED_FILE = "inherited.safetensors"


class Method(Strict):
    """How the bundle was merged."""

    compress_rate: Rates
    code: CodeName = PUBLISHED
    scale: Literal["per_expert", "shared"]
    embeddings: Table
    lm_head: Table
    embedding_rate: NamedRates = EMBEDDING_RATE
    norms: Literal["keep", "average"]
    n_oversamples: int
    n_iter: int
    seed: int

    @property
    def compresses_tables(self) -> bool:
        """Whether embeddings or heads may have residuals."""
        return "compress" in (self.embeddings, self.lm_head)


class ExpertRecord(Strict):
    """An expert's source. `sha256` is over its tensors' names and bytes, whatever files they lay in.

    Attributes:
        revision: of a hub id, the commit where it is known.
        base, base_revision: of the model under an adapter.
        persona: groups in which it is not the bundle's: they lie in `experts/<name>/persona/`.
        vocabulary: rows of its tables, the first so many of the bundle's; None where it has them all.
        rows: [start, stop) of rows that do not stand for the bundle's token. Where its file has as many rows of an
            embedding, they are these.
    """

    source: str
    sha256: str
    dtype: str
    revision: str | None = None
    base: str | None = None
    base_revision: str | None = None
    persona: tuple[Group, ...] = ()
    vocabulary: Annotated[int, Field(gt=0)] | None = None
    rows: tuple[tuple[int, int], ...] = ()

    @property
    def own_rows(self) -> list[int]:
        """Their numbers, in order."""
        return [row for start, stop in self.rows for row in range(start, stop)]

    @field_validator("rows")
    @classmethod
    def _rows_are_in_order(cls, rows: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        ends = [-1, *(end for part in rows for end in part)]
        if any(stop <= start for start, stop in pairwise(ends)):
            raise ValueError(f"rows {[list(part) for part in rows]} are no ranges in order")
        return rows


class Manifest(Strict):
    """polymerge.json.

    Attributes:
        tied_embedding: the module of the input embedding that is also the output head; None where they are two.
        vocabulary: as an expert's, of the average.
        base_code: of linear layers of the base; None where they are in the bundle's dtype.
    """

    format: Literal["polymerge-bundle"] = "polymerge-bundle"
    format_version: FormatVersion = 1
    polymerge_version: str
    method: Method
    dtype: str
    base_code: BaseCode | None = None
    architecture: str
    layers_from: Literal["architecture", "shapes"]
    tied_embedding: str | None = None
    vocabulary: Annotated[int, Field(gt=0)] | None = None
    experts: dict[str, ExpertRecord]
    scale_ratio_range: tuple[float, float]
    layers: tuple[BundleLayer, ...]
    files: dict[str, FileEntry]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def code(self) -> Code:
        """How residuals are stored."""
        return code_of(self.method.code, DTYPES[self.dtype])

    def to_json(self) -> str:
        data = self.model_dump(mode="json")
        if self.format_version == 1:
            del data["method"]["code"]  # which readers of version 1 alone do not know
        if not self.method.compresses_tables:  # nor what was added since
            del data["method"]["embedding_rate"]
        for name, record in data["experts"].items():
            data["experts"][name] = {key: value for key, value in record.items() if value not in (None, [])}
        for key in ("vocabulary", "base_code"):
            if data[key] is None:
                del data[key]
        unsaid: dict[str, object] = {
            "dtype": None,
            "slice": None,
            "table": False,
            "base": "average",
            "ranks": {},
            "borrowed": {},
            "rows": {},
            "numbers": [],
        }
        data["layers"] = [{k: v for k, v in layer.items() if unsaid.get(k, ...) != v} for layer in data["layers"]]
        return json.dumps(sealed(data), indent=1, ensure_ascii=False) + "\n"

    def checked(self) -> Manifest:
        """Itself, parsed again: a change must give a manifest that opens. Raises ValidationError otherwise."""
        return Manifest.model_validate(json.loads(self.to_json()))

    def _version(self, experts: Iterable[ExpertRecord], layers: Sequence[BundleLayer]) -> FormatVersion:
        return version_of(self.method, self.code, experts, layers, self.vocabulary, self.base_code)

    def with_expert(
        self,
        name: str,
        record: ExpertRecord,
        *,
        files: Mapping[str, FileEntry],
        ratios: Sequence[float],
        notes: Sequence[str] = (),
        tables: Container[str] = (),
        ranks: Mapping[str, int] = MappingProxyType({}),
        rows: Mapping[str, int] = MappingProxyType({}),
        numbers: Container[str] = (),
    ) -> Manifest:
        """With one more expert: its files, its ratios rho, what a user should hear of, the tensors of which it has
        other rows, the ranks of its residuals that are not the layers', how many rows it keeps of a table, and the
        tensors whose residual it has as numbers."""
        experts = {**self.experts, name: record}

        def having(layer: BundleLayer) -> BundleLayer:
            its = layer.tensor
            update = {
                "table": layer.table or its in tables,
                "ranks": {**layer.ranks, name: ranks[its]} if its in ranks else layer.ranks,
                "rows": {**layer.rows, name: rows[its]} if its in rows else layer.rows,
                "numbers": (*layer.numbers, name) if its in numbers else layer.numbers,
            }
            return layer.model_copy(update=update)

        layers = tuple(map(having, self.layers))
        return self.model_copy(
            update={
                "format_version": self._version(experts.values(), layers),
                "experts": experts,
                "layers": layers,
                "files": dict(sorted({**self.files, **files}.items())),
                "scale_ratio_range": (
                    min([self.scale_ratio_range[0], *ratios]),
                    max([self.scale_ratio_range[1], *ratios]),
                ),
                "notes": (*self.notes, *notes),
            }
        )

    def without_expert(self, name: str, files: Mapping[str, FileEntry] = MappingProxyType({})) -> Manifest:
        """Without an expert and its files, and with files of what others inherit from it."""
        experts = {n: record for n, record in self.experts.items() if n != name}
        other_tables = self.vocabulary or any(record.vocabulary or record.rows for record in experts.values())
        layers = self.layers if other_tables else tuple(x.model_copy(update={"table": False}) for x in self.layers)
        layers = tuple(without_expert(layer, name) for layer in layers)
        return self.model_copy(
            update={
                "format_version": self._version(experts.values(), layers),
                "experts": experts,
                "layers": layers,
                "files": {
                    n: entry
                    for n, entry in sorted({**self.files, **files}.items())
                    if not n.startswith(f"experts/{name}/")
                },
                "notes": tuple(note for note in self.notes if not note.startswith(f"{name}: ")),
            }
        )

    @field_validator("experts")
    @classmethod
    def _experts_are_safe(cls, experts: dict[str, ExpertRecord]) -> dict[str, ExpertRecord]:
        check_expert_names(experts)
        return experts

    @field_validator("versions")
    @classmethod
    def _digest_is_the_files(cls, versions: dict[str, str]) -> dict[str, str]:
        return without_seal(versions)

    @field_validator("files")
    @classmethod
    def _files_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        check_paths(files)
        return files

    @model_validator(mode="after")
    def _version_fits(self) -> Manifest:
        for dtype in {self.dtype, *(layer.dtype for layer in self.layers if layer.dtype)}:
            if dtype not in DTYPES:
                raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        expected = self._version(self.experts.values(), self.layers)
        if self.format_version != expected:
            raise ValueError(
                f"format version {self.format_version} does not fit code {self.method.code!r}, the experts' personas "
                "and vocabularies, the tensors' dtypes and their slices, the layers' rates, ranks and bases, and the "
                "base's code"
            )
        for layer in self.layers:
            lenders = (lent.of for lent in layer.borrowed.values() if lent.of is not None)
            named = (*layer.ranks, *layer.borrowed, *layer.rows, *layer.numbers, *lenders)
            if stranger := next((expert for expert in named if expert not in self.experts), None):
                raise ValueError(f"{layer.tensor!r} has a residual of {stranger!r}, which is no expert")
        return self

    @model_validator(mode="after")
    def _slices_are_whole(self) -> Manifest:
        for name, parts in stored_layers(self.layers).items():
            places = [part.slice for part in parts if part.slice]
            numbers = [place.index for place in places]
            if places and (numbers != list(range(places[0].count)) or len({(p.shape, p.count) for p in places}) > 1):
                raise ValueError(f"the matrices of {name!r} are not all there")
        return self


def version_of(
    method: Method,
    code: Code,
    experts: Iterable[ExpertRecord],
    layers: Sequence[BundleLayer],
    vocabulary: int | None = None,
    base_code: BaseCode | None = None,
) -> FormatVersion:
    """The lowest format version that has all this."""
    experts = list(experts)
    if base_code is not None or any(layer.numbers for layer in layers):
        return 7
    if any(layer.rows or any(map(layer.lends_whole, layer.borrowed)) for layer in layers):
        return 6
    own_ranks = any(layer.ranks or layer.borrowed or layer.base != "average" for layer in layers)
    if method.compresses_tables or own_ranks:
        return 5
    if any("processor" in record.persona for record in experts):
        return 5
    other_tables = vocabulary or any(record.vocabulary or record.rows for record in experts)
    if other_tables or any(layer.slice for layer in layers):
        return 4
    by_layer = not isinstance(method.compress_rate, float)
    if by_layer or any(record.persona for record in experts) or any(layer.dtype for layer in layers):
        return 3
    return code.format_version


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle's folder, checked. Raises BundleError."""
    file = path / MANIFEST
    if path.is_file():
        raise BundleError(f"{path}: is a file, and a bundle is a folder with a {MANIFEST} in it")
    if not path.is_dir():
        raise BundleError(f"{path}: no such folder; make one with `polymerge merge recipe.yaml -o {path}`")
    missing = f"{path}: has no {MANIFEST}, so it is not a bundle; a plain checkpoint is merged first"
    fix = "the manifest was changed by hand or damaged"
    return read_versioned(Manifest, file, error=BundleError, missing=missing, fix=fix)
