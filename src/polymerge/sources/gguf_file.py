"""What a GGUF file says it is, and whether a model that was loaded from it holds all of it.

Every tensor of the file and every parameter of the model must meet once: transformers leaves out the tensors that its
configuration has no place for, and initialises anew the parameters that the file lacks. Knows GGUF's metadata and
names; does not know how a file is unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingExtraError, SourceError, install_line

# Divides the frequencies of Llama 3's positions; everything else in a file is a parameter.
ROPE_FACTORS = "rope_freqs.weight"
# Llama 3's own, beside the factor itself; a file holds what they make, not them.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LORA = (".lora_a", ".lora_b")
# Lists as long as the vocabulary that nobody asks for.
_LONG = {"tokenizer.ggml.merges", "tokenizer.ggml.scores"}


@dataclass(frozen=True)
class GgufHeader:
    """Metadata of a file, the number of values of every tensor, and Llama 3's frequency factors where it has any."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, int]
    rope_factors: Tensor | None


def read_header(file: Path, label: str) -> GgufHeader:
    """The header of a GGUF file. Raises SourceError, or MissingExtraError without the `gguf` package."""
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise SourceError(f"{label}: does not start like a GGUF file; copy it again")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError(f"{label}: reading GGUF needs {error.name}; {install_line('gguf')}") from None
    try:
        reader = GGUFReader(file)
    except Exception as error:  # gguf raises many types for one bad file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{label}: not a whole GGUF file (truncated or corrupt: {reason}); copy it again") from None
    fields = {key: field.contents() for key, field in reader.fields.items() if key not in _LONG}
    tensors = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    factors = next((t.data for t in reader.tensors if t.name == ROPE_FACTORS), None)
    return GgufHeader(
        fields, tensors, None if factors is None else torch.tensor(factors, dtype=torch.float32).flatten()
    )


def check_kind(header: GgufHeader, file: Path, label: str) -> None:
    """Raises SourceError unless the file is one whole language model."""
    kind, architecture = header.fields.get("general.type", "model"), header.fields.get("general.architecture")
    parts = int(header.fields.get("split.count", 0))
    if kind == "adapter" or any(name.endswith(_LORA) for name in header.tensors):
        raise SourceError(f"{label}: a LoRA adapter in GGUF's form; give the adapter's PEFT folder with its `base:`")
    if kind == "mmproj" or architecture == "clip":
        raise SourceError(f"{label}: the projector (mmproj) of a multimodal model; give its language model's file")
    if kind != "model":
        raise SourceError(f"{label}: a GGUF file of type {kind!r}, not a model's weights")
    if parts > 1:
        whole = f"{file.stem.partition('-00')[0]}-whole.gguf"
        number = int(header.fields.get("split.no", 0)) + 1
        raise SourceError(
            f"{label}: part {number} of {parts} of a split file; join them: "
            f"`llama-gguf-split --merge FIRST_PART {whole}`, and give {whole}"
        )


def check_met(header: GgufHeader, model: Any, info: Mapping[str, Iterable[Any]], label: str) -> None:
    """Raises SourceError where a tensor of the file or a parameter of the model was left over.

    Unpacking renames, reorders and joins tensors but never loses or repeats a value, so the two must hold equally many.

    Args:
        info: of the loading, as transformers returns it.
    """
    missing = [str(name) for kind in ("missing_keys", "mismatched_keys") for name in sorted(map(str, info[kind]))]
    if missing:
        raise SourceError(
            f"{label}: the file has no tensor for {_some(missing)} of {type(model).__name__}, which transformers would "
            "fill with random numbers; convert the model again"
        )
    placed = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    held = sum(count for name, count in header.tensors.items() if name != ROPE_FACTORS)
    if held != sum(placed.values()):
        dropped = _without_place(header, model) or ["(unnamed)"]
        raise SourceError(
            f"{label}: {type(model).__name__} has no place for {_some(dropped)} of the file, which transformers leaves "
            "out; give the model's own folder instead"
        )


def rope_of(header: GgufHeader, model: Any, label: str) -> dict[str, Any] | None:
    """The rope settings that the file's frequency factors stand for; None where the configuration has them.

    Raises:
        SourceError: they are not Llama 3's.
    """
    if header.rope_factors is None:
        return None
    config = deepcopy(model.config)
    settings = dict(config.rope_parameters or {})
    plain = inverse_frequencies(config, {**settings, "rope_type": "default"})
    if plain.shape == header.rope_factors.shape:
        wanted = plain / header.rope_factors
        scaled = {**settings, "rope_type": "llama3", "factor": float(header.rope_factors.max()), **LLAMA3}
        for candidate in (settings, scaled):
            if torch.allclose(inverse_frequencies(config, candidate), wanted, rtol=1e-4, atol=0):
                return None if candidate is settings else scaled
    raise SourceError(
        f"{label}: {ROPE_FACTORS!r} scales the positions in a way that is neither its configuration's nor Llama 3's; "
        "give the model's own folder instead"
    )


def inverse_frequencies(config: Any, settings: dict[str, Any]) -> Tensor:
    """transformers' inverse frequencies for some rope settings. [head_dim / 2]"""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = settings.get("rope_type", "default")
    if kind == "default":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = int(size * settings.get("partial_rotary_factor", 1.0))
        steps = torch.arange(0, size, 2, dtype=torch.float32) / size
        return torch.exp(-steps * math.log(settings["rope_theta"]))
    config.rope_parameters = settings
    frequencies: Tensor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
    return frequencies


def _without_place(header: GgufHeader, model: Any) -> list[str]:
    """The tensors whose name is none of the model's parameters'."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    kind = kinds.get(str(header.fields.get("general.architecture")))
    if kind is None:
        return []
    names = gguf.get_tensor_name_map(kind, int(model.config.get_text_config().num_hidden_layers))
    known = set()
    for name in model.state_dict():
        module, _, parameter = name.rpartition(".")
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        known |= {place, f"{names.get_name(module)}.{parameter}"}
    return [name for name in header.tensors if name not in known and name != ROPE_FACTORS]


def _some(names: list[str]) -> str:
    return f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
