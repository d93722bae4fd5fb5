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

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import BundleError
from ..host import DTYPES
from ..method.code import Code
from ..method.codes import PUBLISHED, code_of
from ..naming import check_expert_names, check_paths
from ..recipe.merge import EMBEDDING_RATE, BaseKind, CodeName, Table
from ..recipe.rates import NamedRates, Rates
from ..sources.persona import Group
from ..sources.slices import Slice
from .files import FileEntry
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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(_Strict):
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


class ExpertRecord(_Strict):
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


class Borrowed(_Strict):
    """Two experts' residuals from their average are one up to a scale: it is stored once.

    Attributes:
        of: the expert in whose file the factors lie; None once that one was removed: they lie in the file
            `inherited.safetensors` of the expert itself.
        times: what its B A is multiplied with.
    """

    of: str | None = None
    times: Annotated[float, Field(allow_inf_nan=False)]


class BundleLayer(_Strict):
    """One tensor of the base; the names are those of `polymerge.sources.layers.LayerRecord`.

    Attributes:
        shape: as stored.
        rank: of the residuals, as the compress rate has it; 0 for a tensor that has none.
        ranks: expert -> rank of its residual, where that is another.
        rows: expert -> how many rows it keeps of a table, where these alone are stored.
        numbers: experts whose residual is stored as numbers, which are nearer than the code's at its bytes.
        base: what the stored tensor is, of a linear weight: the experts' average, or the model under their adapters.
        borrowed: expert -> whose factors are its own too; without residuals, whose own tensor.
        mean_scale: s̄, the mean Frobenius norm of the experts' tensors, for what is stored against the base; None for
            tables in which experts have other rows, whose experts all have the ratio 1.
        dtype: of its own; None where it is the bundle's.
        slice: where it lies, of a matrix that the base stores in one tensor with others.
        table: has a row a token, and experts have other rows or tokens.
    """

    tensor: str
    module: str
    parameter: str
    role: Literal["linear", "embedding", "lm_head", "norm", "bias", "other"]
    transposed: bool
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    rank: Annotated[int, Field(ge=0)]
    mean_scale: float | None = None
    dtype: str | None = None
    slice: Slice | None = None
    table: bool = False
    base: BaseKind = "average"
    ranks: dict[str, Annotated[int, Field(ge=0)]] = {}
    borrowed: dict[str, Borrowed] = {}
    rows: dict[str, Annotated[int, Field(gt=0)]] = {}
    numbers: tuple[str, ...] = ()

    def lends_whole(self, expert: str) -> bool:
        """Whether the expert's own tensor is another's too."""
        return expert in self.borrowed and not self.rank_of(expert)

    def rank_of(self, expert: str) -> int:
        """Of an expert's residual, where it has one."""
        return self.ranks.get(expert, self.rank)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of a linear weight."""
        rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @model_validator(mode="after")
    def _linear_is_a_matrix(self) -> BundleLayer:
        if self.role == "linear" and (len(self.shape) != 2 or self.mean_scale is None):
            raise ValueError(f"{self.tensor!r} is no matrix with a scale, as a linear weight is")
        if self.rank and (len(self.shape) != 2 or self.role not in ("linear", "embedding", "lm_head")):
            raise ValueError(f"{self.tensor!r} is no matrix, but has residuals")
        if self.role != "linear" and (self.base != "average" or (not self.rank and self.ranks)):
            raise ValueError(f"{self.tensor!r} is no linear weight, and has no residuals")
        if self.borrowed and self.role not in ("linear", "embedding", "lm_head"):
            raise ValueError(f"{self.tensor!r} is no matrix that two experts may have in common")
        if self.rows and (self.role != "embedding" or self.rank or max(self.rows.values()) >= self.shape[0]):
            raise ValueError(f"{self.tensor!r} is no table of which experts keep a few rows")
        if any(lent.times != 1 for name, lent in self.borrowed.items() if self.lends_whole(name)):
            raise ValueError(f"{self.tensor!r} is another's own with a factor")
        if any(lent.of in self.borrowed for lent in self.borrowed.values()):
            raise ValueError(f"{self.tensor!r} has factors of an expert that has another's itself")
        if self.slice and not _lies_in(self, self.slice):
            raise ValueError(f"{self.tensor!r} is no matrix of {self.slice.tensor!r}")
        return self


def _lies_in(layer: BundleLayer, place: Slice) -> bool:
    whole = place.shape
    fits = len(whole) in (2, 3) and 0 <= place.index < place.count and not (whole[0] % place.count)
    return fits and place.matrix_shape == layer.shape and place.name == layer.tensor and layer.role == "linear"


class Manifest(_Strict):
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
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

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
        layers = tuple(_without(layer, name) for layer in layers)
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
            }
        )

    @field_validator("experts")
    @classmethod
    def _experts_are_safe(cls, experts: dict[str, ExpertRecord]) -> dict[str, ExpertRecord]:
        check_expert_names(experts)
        return experts

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


def _without(layer: BundleLayer, expert: str) -> BundleLayer:
    """What a line says of the other experts. Who had this one's factors inherits them."""
    ranks = {name: rank for name, rank in layer.ranks.items() if name != expert}
    rows = {name: count for name, count in layer.rows.items() if name != expert}
    borrowed = {
        name: Borrowed(times=lent.times) if lent.of == expert else lent
        for name, lent in layer.borrowed.items()
        if name != expert
    }
    numbers = tuple(name for name in layer.numbers if name != expert)
    return layer.model_copy(update={"ranks": ranks, "rows": rows, "numbers": numbers, "borrowed": borrowed})


def stored_layers(layers: Iterable[BundleLayer]) -> dict[str, list[BundleLayer]]:
    """The tensors of the base as they are stored -> what each holds: itself, or matrices in their order."""
    stored: dict[str, list[BundleLayer]] = {}
    for layer in layers:
        stored.setdefault(layer.slice.tensor if layer.slice else layer.tensor, []).append(layer)
    return stored


def stored_shape(layers: Sequence[BundleLayer]) -> tuple[int, ...]:
    """Of a stored tensor, from what it holds."""
    first = layers[0]
    return first.slice.shape if first.slice else first.shape


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
    if not path.is_dir():
        raise BundleError(f"{path}: no such folder; make one with `polymerge merge recipe.yaml -o {path}`")
    missing = f"{path}: has no {MANIFEST}, so it is not a bundle; a plain checkpoint is merged first"
    fix = "the manifest was changed by hand or damaged"
    return read_versioned(Manifest, file, error=BundleError, missing=missing, fix=fix)
