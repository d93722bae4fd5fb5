"""polymerge.json: what a bundle says of itself, and the names of its files.

Knows the format's versions and checks what it reads. Does not know how a bundle is written (`polymerge.bundle.write`)
or read (`polymerge.bundle.bundle`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import BundleError
from ..host import DTYPES
from ..method.code import Code
from ..method.codes import PUBLISHED, code_of
from ..naming import check_expert_names, check_paths
from ..recipe.merge import CodeName
from ..recipe.rates import Rates
from ..sources.persona import Group
from .files import FileEntry

FORMAT = "polymerge-bundle"
# Version 1 holds residuals as published; version 2 differs only in that they have a code; version 3 in that experts
# have personas, tensors dtypes, or layers compress rates of their own.
FORMAT_VERSIONS = (1, 2, 3)
MANIFEST = "polymerge.json"
STATS = "merge_stats.jsonl"
# PEFT's name for an adapter's weights. What an expert's file is called in a bundle says its code.
ADAPTER_FILE = "adapter_model.safetensors"
SCALES_FILE = "scales.safetensors"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(_Strict):
    """How the bundle was merged."""

    compress_rate: Rates
    code: CodeName = PUBLISHED
    scale: Literal["per_expert", "shared"]
    embeddings: Literal["keep", "average"]
    lm_head: Literal["keep", "average"]
    norms: Literal["keep", "average"]
    n_oversamples: int
    n_iter: int
    seed: int


class ExpertRecord(_Strict):
    """An expert's source. `sha256` is over its tensors' names and bytes, whatever files they lay in.

    Attributes:
        revision: of a hub id, the commit where it is known.
        base, base_revision: of the model under an adapter.
        persona: groups in which it is not the bundle's: they lie in `experts/<name>/persona/`.
    """

    source: str
    sha256: str
    dtype: str
    revision: str | None = None
    base: str | None = None
    base_revision: str | None = None
    persona: tuple[Group, ...] = ()


class BundleLayer(_Strict):
    """One tensor of the base; the names are those of `polymerge.sources.layers.LayerRecord`.

    Attributes:
        shape: as stored.
        rank: of the residuals; 0 for a tensor that has none.
        mean_scale: s̄, the mean Frobenius norm of the experts' tensors, for linear weights.
        dtype: of its own; None where it is the bundle's.
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

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of a linear weight."""
        rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @model_validator(mode="after")
    def _linear_is_a_matrix(self) -> BundleLayer:
        if self.role == "linear" and (len(self.shape) != 2 or self.mean_scale is None):
            raise ValueError(f"{self.tensor!r} is no matrix with a scale, as a linear weight is")
        return self


class Manifest(_Strict):
    """polymerge.json.

    Attributes:
        tied_embedding: the module of the input embedding that is also the output head; None where they are two.
    """

    format: Literal["polymerge-bundle"] = "polymerge-bundle"
    format_version: Literal[1, 2, 3] = 1
    polymerge_version: str
    method: Method
    dtype: str
    architecture: str
    layers_from: Literal["architecture", "shapes"]
    tied_embedding: str | None = None
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
        for name, record in data["experts"].items():  # nor what was added since
            data["experts"][name] = {key: value for key, value in record.items() if value not in (None, [])}
        for layer in (layer for layer in data["layers"] if layer["dtype"] is None):
            del layer["dtype"]
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    def with_expert(
        self,
        name: str,
        record: ExpertRecord,
        *,
        files: Mapping[str, FileEntry],
        ratios: Sequence[float],
        notes: Sequence[str] = (),
    ) -> Manifest:
        """With one more expert: its files, its ratios rho, and what a user should hear of."""
        experts = {**self.experts, name: record}
        return self.model_copy(
            update={
                "format_version": version_of(self.method, self.code, experts.values(), self.layers),
                "experts": experts,
                "files": dict(sorted({**self.files, **files}.items())),
                "scale_ratio_range": (
                    min([self.scale_ratio_range[0], *ratios]),
                    max([self.scale_ratio_range[1], *ratios]),
                ),
                "notes": (*self.notes, *notes),
            }
        )

    def without_expert(self, name: str) -> Manifest:
        """Without an expert and its files."""
        experts = {n: record for n, record in self.experts.items() if n != name}
        return self.model_copy(
            update={
                "format_version": version_of(self.method, self.code, experts.values(), self.layers),
                "experts": experts,
                "files": {n: entry for n, entry in self.files.items() if not n.startswith(f"experts/{name}/")},
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
        if self.format_version != version_of(self.method, self.code, self.experts.values(), self.layers):
            raise ValueError(
                f"format version {self.format_version} does not fit code {self.method.code!r}, "
                "the experts' personas, the tensors' dtypes and the layers' rates"
            )
        return self


def version_of(
    method: Method, code: Code, experts: Iterable[ExpertRecord], layers: Iterable[BundleLayer]
) -> Literal[1, 2, 3]:
    """The lowest format version that has all this."""
    if (
        not isinstance(method.compress_rate, float)
        or any(record.persona for record in experts)
        or any(layer.dtype for layer in layers)
    ):
        return 3
    return code.format_version


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle's folder, checked. Raises BundleError."""
    file = path / MANIFEST
    if not path.is_dir():
        raise BundleError(f"{path}: no such folder; make one with `polymerge merge recipe.yaml -o {path}`")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{path}: has no {MANIFEST}, so it is not a bundle; a plain checkpoint is merged first"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file}: cannot be read: {error}") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if version not in FORMAT_VERSIONS:
        known = f"{', '.join(map(str, FORMAT_VERSIONS[:-1]))} and {FORMAT_VERSIONS[-1]}"
        raise BundleError(f"{file}: format version {version!r}; this polymerge reads versions {known}")
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise BundleError(f"{file}: {where}: {reason}; the manifest was changed by hand or damaged") from None
