"""Where a bundle's tensors lie and how they are stored, as its manifest says.

Knows the folder's layout. Does not know how it is opened and checked (`polymerge.bundle.bundle`), nor how an expert is
rebuilt (`polymerge.bundle.expert`).
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from torch import Tensor

from ..errors import BundleError, SourceError
from ..host import DTYPES
from ..method.code import Code
from ..method.factors import Factors
from ..sources.checkpoint import Checkpoint
from .base import base_of
from .layer import BundleLayer
from .manifest import SCALES_FILE, Manifest
from .tensors import opened


class BundleFolder:
    """A bundle's folder and its manifest. Reads tensors when asked for and holds none.

    Attributes:
        path: the folder.
        manifest: polymerge.json, checked.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._chosen: tuple[str, ...] | None = None

    @property
    def experts(self) -> list[str]:
        """Names of the experts, in the recipe's order: all, or those that `only` chose."""
        return [name for name in self.manifest.experts if self._chosen is None or name in self._chosen]

    @cached_property
    def layers(self) -> dict[str, BundleLayer]:
        """Checkpoint name -> what the tensor is."""
        return {layer.tensor: layer for layer in self.manifest.layers}

    @cached_property
    def base(self) -> Checkpoint:
        """The average as a checkpoint, matrix by matrix as in the manifest; its index is checked against its folder."""
        try:
            return base_of(self.path, self.manifest.layers)
        except SourceError as error:
            raise BundleError(str(error)) from None

    def expert_folder(self, expert: str) -> Path:
        """The PEFT folder of an expert. Raises BundleError for an unknown name."""
        if not isinstance(expert, str) or expert not in self.manifest.experts:
            known = ", ".join(self.experts)
            raise BundleError(f"{self.path}: no expert {expert!r}; this bundle holds {known}")
        return self.path / "experts" / expert

    @cached_property
    def code(self) -> Code:
        """How residuals are stored."""
        return self.manifest.code

    def code_of(self, expert: str, layer: BundleLayer) -> Code:
        """How an expert's residual in a layer is stored: in the bundle's code, or as numbers."""
        return Factors(DTYPES[self.manifest.dtype]) if expert in layer.numbers else self.code

    def expert_file(self, expert: str) -> Path:
        """The file that holds an expert's tensors."""
        return self.expert_folder(expert) / self.code.file_name

    def base_tensor(self, tensor: str) -> Tensor:
        """One tensor of the base, as stored: of the average, or of the model under the experts' adapters."""
        return self.base.read(tensor)

    def scales(self, expert: str) -> dict[str, float]:
        """Checkpoint name -> rho_i. A tensor that is not listed has rho 1."""
        file = self.expert_folder(expert) / SCALES_FILE
        if not file.exists():
            return {}
        with opened(file) as handle:
            return {key: float(handle.get_tensor(key)) for key in handle.keys()}  # noqa: SIM118

    def vocabulary(self, expert: str | None = None) -> int | None:
        """Rows of an expert's tables, or the average's, where they are fewer than the bundle's."""
        return self.manifest.vocabulary if expert is None else self.manifest.experts[expert].vocabulary
