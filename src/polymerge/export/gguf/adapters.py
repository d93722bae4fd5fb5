"""One expert's adapter: PEFT's folder as llama.cpp's LoRA file.

llama.cpp multiplies an adapter's product by alpha over the rank of each pair, with one alpha for all. Factors of
another rank than that carry the quotient, so that the scale is 1 under any reader's rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ...bundle.manifest import ADAPTER_FILE
from ...bundle.peft import adapter_name
from ...engine.llamacpp.folder import Kind
from ...errors import ModelError
from .file import Stored, write_gguf
from .names import Architecture
from .types import stored_type

A, B = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")

# Its factors are looked up, so they stand otherwise than those of a product.
TABLE = "token_embd.weight"


def write_lora(peft: Path, architecture: Architecture, file: Path, kind: Kind) -> None:
    """Writes the pairs of factors of PEFT's folder. Raises ModelError: one of them has no place."""
    with safe_open(peft / ADAPTER_FILE, framework="pt") as handle:
        keys = {adapter_name(key): key for key in handle.keys()}  # noqa: SIM118
        shapes = {name: tuple(handle.get_slice(key).get_shape()) for name, key in keys.items()}
        ranks = Counter(shape[0] for name, shape in shapes.items() if name.endswith(A))
        alpha = ranks.most_common(1)[0][0]

        def describe(writer: Any) -> None:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", float(alpha))

        def read(name: str) -> Tensor:
            tensor: Tensor = handle.get_tensor(keys[name])
            return tensor.float()

        tensors = _tensors(shapes, architecture, kind, alpha, read)
        write_gguf(file, architecture.name, describe, tensors)


def _tensors(
    shapes: Mapping[str, tuple[int, ...]], architecture: Architecture, kind: Kind, alpha: int, read: Any
) -> Iterator[Stored]:
    for name in (name for name in shapes if name.endswith(A)):
        looked_up = name.endswith("embedding_A")
        module = name.removesuffix(f".{A[looked_up]}")
        other = f"{module}.{B[looked_up]}"
        place = architecture.tensor(f"{module}.weight")
        (rank, columns), out = shapes[name], shapes[other][0]
        first = (columns, rank) if looked_up else (rank, columns)  # a row a token is looked up: [V, r]
        yield Stored(f"{place}.lora_a", first, stored_type(kind, first), partial(_a, read, name, looked_up))
        second = (out, rank)
        b = partial(_b, read, other, rank / alpha, architecture, f"{module}.weight")
        yield Stored(f"{place}.lora_b", second, stored_type(kind, second), b)


def _a(read: Any, name: str, looked_up: bool) -> Tensor:
    a: Tensor = read(name)
    return a.T if looked_up else a


def _b(read: Any, name: str, scale: float, architecture: Architecture, weight: str) -> Tensor:
    return architecture.rows(weight, read(name)) * scale


def check_pairs(file: Path, base: Path, expert: str, *, head: bool) -> None:
    """Raises ModelError where a converter's adapter has no place in its base: llama.cpp would end the whole process.

    Args:
        head: the expert changes it. Of architectures whose head is always the embedding, converters leave it out.
    """
    import gguf

    places = {tensor.name: tuple(map(int, tensor.shape)) for tensor in gguf.GGUFReader(base).tensors}
    pairs = {tensor.name: tuple(map(int, tensor.shape)) for tensor in gguf.GGUFReader(file).tensors}
    fix = "export one expert with --to dense"
    if head and not {"output.weight", "output.weight.lora_a"} <= {*places, *pairs}:
        raise ModelError(
            f"expert {expert!r}: its head is its own, and llama.cpp has none beside the embedding in this "
            f"architecture; merge with `embeddings: average`, or {fix}"
        )
    for name in (name.removesuffix(".lora_a") for name in pairs if name.endswith(".lora_a")):
        wanted = (pairs[f"{name}.lora_a"][0], pairs[f"{name}.lora_b"][-1])  # in llama.cpp's order: columns first
        if name != TABLE and wanted != places.get(name):
            raise ModelError(
                f"expert {expert!r}: llama.cpp's converter made factors of {list(wanted)} for {name}, which is "
                f"{list(places.get(name, ()))} in the base; {fix}"
            )
