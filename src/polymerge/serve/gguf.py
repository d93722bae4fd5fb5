"""The export that llama.cpp serves of a bundle: given, or made once and kept in the cache.

Knows folders. Does not know llama.cpp (`polymerge.engine.llamacpp`) or how an export is made (`polymerge.export.gguf`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ..bundle.bundle import Bundle
from ..engine.base import FloatArray, Pooling, Prompt
from ..engine.llamacpp.folder import NOTE, GgufNote, Kind, read_note
from ..engine.local.engine import HFEngine
from ..errors import BundleError
from ..export import export_gguf
from ..host import cache_folder
from ..paths import path_of

TYPE: Kind = "q8_0"


def export_of(source: str | Path, gguf: str | Path | None, say: Callable[[str], None]) -> tuple[Bundle | None, Path]:
    """The bundle, if one was named, and the folder that llama.cpp shall serve.

    Raises:
        BundleError: the export is another bundle's. ModelError: llama.cpp cannot express the bundle.
    """
    source = path_of(source, "bundle")
    if (source / NOTE).is_file():
        if gguf is not None:
            raise BundleError(f"{source}: is an export already; leave --gguf out")
        return None, source
    bundle = Bundle.open(source)
    folder = path_of(gguf, "gguf") if gguf else cache_folder() / "exports" / f"{bundle.digest[:16]}-{TYPE}"
    if gguf is None and not (folder / NOTE).is_file():
        say(f"exporting {bundle.path} for llama.cpp, once, into {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        export_gguf(
            bundle.path, folder, type=TYPE, overwrite=True,
            progress=lambda step: say(f"exporting: {step.done} of {step.total} ({step.tensor})"),
        )  # fmt: skip
    note = read_note(folder)
    if note.bundle != bundle.digest:
        raise BundleError(f"{folder}: is the export of another bundle than {bundle.path}; export this one")
    say(f"llama.cpp serves {folder}: base {note.type}{_cost(note)}")
    return bundle, folder


def _cost(note: GgufNote) -> str:
    kls = [expert.served.kl for expert in note.experts.values() if expert.served]
    return f", KL to the bundle's experts at most {max(kls):.2g} nats a token" if kls else ", KL not measured"


def average_embedder(
    bundle: Bundle, device: str | None = None
) -> Callable[[Sequence[Prompt], Sequence[int], Pooling], FloatArray]:
    """Hidden states of a bundle's average, from an embedded engine that is loaded when first asked."""
    lock, loaded = threading.Lock(), list[HFEngine]()

    def embed(prompts: Sequence[Prompt], layers: Sequence[int], pooling: Pooling) -> FloatArray:
        with lock:
            if not loaded:
                loaded.append(HFEngine.from_bundle(bundle, device=device))
            return loaded[0].embed(prompts, layers=layers, pooling=pooling)

    return embed
