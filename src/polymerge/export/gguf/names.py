"""What llama.cpp calls an architecture's tensors, and in which order it has their rows.

Only architectures whose base and adapters are written here; the rest is llama.cpp's own converters' (`converter.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ...errors import ModelError, needs_extra

# transformers' name -> llama.cpp's.
WRITTEN = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# Those whose rotary positions turn neighbouring rows, where transformers turns the halves of a head.
INTERLEAVED = ("llama",)
ROPE = ("default", "llama3")


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp with a model's shape.

    Attributes:
        heads, kv_heads: of queries and of keys.
    """

    name: str
    blocks: int
    heads: int
    kv_heads: int

    def tensor(self, name: str) -> str:
        """llama.cpp's name of a tensor. Raises ModelError: it has none."""
        known: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ModelError(f"{name}: llama.cpp's {self.name!r} has no place for it; give --llama-cpp FOLDER")
        return known

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor, or the B of its factors, with its rows in llama.cpp's order. [out, ...]"""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(name.split(".")[-2])
        return interleaved(tensor, heads) if heads and self.name in INTERLEAVED else tensor

    @cached_property
    def _names(self) -> Any:
        with needs_extra("gguf"):
            import gguf
        number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        return gguf.get_tensor_name_map(number, self.blocks)


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of every head so that the first row of its second half follows that of its first, and so on. [out, ...]"""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def architecture_of(config: Mapping[str, Any], name: str) -> Architecture | None:
    """Of a checkpoint's config.json; None where it is not written here."""
    if name not in WRITTEN or _unlike_llamas(config):
        return None
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return Architecture(WRITTEN[name], int(config["num_hidden_layers"]), heads, kv_heads)


def _unlike_llamas(config: Mapping[str, Any]) -> bool:
    """Whether llama.cpp's architecture of the same name does something else."""
    window = config.get("sliding_window") and config.get("use_sliding_window", True)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return bool(window) or kind not in ROPE or part != 1.0 or config.get("hidden_act", "silu") != "silu"
