"""The bundle on disk: open it, read its tensors, rebuild an expert, verify every hash.

Knows the format (docs/format.md). Does not know how a bundle is made (`polymerge.merging.run`) or run
(`polymerge.model`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.rows import read_rows
from ..data.shown import table
from ..errors import BundleError, SourceError
from ..host import DTYPES
from ..method.code import Code
from ..method.dense import dense
from ..method.factors import Factors
from ..recipe.rates import in_words
from ..sources.checkpoint import Checkpoint, open_folder, read_json
from ..sources.fused import SlicedCheckpoint
from ..sources.packed import PackedCheckpoint
from ..sources.persona import Persona, read_persona
from .hub import fetched, hub_id
from .kept import ROW_NUMBERS, numbers_problem
from .lock import come_back
from .manifest import INHERITED_FILE, MANIFEST, SCALES_FILE, STATS, BundleLayer, Manifest, read_manifest
from .peft import adapter_name
from .personas import stored_persona
from .unlisted import check_shadows, leads_outside


@dataclass(frozen=True)
class Sizes:
    """Bytes of a bundle's weights.

    Attributes:
        base: the average.
        experts: expert -> its adapter and scales.
        one_model: one dense model in the bundle's dtype; the base, where that is not stored in fewer bits.
    """

    base: int
    experts: dict[str, int]
    one_model: int

    @property
    def total(self) -> int:
        return self.base + sum(self.experts.values())

    @property
    def separate_models(self) -> int:
        return self.one_model * len(self.experts)

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "experts": self.experts,
            "total": self.total,
            "separate_models": self.separate_models,
            "share_of_one_model": self.total / self.one_model,
        }


class Bundle:
    """An opened bundle. Reads tensors when asked for and holds none.

    Attributes:
        path: the folder.
        manifest: polymerge.json, checked.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._chosen: tuple[str, ...] | None = None
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
        path = fetched(remote) if remote else Path(path).expanduser()
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

    @property
    def experts(self) -> list[str]:
        """Names of the experts, in the recipe's order: all, or those that `only` chose."""
        return [name for name in self.manifest.experts if self._chosen is None or name in self._chosen]

    def only(self, experts: Iterable[str]) -> Bundle:
        """The same bundle with some of its experts, to load no others.

        Raises:
            BundleError: it has no such expert, or its experts are not each for itself: one's factors are another's too,
                or the average is made of them.
        """
        chosen = tuple(experts)
        for name in chosen:
            self.expert_folder(name)
        if any(layer.base != "average" or layer.borrowed for layer in self.manifest.layers):
            raise BundleError(f"{self.path}: its experts share factors, so they are loaded all together")
        made = type(self)(self.path, self.manifest)
        made._chosen = chosen
        return made

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of all files: the key for whatever is derived from this bundle."""
        lines = (f"{name} {entry.sha256}\n" for name, entry in sorted(self.manifest.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

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
        if expert not in self.manifest.experts:
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

    def average_tensor(self, tensor: str) -> Tensor:
        """One tensor of the average: as stored, or float32 where that is the mean of what the experts are now."""
        if self.layers[tensor].base == "average":
            return self.base_tensor(tensor)
        total = torch.zeros(self.layers[tensor].shape)
        for expert in self.manifest.experts:
            total += self.reconstruct(expert, tensor)
        return total / len(self.manifest.experts)

    def adapter(
        self, expert: str, *, coded: Container[str] = (), apart: bool = False, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """All tensors of an expert's adapter, keys without PEFT's prefix. Tables come whole, but for those with
        residuals, beside which are the rows that the expert has of its own; so do those that are another expert's too.

        Coded factors come decoded, as `lora_A.weight` and `lora_B.weight`.

        Args:
            coded: modules whose factors come as they are stored.
            apart: factors that are another expert's too are left out, and inherited ones come as they are stored, for
                whoever counts them as the manifest says.
            dtype: of decoded factors; by default the bundle's. 16 bits round what four bits and a scale say.
        """
        dtype = dtype or DTYPES[self.manifest.dtype]
        with _opened(self.expert_file(expert)) as handle:
            tensors = {adapter_name(key): handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        reader = self.expert_reader(expert)
        for layer in self._kept(expert):
            tensors.pop(f"{layer.module}.{layer.parameter}{ROW_NUMBERS}", None)
            tensors[f"{layer.module}.{layer.parameter}"] = reader.kept(layer)
        tensors |= self._borrowed(expert, apart=apart, dtype=dtype)
        for layer in self._tables:
            key = f"{layer.module}.{layer.parameter}"
            if key in tensors and not layer.rank:
                tensors[key] = self.whole_table(expert, layer, tensors[key])
        if self.code.peft_readable:
            return tensors
        for layer in self._factored:
            if layer.module in coded or (expert in layer.borrowed and layer.rank_of(expert)):
                continue
            factors = self.factors(expert, layer, tensors.get)
            for suffix in self.code_of(expert, layer).suffixes:
                tensors.pop(f"{layer.module}.{suffix}", None)
            if factors:
                b, a = factors
                tensors |= {f"{layer.module}.lora_A.weight": a.to(dtype), f"{layer.module}.lora_B.weight": b.to(dtype)}
        return tensors

    def _borrowed(self, expert: str, *, apart: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        factored = (x for x in self._factored if expert in x.borrowed and x.rank_of(expert))
        layers = [x for x in factored if not (apart and x.borrowed[expert].of is not None)]
        if not layers:
            return {}
        reader, tensors = self.expert_reader(expert), {}
        for layer in layers:
            (b, a), times = reader.lent(layer.tensor)
            tensors[f"{layer.module}.lora_A.weight"] = a.to(dtype)
            tensors[f"{layer.module}.lora_B.weight"] = (b if apart else b * times).to(dtype)
        return tensors

    def whole_table(self, expert: str, layer: BundleLayer, stored: Tensor, others: Tensor | None = None) -> Tensor:
        """An expert's table in the bundle's size: where only its own rows are stored, the others are those that are
        given, or the average's.

        Raises:
            BundleError: they are not as many as the manifest says.
        """
        if not (layer.rank or layer.role == "embedding") or stored.shape[:1] == layer.shape[:1]:
            return stored
        rows = self.manifest.experts[expert].own_rows
        if len(rows) != len(stored) or stored.shape[1:] != layer.shape[1:] or rows[-1] >= layer.shape[0]:
            raise BundleError(
                f"{self.expert_file(expert)}: {layer.module} has {list(stored.shape)}, and the manifest says "
                f"{len(rows)} rows of {list(layer.shape)}; copy the bundle again"
            )
        whole = self.base_tensor(layer.tensor) if others is None else others
        whole[rows] = stored.to(whole.dtype)
        return whole

    @cached_property
    def table_rows(self) -> int | None:
        """Rows of the tables with a row a token; None where there is none."""
        text = self.persona().config.get("text_config")
        rows = {**(text if isinstance(text, Mapping) else {}), **self.persona().config}.get("vocab_size")
        return rows if isinstance(rows, int) else None

    def vocabulary(self, expert: str | None = None) -> int | None:
        """Rows of an expert's tables, or the average's, where they are fewer than the bundle's."""
        return self.manifest.vocabulary if expert is None else self.manifest.experts[expert].vocabulary

    def adapter_shapes(self, expert: str) -> dict[str, tuple[int, ...]]:
        """Shapes of what `adapter` gives, from the file's header alone; of a table of which a few rows are stored,
        theirs."""
        with _opened(self.expert_file(expert)) as handle:
            shapes = {adapter_name(key): tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
        for layer in self._kept(expert):
            shapes.pop(f"{layer.module}.{layer.parameter}{ROW_NUMBERS}", None)
            rows = layer.rows.get(expert, layer.shape[0] if layer.shape else 0)
            shapes[f"{layer.module}.{layer.parameter}"] = (rows, *layer.shape[1:]) if layer.shape else ()
        for layer in (layer for layer in self._factored if expert in layer.borrowed and layer.rank_of(expert)):
            (out_features, in_features), rank = layer.matrix_shape, layer.rank_of(expert)
            shapes[f"{layer.module}.lora_A.weight"] = (rank, in_features)
            shapes[f"{layer.module}.lora_B.weight"] = (out_features, rank)
        if self.code.peft_readable:
            return shapes
        for layer in self._factored:
            stored = [shapes.pop(f"{layer.module}.{suffix}", None) for suffix in self.code_of(expert, layer).suffixes]
            if stored[0]:
                out_features, in_features = layer.matrix_shape
                shapes[f"{layer.module}.lora_A.weight"] = (stored[0][0], in_features)
                shapes[f"{layer.module}.lora_B.weight"] = (out_features, stored[0][0])
        return shapes

    def factors(
        self, expert: str, layer: BundleLayer, get: Callable[[str], Tensor | None]
    ) -> tuple[Tensor, Tensor] | None:
        """B [out, r] and A [r, in] of a residual in float32, decoded; None where the expert has none in this layer.

        Takes the arguments of `coded_factors`, and raises as it does.
        """
        stored = self.coded_factors(expert, layer, get)
        if not stored:
            return None
        try:
            return self.code_of(expert, layer).decode(stored, *layer.matrix_shape)
        except ValueError as error:
            raise BundleError(f"{self.expert_file(expert)}: {layer.module}: {error}; copy the bundle again") from None

    def coded_factors(
        self, expert: str, layer: BundleLayer, get: Callable[[str], Tensor | None]
    ) -> dict[str, Tensor] | None:
        """A residual's tensors as stored, by the code's suffixes; None where the expert has none in this layer.

        Args:
            get: the expert's stored tensor of that key (without PEFT's prefix), or None.

        Raises:
            BundleError: only some of the residual's tensors are there, or one has not the code's shape.
        """
        code = self.code_of(expert, layer)
        stored = {suffix: get(f"{layer.module}.{suffix}") for suffix in code.suffixes}
        whole = {suffix: tensor for suffix, tensor in stored.items() if tensor is not None}
        if not whole:
            return None
        place = f"{self.expert_file(expert)}: {layer.module}"
        if len(whole) < len(stored):
            missing = next(suffix for suffix in stored if suffix not in whole)
            raise BundleError(f"{place}: has {next(iter(whole))} but no {missing}; copy the bundle again")
        try:
            code.check(whole, *layer.matrix_shape)
        except ValueError as error:
            raise BundleError(f"{place}: {error}; copy the bundle again") from None
        return whole

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

    def scales(self, expert: str) -> dict[str, float]:
        """Checkpoint name -> rho_i. A tensor that is not listed has rho 1."""
        file = self.expert_folder(expert) / SCALES_FILE
        if not file.exists():
            return {}
        with _opened(file) as handle:
            return {key: float(handle.get_tensor(key)) for key in handle.keys()}  # noqa: SIM118

    def kept_numbers(self, expert: str) -> dict[str, list[int]]:
        """Module of a table -> numbers of the rows that an expert keeps of it, where these alone are stored.

        Raises:
            BundleError: they do not fit the table.
        """
        reader = self.expert_reader(expert)
        return {x.module: reader.kept_rows(x)[0].tolist() for x in self.manifest.layers if expert in x.rows}

    def _kept(self, expert: str) -> list[BundleLayer]:
        """What is stored of an expert's own in few rows, or in another's file."""
        return [x for x in self.manifest.layers if expert in x.rows or x.lends_whole(expert)]

    @property
    def _tables(self) -> list[BundleLayer]:
        return [layer for layer in self.manifest.layers if layer.table]

    @property
    def _factored(self) -> list[BundleLayer]:
        return [layer for layer in self.manifest.layers if layer.role == "linear" or layer.rank]

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

    def base_hashes(self) -> dict[str, str]:
        """Of the files of the average's weights: bundles with the same ones have the same average."""
        files = self.manifest.files.items()
        return {name: entry.sha256 for name, entry in files if "/" not in name and name.endswith(".safetensors")}

    def sizes(self) -> Sizes:
        """Bytes of the base's and the experts' weight files."""
        files = self.manifest.files
        base = sum(e.bytes for n, e in files.items() if "/" not in n and n.endswith(".safetensors"))
        experts = {
            name: sum(
                e.bytes for n, e in files.items() if n.startswith(f"experts/{name}/") and n.endswith(".safetensors")
            )
            for name in self.experts
        }
        return Sizes(base, experts, self._one_model() if self.manifest.base_code else base)

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


class ExpertReader:
    """Dense tensors of one expert: W_i = rho_i W̄ + B_i A_i, or the expert's own tensor where it has one."""

    def __init__(self, bundle: Bundle, expert: str) -> None:
        self._bundle = bundle
        self._scales = bundle.scales(expert)
        self._expert, self._its = expert, _StoredTensors(bundle.expert_file(expert))
        self._lenders: dict[Path, _StoredTensors] = {}

    def read(self, tensor: str) -> Tensor:
        """float32, in the checkpoint's layout; a table with the rows that are the expert's. Raises BundleError for an
        unknown tensor."""
        layer = self._bundle.layers.get(tensor)
        if layer is None:
            raise BundleError(f"{self._bundle.path}: no tensor {tensor!r} in this bundle")
        return self._whole(layer)[: self.shape(tensor)[0]] if layer.table else self._whole(layer)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Of the expert's tensor."""
        layer = self._bundle.layers[tensor]
        rows = self._bundle.vocabulary(self._expert) if layer.table else None
        return layer.shape if rows is None else (rows, *layer.shape[1:])

    def _whole(self, layer: BundleLayer) -> Tensor:
        tensor = layer.tensor
        elsewhere = self._expert in layer.rows or layer.lends_whole(self._expert)
        whole = self.kept(layer) if elsewhere else self._its.get(f"{layer.module}.{layer.parameter}")
        if whole is not None and layer.rank and layer.role != "linear":
            return self._bundle.whole_table(self._expert, layer, whole, self._rebuilt(layer)).float()
        if whole is not None:
            whole = self._bundle.whole_table(self._expert, layer, whole) if layer.table else whole
            return whole.float() if whole.is_floating_point() else whole
        base = self._bundle.base_tensor(tensor)
        if not base.is_floating_point():
            return base
        base = base.float()
        if layer.parameter == "bias":
            difference = self._its.get(f"{layer.module}.lora_B.bias")
            return base if difference is None else base + difference.float()
        return self._rebuilt(layer) if layer.role == "linear" or layer.rank else base

    def kept(self, layer: BundleLayer) -> Tensor:
        """What the expert keeps of a tensor of which a few rows are stored, or that is another's too: whole, as stored.

        Raises:
            BundleError: it is not where the manifest says, or does not fit the base.
        """
        if self._expert not in layer.rows:
            return self._stored(layer, f"{layer.module}.{layer.parameter}")
        numbers, rows = self.kept_rows(layer)
        whole = self._bundle.base_tensor(layer.tensor)
        whole[numbers.long()] = rows.to(whole.dtype)
        return whole

    def kept_rows(self, layer: BundleLayer) -> tuple[Tensor, Tensor]:
        """Numbers, int32 [n], and values [n, ...] of the rows that the expert keeps of a table. Raises as `kept`."""
        key = f"{layer.module}.{layer.parameter}"
        rows, numbers = self._stored(layer, key), self._stored(layer, key + ROW_NUMBERS)
        problem = numbers_problem(numbers, rows, layer.shape)
        if problem is None and len(numbers) != layer.rows[self._expert]:
            problem = f"has {len(numbers)} rows, and the manifest says {layer.rows[self._expert]}"
        if problem:
            file = self._lender(layer).file
            raise BundleError(f"{file}: {layer.module} {problem}; copy the bundle again")
        return numbers, rows

    def _stored(self, layer: BundleLayer, key: str) -> Tensor:
        source = self._lender(layer)
        tensor = source.get(key)
        if tensor is None:
            raise BundleError(f"{source.file}: has no {key}, which is expert {self._expert!r}'s; copy the bundle again")
        return tensor

    def _lender(self, layer: BundleLayer) -> _StoredTensors:
        """The file in which the expert's share of a tensor lies."""
        lent = layer.borrowed.get(self._expert)
        if lent is None:
            return self._its
        file = (
            self._bundle.expert_folder(self._expert) / INHERITED_FILE
            if lent.of is None
            else self._bundle.expert_file(lent.of)
        )
        if file not in self._lenders:
            self._lenders[file] = _StoredTensors(file)
        return self._lenders[file]

    def _rebuilt(self, layer: BundleLayer) -> Tensor:
        base, tensor = self._bundle.base_tensor(layer.tensor).float(), layer.tensor
        return dense(base, self.ratio(tensor), self.factors(tensor), transposed=layer.transposed)

    def ratio(self, tensor: str) -> float:
        """rho_i of a linear weight; 1 where none is stored."""
        return self._scales.get(tensor, 1.0)

    def dtype(self, tensor: str) -> torch.dtype | None:
        """What a tensor of the expert is in; None for one that is no number."""
        layer = self._bundle.layers[tensor]
        key = self._its.keys.get(f"{layer.module}.{layer.parameter}")
        if key is None:
            return self._bundle.base.tensors[tensor].dtype
        with _opened(self._its.file) as handle:
            stored: torch.dtype = handle.get_slice(key)[:0].dtype if layer.shape else handle.get_tensor(key).dtype
            return stored

    def factors(self, tensor: str) -> tuple[Tensor, Tensor] | None:
        """B [out, r] and A [r, in] of a linear weight, float32, decoded; None where the expert has none."""
        layer = self._bundle.layers[tensor]
        if self._expert not in layer.borrowed or layer.lends_whole(self._expert):
            return self._bundle.factors(self._expert, layer, self._its.get)
        (b, a), times = self.lent(tensor)
        return b * times, a

    def lent(self, tensor: str) -> tuple[tuple[Tensor, Tensor], float]:
        """B and A that the expert has of another's, as they are stored, and what B A counts.

        Raises:
            BundleError: they are not where the manifest says.
        """
        layer = self._bundle.layers[tensor]
        lender = self._lender(layer)
        factors = self._bundle.factors(self._expert, layer, lender.get)
        if factors is None:
            raise BundleError(
                f"{lender.file}: has no factors of {layer.module}, which are expert {self._expert!r}'s too"
            )
        return factors, layer.borrowed[self._expert].times


class _StoredTensors:
    """The tensors of an expert's file, under the model's names."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with _opened(file) as handle:
            self.keys = {adapter_name(key): key for key in handle.keys()}  # noqa: SIM118

    def get(self, key: str) -> Tensor | None:
        stored = self.keys.get(key)
        if stored is None:
            return None
        with _opened(self.file) as handle:
            value: Tensor = handle.get_tensor(stored).clone()
            return value


def base_of(folder: Path, layers: Iterable[BundleLayer]) -> Checkpoint:
    """The average's weights in a bundle's folder, matrix by matrix as in the layers."""
    base, slices = open_folder(folder, label=str(folder)), {x.tensor: x.slice for x in layers if x.slice}
    if base.config.get("quantization_config"):
        base = PackedCheckpoint(base, DTYPES.get(str(base.config.get("dtype")), torch.float32))
    return SlicedCheckpoint(base, slices) if slices else base


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file}: not a whole safetensors file ({error}); copy the bundle again") from None
