"""llama.cpp's server in this process, by the package xllamacpp: started on an exported folder, ended with its context.

Knows its parameters. Does not know requests.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import ModelError, needs_extra
from ...host import usable_cores
from .api import LlamaApi
from .folder import BASE, GgufNote, read_note

# Answers that are made at the same time, and tokens in the caches of all of them.
ROWS, CACHE_TOKENS = 32, 32768


def installed() -> str | None:
    """The version of llama.cpp's package; None where there is none."""
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    try:
        return f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    except importlib.metadata.PackageNotFoundError:
        return "xllamacpp"


def package() -> Any:
    """xllamacpp. Raises MissingExtraError: the extra `llamacpp` is not installed."""
    with needs_extra("llamacpp"):
        import xllamacpp

    return xllamacpp


@contextmanager
def llama_server(
    folder: str | Path, *, note: GgufNote | None = None, rows: int = ROWS, cache_tokens: int = CACHE_TOKENS,
    threads: int | None = None,
) -> Iterator[LlamaApi]:  # fmt: skip
    """A server on an exported folder. It listens to this machine, and only to who has the key that is made for it.

    Args:
        note: the folder's, where it is not written yet.
        rows: requests at the same time.
        cache_tokens: for all of them; one request may take all.
        threads: by default OMP_NUM_THREADS, else all cores that this process may use.

    Raises:
        MissingExtraError: the extra `llamacpp` is not installed. ModelError: llama.cpp cannot load the folder.
    """
    xllamacpp = package()
    folder = Path(folder).expanduser()
    note = note or read_note(folder)
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / BASE)
    params.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(str(folder / expert.adapter), 1.0) for expert in note.experts.values()
    ]
    params.lora_init_without_apply = True
    params.n_parallel, params.n_ctx, params.kv_unified = rows, cache_tokens, True
    params.n_threads_http = rows + 4
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or _threads()
    params.cache_ram_mib = 0  # prompts of answers that are over are not kept beside the slots
    key = secrets.token_urlsafe(32)
    params.api_keys = [key]
    params.warmup, params.ui, params.verbosity = False, False, -1
    try:
        server = xllamacpp.Server(params)
    except Exception as error:  # of its own types, for a file it cannot read, an adapter of another model, no memory
        raise ModelError(f"{folder}: llama.cpp cannot load it ({' '.join(str(error).split())[:200]})") from None
    try:
        yield LlamaApi(server.listening_address, api_key=key)
    finally:
        del server


def _threads() -> int:
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else usable_cores()
