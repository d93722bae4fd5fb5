"""A line of the manifest: one tensor of the base, and what experts have of it.

Checks what it reads. Does not know the manifest around it, nor where tensors lie on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..recipe.merge import BaseKind
from ..sources.slices import Slice


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Borrowed(Strict):
    """Two experts' residuals from their average are one up to a scale: it is stored once.

    Attributes:
        of: the expert in whose file the factors lie; None once that one was removed: they lie in the file
            `inherited.safetensors` of the expert itself.
        times: what its B A is multiplied with.
    """

    of: str | None = None
    times: Annotated[float, Field(allow_inf_nan=False)]


class BundleLayer(Strict):
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


def without_expert(layer: BundleLayer, expert: str) -> BundleLayer:
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
