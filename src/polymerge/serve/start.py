"""What `polymerge serve` starts: a bundle of this process, or an export that vLLM runs.

Knows every argument of the verb and which part it is for. Loads nothing before it is called, so that the extra `serve`
may be missing until then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import needs_extra
from .settings import ServeSettings, read_keys

if TYPE_CHECKING:
    from .run import Running

DEFAULT = ServeSettings()


def serve_bundle(
    bundle: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: str | Path | None = None,
    open: bool = False,
    rate_limit: int | None = None,
    allow_host: Sequence[str] | None = None,
    cors_origin: Sequence[str] | None = None,
    max_tokens: int = DEFAULT.max_tokens,
    max_body: int = DEFAULT.max_body_bytes,
    max_rows: int = DEFAULT.max_rows,
    max_waiting: int = DEFAULT.max_waiting,
    cache_tokens: int = DEFAULT.cache_tokens,
    timeout: float = DEFAULT.seconds,
    drain: float = DEFAULT.drain_seconds,
    margin: float = DEFAULT.margin,
    recipe: str | Path | None = None,
    thinker: str | None = None,
    model: str | None = None,
    key_env: str | None = None,
    policy: str | None = None,
    vllm: bool = False,
    vllm_url: str | None = None,
    vllm_python: str | None = None,
    vllm_arg: Sequence[str] | None = None,
    probe: bool = True,
    device: str | None = None,
    kernel: str = "plain",
    base: str = "16bit",
    log_prompts: bool = False,
    say: Callable[[str], None] | None = None,
    on_ready: Callable[[Running], None] | None = None,
) -> None:
    """Serves a bundle until SIGTERM or SIGINT; then finishes what runs, for `drain` seconds at most.

    Args:
        port: 0 takes a free one.
        api_key_file: a file with a line KEY or NAME KEY for each key.
        open: listen to other machines although there are no keys.
        rate_limit: requests a minute for each key.
        allow_host, cors_origin: host names by which the server may be asked, and origins of web pages that may.
        max_tokens: of one answer. max_body: bytes of one request. max_rows: answers made at the same time.
        max_waiting: requests in the queue; more are refused. cache_tokens: in the caches of all answers.
        timeout: seconds for one answer.
        margin: how much likelier a new field must be to change a conversation's expert.
        recipe, thinker, model, key_env, policy: the thinker of the model `staged`; without, there is no such model.
        vllm: `bundle` is an export for vLLM, which is started with `vllm_python` and `vllm_arg`; with `vllm_url` it
            runs already.
        probe: check every expert first.
        kernel: plain or triton, and base: 16bit or fewer, as `load_model` takes them.
        say: told what is being done before the server listens.
        on_ready: told when it listens.

    Raises:
        PolymergeError: it cannot listen there, or may not; BundleError, ModelError: the bundle is not whole.
        MissingExtraError: the extra `serve` is not installed.
    """
    with needs_extra("serve"):
        from .run import ThinkerChoice, serve, serve_vllm

    settings = ServeSettings(
        keys=read_keys(api_key_file) if api_key_file else {},
        requests_per_minute=rate_limit,
        max_body_bytes=max_body,
        max_tokens=max_tokens,
        max_rows=max_rows,
        max_waiting=max_waiting,
        cache_tokens=cache_tokens,
        seconds=timeout,
        drain_seconds=drain,
        margin=margin,
        cors_origins=tuple(cors_origin or ()),
        hosts=tuple(name.lower() for name in allow_host or ()),
        log_prompts=log_prompts,
    )
    said, ready = say or (lambda text: None), on_ready or (lambda running: None)
    if vllm or vllm_url:
        serve_vllm(
            bundle, url=vllm_url, python=vllm_python, extra=vllm_arg or (), host=host, port=port, settings=settings,
            everyone=open, say=said, on_ready=ready,
        )  # fmt: skip
        return
    chosen = Path(recipe) if recipe else None
    stages = ThinkerChoice(chosen, thinker, model, key_env, policy) if recipe or thinker else None
    serve(
        bundle, host=host, port=port, settings=settings, everyone=open, device=device, kernel=kernel, base=base,
        stages=stages, probe=probe, say=said, on_ready=ready,
    )  # fmt: skip
