"""What `polymerge serve` starts: a bundle of this process, or an export that vLLM runs.

Knows every argument of the verb and which part it is for. Loads nothing before it is called, so that the extra `serve`
may be missing until then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PolymergeError, needs_extra
from .settings import ServeSettings

if TYPE_CHECKING:
    from .run import Running

DEFAULT = ServeSettings()
ENGINES = ("auto", "transformers", "vllm", "llamacpp")


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
    chunk_tokens: int = DEFAULT.chunk_tokens,
    prefix_tokens: int = DEFAULT.prefix_tokens,
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
    engine: str = "auto",
    gguf: str | Path | None = None,
    llama_url: str | None = None,
    probe: bool = True,
    device: str | None = None,
    residuals: str = "decoded",
    base: str = "16bit",
    log_prompts: bool = False,
    feedback: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    on_ready: Callable[[Running], None] | None = None,
) -> None:
    """Serves a bundle until SIGTERM or SIGINT; then finishes what runs, for `drain` seconds at most.

    Args:
        port: 0 takes a free one.
        api_key_file: a file with a line KEY, NAME KEY or NAME KEY admin for each key; SIGHUP reads it again.
        open: listen to other machines although there are no keys.
        rate_limit: requests a minute for each key.
        allow_host, cors_origin: host names by which the server may be asked, and origins of web pages that may.
        max_tokens: of one answer. max_body: bytes of one request. max_rows: answers made at the same time.
        max_waiting: requests in the queue; more are refused. cache_tokens: in the caches of all answers.
        chunk_tokens: of prompts that are read between two steps of running answers. prefix_tokens: of prompts'
            beginnings that are remembered, within `cache_tokens`; 0 for none.
        timeout: seconds for one answer.
        margin: how much likelier a new field must be to change a conversation's expert.
        recipe, thinker, model, key_env, policy: the thinker of the model `staged`; without, there is no such model.
        vllm: `bundle` is an export for vLLM, which is started with `vllm_python` and `vllm_arg`; with `vllm_url` it
            runs already.
        engine: auto, which says what it picks and why (`polymerge.serve.choice`); transformers; vllm, which is what
            `vllm` says; or llamacpp, which serves the bundle's export (`gguf`, or made once in the cache), or an export
            that `bundle` is, or with `llama_url` a llama-server that runs.
        probe: check every expert first.
        residuals: decoded or packed, and base: 16bit or fewer, as `load_model` takes them.
        feedback: a file to which the playground's thumbs go, as JSONL; without one nothing is kept.
        say: told what is being done before the server listens.
        on_ready: told when it listens.

    Raises:
        PolymergeError: it cannot listen there, or may not; BundleError, ModelError: the bundle is not whole.
        MissingExtraError: the extra `serve` is not installed.
    """
    with needs_extra("serve"):
        from .keys import read_keys
        from .run import ThinkerChoice, serve, serve_llamacpp, serve_vllm

    settings = ServeSettings(
        keys=read_keys(api_key_file) if api_key_file else {},
        key_file=Path(api_key_file) if api_key_file else None,
        requests_per_minute=rate_limit,
        max_body_bytes=max_body,
        max_tokens=max_tokens,
        max_rows=max_rows,
        max_waiting=max_waiting,
        cache_tokens=cache_tokens,
        chunk_tokens=chunk_tokens,
        prefix_tokens=prefix_tokens,
        seconds=timeout,
        drain_seconds=drain,
        margin=margin,
        cors_origins=tuple(cors_origin or ()),
        hosts=tuple(name.lower() for name in allow_host or ()),
        log_prompts=log_prompts,
        feedback=Path(feedback) if feedback else None,
    )
    said, ready = say or (lambda text: None), on_ready or (lambda running: None)
    engine = _chosen(
        engine, bundle, said, device, gguf=bool(gguf or llama_url), vllm=vllm or bool(vllm_url),
        only={"`staged`": bool(recipe or thinker), "--base": base != "16bit", "--residuals": residuals != "decoded"},
    )  # fmt: skip
    check_engine(engine, gguf, llama_url, vllm=vllm or bool(vllm_url), staged=bool(recipe or thinker))
    if engine != "vllm" and (vllm_python or vllm_arg):
        raise PolymergeError("--vllm-python and --vllm-arg belong to --engine vllm")
    if engine != "transformers" and (base != "16bit" or residuals != "decoded"):
        raise PolymergeError(
            "--base and --residuals belong to the engine transformers; the others have types of their own"
        )
    if engine == "llamacpp":
        serve_llamacpp(
            bundle, gguf=gguf, url=llama_url, host=host, port=port, settings=settings, everyone=open, device=device,
            probe=probe, say=said, on_ready=ready,
        )  # fmt: skip
        return
    if engine == "vllm":
        serve_vllm(
            bundle, url=vllm_url, python=vllm_python, extra=vllm_arg or (), host=host, port=port, settings=settings,
            everyone=open, say=said, on_ready=ready,
        )  # fmt: skip
        return
    chosen = Path(recipe) if recipe else None
    stages = ThinkerChoice(chosen, thinker, model, key_env, policy) if recipe or thinker else None
    serve(
        bundle, host=host, port=port, settings=settings, everyone=open, device=device, residuals=residuals, base=base,
        stages=stages, probe=probe, say=said, on_ready=ready,
    )  # fmt: skip


def _chosen(
    engine: str,
    bundle: str | Path,
    say: Callable[[str], None],
    device: str | None,
    *,
    gguf: bool,
    vllm: bool,
    only: Mapping[str, bool],
) -> str:
    """The engine that was named, or that other options name, or the one that suits."""
    if engine != "auto":
        return engine
    if vllm or gguf:
        return "vllm" if vllm else "llamacpp"
    from .choice import choose_engine

    choice = choose_engine(bundle, asked=only, device=device)
    say(f"engine {choice.engine}: {choice.why}")
    return choice.engine


def check_engine(engine: str, gguf: str | Path | None, llama_url: str | None, *, vllm: bool, staged: bool) -> None:
    """Raises PolymergeError for an engine that there is not, or arguments that are another one's."""
    if engine not in ENGINES:
        raise PolymergeError(f"engine {engine!r}: one of {', '.join(ENGINES)}")
    if engine != "llamacpp" and (gguf or llama_url):
        raise PolymergeError("--gguf and --llama-url belong to --engine llamacpp")
    if engine in ("llamacpp", "transformers") and vllm:
        raise PolymergeError(f"--engine {engine}: leave --vllm and --vllm-url out")
    if engine in ("llamacpp", "vllm") and staged:
        raise PolymergeError(f"--engine {engine} serves no `staged`; leave --recipe and --thinker out, or the engine")
