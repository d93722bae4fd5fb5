"""Which tensors of a checkpoint are the weights of linear layers, read off the architecture itself.

The model is built by transformers on the meta device (no memory, no weights), its modules say what every parameter is,
and transformers' own conversion rules say under which names a checkpoint stores them. There is no list of
architectures here. What the installed transformers does not know is judged by names and shapes, and says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import SourceError
from .checkpoint import Checkpoint, architecture_of
from .classes import opener_of, out_of_scope
from .forms import forms_of, rows_of, stored_as
from .slices import Fused, Slice, fused_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Role = Literal["linear", "embedding", "lm_head", "norm", "bias", "other"]

# A share of the model's numbers that is told when it is kept whole though it has the size of matrices.
NOTED = 0.01
ROWS = 4096  # of two tensors that are read at a time to be compared

_EMBEDDING_NAME = re.compile(r"embed|\bwte\b|\bwpe\b|word_emb")
_HEAD_NAME = re.compile(r"lm_head|embed_out|output_layer")
_NORM_NAME = re.compile(r"norm|\bln_|\.ln\b|layernorm", re.IGNORECASE)


@dataclass(frozen=True)
class LayerRecord:
    """What one tensor of a checkpoint is.

    Attributes:
        tensor: its name in the checkpoint.
        module: the module in the transformers model that owns it. For a piece of a parameter, or several in one, which
            have no module of their own, the checkpoint's name without `.weight`.
        parameter: the parameter's name inside the module ("weight", "bias", ...).
        role: "linear" tensors are compressed, all others are kept.
        transposed: the matrix is stored [in, out] (GPT-2's Conv1D).
        known: False where the model has no such parameter, or one of whole numbers, a table; it is copied, and never
            differs between experts.
        float32: the architecture computes with it in float32, whatever the rest of the model is in.
        slice: where it lies, for a matrix that is stored in one tensor with others (`polymerge.sources.fused`).
    """

    tensor: str
    module: str
    parameter: str
    role: Role
    transposed: bool = False
    known: bool = True
    float32: bool = False
    slice: Slice | None = None


@dataclass(frozen=True)
class LayerMap:
    """The records of a checkpoint's tensors, and how they were found.

    Attributes:
        layers_from: "architecture" (transformers knows the model) or "shapes".
        tied: the checkpoint's output head is its input embedding.
        fused: the tensors that hold a matrix for each block expert of a mixture.
        notes: what a user should hear of.
    """

    records: dict[str, LayerRecord]
    layers_from: Literal["architecture", "shapes"]
    tied: bool
    embedding: str | None = None
    lm_head: str | None = None
    fused: Mapping[str, Fused] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def map_layers(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> LayerMap:
    """The role of every tensor of `checkpoint`.

    Raises:
        SourceError: the checkpoint misses parameters of its own architecture, or it is of a kind that no bundle holds.
    """
    other = out_of_scope(checkpoint.config)
    if other:
        kind = checkpoint.config.get("model_type")
        raise SourceError(
            f"{checkpoint.label}: {_class_of(checkpoint)} ({kind}) is {other}; a bundle holds models that go on with a "
            "text, one token after another"
        )
    try:
        model = _built(checkpoint.folder, trust_remote_code)
    except Exception as error:
        _refuse_known(checkpoint, error)
        log.info("transformers cannot build %s (%s)", checkpoint.folder, error)
        return _map_by_shapes(checkpoint)
    return _map_by_architecture(checkpoint, model)


def meta_model(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel | None:
    """The folder's architecture on the meta device; None where the installed transformers cannot build it."""
    try:
        return _built(folder, trust_remote_code)
    except Exception as error:  # unknown model type, remote code without consent, a config that fits no class
        log.info("transformers cannot build %s (%s)", folder, str(error).splitlines()[0] if str(error) else error)
        return None


def _built(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = opener_of(config).from_config(config, trust_remote_code=trust_remote_code)
        return model


def _refuse_known(checkpoint: Checkpoint, error: Exception) -> None:
    """A language model that transformers knows, and cannot build, is none that can be run."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if checkpoint.config.get("model_type") in CONFIG_MAPPING_NAMES:
        reason, name = " ".join(str(error).split())[:200], _class_of(checkpoint)
        raise SourceError(f"{checkpoint.label}: transformers cannot build {name} from its config.json ({reason})")


def _refuse_other_class(checkpoint: Checkpoint, model: PreTrainedModel, unknown: Sequence[str]) -> None:
    """A checkpoint of a class that has more than the language model has."""
    import transformers

    name, built = _class_of(checkpoint), type(model).__name__
    if unknown and name != built and name.startswith(built.partition("For")[0]) and hasattr(transformers, name):
        raise SourceError(
            f"{checkpoint.label}: is a {name}; a bundle holds causal language models alone, and {built} has no place "
            f"for {unknown[0]!r} ({len(unknown)} such tensors)"
        )


def _class_of(checkpoint: Checkpoint) -> str:
    return architecture_of(checkpoint.config)


def stored_names(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that a checkpoint of this architecture stores; a tied head is not stored."""
    ties = _ties(model)
    once = {name: tensor for name, tensor in model.state_dict().items() if ties.get(name, (name,))[0] == name}
    return {name: tuple(tensor.shape) for name, tensor in stored_as(model, once).items()}


def _map_by_architecture(checkpoint: Checkpoint, model: PreTrainedModel) -> LayerMap:
    known, forms, shapes = _known_names(model)
    mixtures, fused = fused_parameters(model), dict[str, Fused]()
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    records: dict[str, LayerRecord] = {}
    notes: list[str] = []
    unknown: list[str] = []
    matched: set[str] = set()
    for tensor, info in checkpoint.tensors.items():
        # Checkpoints of a bare backbone leave the prefix out ("h.0.attn..." for "transformer.h.0.attn...").
        name = next((n for n in (tensor, prefix + tensor, tensor.removeprefix(prefix)) if n in known), None)
        if name is None:
            unknown.append(tensor)
            notes.append(f"{tensor}: the architecture has no such parameter; copied from the first expert")
            records[tensor] = LayerRecord(tensor, *_split(tensor), role="other", known=False)
            continue
        matched.add(name)
        if info.shape != shapes[name]:
            raise SourceError(
                f"{checkpoint.label}: tensor {tensor!r} is {list(info.shape)}, "
                f"but its config.json makes it {list(shapes[name])}"
            )
        records[tensor] = replace(known[name], tensor=tensor)
        if info.dtype is None and not _floating(model, f"{known[name].module}.{known[name].parameter}"):
            records[tensor] = replace(records[tensor], known=False)
        if what := _fused(name, known[name], info.shape, forms, mixtures):
            fused[tensor] = what
        if records[tensor].role == "linear" and len(info.shape) != 2:
            records[tensor] = replace(records[tensor], role="other")
    _refuse_other_class(checkpoint, model, unknown)
    _refuse_missing(checkpoint, forms, matched, _ties(model))
    embedding = _tensor_of(records, _name_of(model, model.get_input_embeddings()))
    head = _tensor_of(records, _name_of(model, model.get_output_embeddings()))
    tied = _ties_head(model) and (head is None or embedding is None or _equal(checkpoint, head, embedding))
    notes += _whole_notes(checkpoint, records, fused)
    return LayerMap(records, "architecture", tied, embedding, head, fused, notes=tuple(notes))


def _fused(
    name: str,
    record: LayerRecord,
    shape: tuple[int, ...],
    forms: Mapping[str, set[str]],
    mixtures: Mapping[str, Fused],
) -> Fused | None:
    """What a tensor is that holds a mixture's matrices: a parameter, or, of three dimensions, a piece of one."""
    parameter = f"{record.module}.{record.parameter}"
    if parameter in mixtures:
        return replace(mixtures[parameter], apart=name == parameter and forms[parameter] != {name})
    owners = [parameter for parameter, stored in forms.items() if name in stored] if len(shape) == 3 else []
    return Fused(shape[0]) if owners and all(owner in mixtures for owner in owners) else None


def _whole_notes(
    checkpoint: Checkpoint, records: Mapping[str, LayerRecord], fused: Mapping[str, Fused]
) -> Iterator[str]:
    """A line for tensors of more than two dimensions that are no mixture's, where they count for the size."""
    numbers = {name: info.numel for name, info in checkpoint.tensors.items()}
    others = [n for n, i in checkpoint.tensors.items() if len(i.shape) > 2 and n not in fused and records[n].known]
    share = sum(numbers[name] for name in others) / max(1, sum(numbers.values()))
    if share > NOTED:
        yield (
            f"{others[0]}{f' and {len(others) - 1} more' if len(others) > 1 else ''}: more than two dimensions, and no "
            f"mixture's matrices; kept whole, not compressed ({share:.0%} of the model)"
        )


def _ties(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Parameter -> all names of it, where it has several; a checkpoint needs to store it under one of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(same) for same in names.values() if len(same) > 1 for name in same}


def _ties_head(model: PreTrainedModel) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and getattr(head, "weight", None) is embedding.weight


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers, read a part at a time."""
    if checkpoint.tensors[one].shape != checkpoint.tensors[other].shape:
        return False
    rows = checkpoint.tensors[one].shape[0]
    return all(
        torch.equal(checkpoint.read_rows(one, start, start + ROWS), checkpoint.read_rows(other, start, start + ROWS))
        for start in range(0, rows, ROWS)
    )


def _floating(model: PreTrainedModel, name: str) -> bool:
    tensor = dict(model.named_parameters()).get(name)
    if tensor is None:
        tensor = dict(model.named_buffers()).get(name)
    return tensor is None or tensor.is_floating_point()


def _refuse_missing(
    checkpoint: Checkpoint,
    forms: Mapping[str, set[str]],
    matched: set[str],
    ties: Mapping[str, tuple[str, ...]],
) -> None:
    missing = [
        name
        for name in forms
        if not any(same in matched or forms.get(same, {same}) <= matched for same in ties.get(name, (name,)))
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(
            f"{checkpoint.label}: tensor {missing[0]!r}{more} of its architecture is missing from the weights"
        )


def _tensor_of(records: Mapping[str, LayerRecord], module: str | None) -> str | None:
    return next((r.tensor for r in records.values() if r.module == module and r.parameter == "weight"), None)


def _known_names(
    model: PreTrainedModel,
) -> tuple[dict[str, LayerRecord], dict[str, set[str]], dict[str, tuple[int, ...]]]:
    """Every name that a checkpoint may use, with its record; for every parameter the names that store it; and the
    shape of every name."""
    roles, state = _roles(model), model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    stored_shapes = {name: tuple(tensor.shape) for name, tensor in stored_as(model, state).items()}
    known = {name: LayerRecord(name, *_split(name), *roles.get(name, ("other", False))) for name in state}
    wide = _kept_in_float32(model)
    known = {name: replace(record, float32=wide(name)) for name, record in known.items()}
    stored_under: dict[str, set[str]] = {name: set() for name in state}
    for stored, parts in forms_of(model).items():
        for part in parts:
            stored_under[part.parameter].add(stored)
        first = known[parts[0].parameter]
        if len(parts) == 1 and not parts[0].transposed and len(parts[0].target) == rows_of(shapes[first.tensor]):
            known[stored] = replace(first, tensor=stored)
        else:  # one matrix of a fused parameter, or several in one
            known[stored] = LayerRecord(stored, stored.removesuffix(".weight"), "weight", "linear")
    return known, stored_under, shapes | stored_shapes


def _kept_in_float32(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether transformers loads a parameter in float32 into a model in 16 bits, by its own patterns."""
    patterns = sorted(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns)) if patterns else None
    return lambda name: kept is not None and kept.search(name) is not None


def _roles(model: PreTrainedModel) -> dict[str, tuple[Role, bool]]:
    """Parameter name -> (role, transposed), from the classes of the model's modules."""
    from transformers.pytorch_utils import Conv1D

    head, embedding = (_name_of(model, end) for end in (model.get_output_embeddings(), model.get_input_embeddings()))
    roles: dict[str, tuple[Role, bool]] = {}
    for module_name, module in model.named_modules():
        for parameter_name, _ in module.named_parameters(recurse=False):
            full = f"{module_name}.{parameter_name}" if module_name else parameter_name
            role: Role = "other"
            table = isinstance(module, torch.nn.Embedding) or module_name == embedding
            if "norm" in type(module).__name__.lower() and not (table and parameter_name == "weight"):
                role = "norm"
            elif parameter_name.endswith("bias"):
                role = "bias"
            elif module_name == head:
                role = "lm_head"
            elif table:
                role = "embedding"
            elif isinstance(module, torch.nn.Linear | Conv1D):
                role = "linear"
            roles[full] = (role, isinstance(module, Conv1D) and role == "linear")
    return roles


def _name_of(model: PreTrainedModel, module: Any) -> str | None:
    return next((name for name, candidate in model.named_modules() if candidate is module), None)


def _split(name: str) -> tuple[str, str]:
    module, _, parameter = name.rpartition(".")
    return module, parameter


def _map_by_shapes(checkpoint: Checkpoint) -> LayerMap:
    records = {tensor: _record_by_shape(tensor, info.shape) for tensor, info in checkpoint.tensors.items()}
    embedding = next((name for name, record in records.items() if record.role == "embedding"), None)
    head = next((name for name, record in records.items() if record.role == "lm_head"), None)
    kind = checkpoint.config.get("model_type", "unknown")
    note = f"transformers does not know model type {kind!r}: linear layers were found by name and shape"
    return LayerMap(records, "shapes", head is None, embedding, head, notes=(note,))


def _record_by_shape(tensor: str, shape: tuple[int, ...]) -> LayerRecord:
    module, parameter = _split(tensor)
    role: Role = "other"
    if _NORM_NAME.search(tensor):
        role = "norm"
    elif parameter.endswith("bias"):
        role = "bias"
    elif _HEAD_NAME.search(tensor):
        role = "lm_head"
    elif _EMBEDDING_NAME.search(tensor):
        role = "embedding"
    elif len(shape) == 2 and parameter == "weight":
        role = "linear"
    return LayerRecord(tensor, module, parameter, role)
