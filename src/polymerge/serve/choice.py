"""Which engine serves a bundle, where nobody said: decided before anything is loaded, with the reason in words.

Knows what is installed, what the options ask for, and what each engine can express. Starts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..bundle.bundle import Bundle
from ..engine.llamacpp.folder import NOTE as GGUF_NOTE
from ..engine.llamacpp.server import installed
from ..engine.vllm.folder import NOTE as VLLM_NOTE
from ..errors import ModelError
from ..export import plan_gguf
from ..host import pick_device
from ..paths import path_of


@dataclass(frozen=True)
class Choice:
    """An engine's name, and why it is that one."""

    engine: str
    why: str


def choose_engine(source: str | Path, *, asked: Mapping[str, bool], device: str | None = None) -> Choice:
    """vLLM for its exports; llama.cpp on a CPU or Mac, where it is installed and expresses the whole bundle;
    transformers for the rest.

    A bundle on a GPU is not exported for vLLM unasked: that may lose what an adapter cannot hold, and the user
    should see what. The reason says how.

    Args:
        asked: what only transformers does -> whether it was asked for.

    Raises:
        BundleError: it is no bundle and no export. DeviceError: no such device.
    """
    source = path_of(source, "bundle")
    if (source / VLLM_NOTE).is_file():
        return Choice("vllm", "the folder is an export for vLLM")
    if (source / GGUF_NOTE).is_file():
        return Choice("llamacpp", "the folder is an export for llama.cpp")
    only = next((what for what, wanted in asked.items() if wanted), None)
    if only:
        return Choice("transformers", f"{only} is its alone")
    if pick_device(device).type == "cuda":
        return Choice("transformers", _on_a_gpu())
    if installed() is None:
        return Choice("transformers", "llama.cpp, faster on a CPU, is not installed (extra llamacpp)")
    return _on_a_cpu(Bundle.open(source))


def _on_a_gpu() -> str:
    if find_spec("vllm") is None:
        return "there is a GPU, and vLLM is not installed here"
    return "there is a GPU; vLLM is installed and faster for many users: serve what `polymerge export --to vllm` writes"


def _on_a_cpu(bundle: Bundle) -> Choice:
    missing = next(_inexpressible(bundle), None)
    if missing:
        return Choice("transformers", f"llama.cpp cannot hold this bundle ({missing})")
    return Choice("llamacpp", "it is installed, and there is no GPU; mixtures and `staged` want --engine transformers")


def _inexpressible(bundle: Bundle) -> Iterator[str]:
    try:
        yield from plan_gguf(bundle).lost
    except ModelError as error:
        yield str(error)
