"""`polymerge serve`: the bundle behind the OpenAI API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..serve.settings import ServeSettings
from .words import Base, Residuals

if TYPE_CHECKING:
    from ..serve.run import Running

DEFAULT = ServeSettings()
Names = Annotated[list[str] | None, typer.Option(help="May be asked by this host name too; repeat for several.")]
Arguments = Annotated[
    list[str] | None, typer.Option(help="For vLLM, such as --vllm-arg=--tensor-parallel-size=8; repeat for several.")
]
Origins = Annotated[list[str] | None, typer.Option(help="Let web pages of this origin ask; repeat for several.")]
Queue = Annotated[int, typer.Option(help="Requests in the queue; more are refused (429).", min=1)]
Caches = Annotated[int, typer.Option(help="Tokens in the caches of all answers.", min=1)]
Chunk = Annotated[int, typer.Option(help="Tokens of prompts that are read between two steps of answers.", min=1)]
Prefixes = Annotated[int, typer.Option(help="Tokens of prompts' beginnings that are remembered; 0 for none.", min=0)]
Drain = Annotated[float, typer.Option(help="Seconds to finish what runs when the server ends.", min=0)]
Margin = Annotated[float, typer.Option(help="How much likelier a new field must be to change the expert.")]


def serve(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, or its hub id.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with a line KEY or NAME KEY for each key.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Listen to other machines without keys.")] = False,
    rate_limit: Annotated[int | None, typer.Option(help="Requests a minute for each key.", min=1)] = None,
    allow_host: Names = None,
    cors_origin: Origins = None,
    max_tokens: Annotated[int, typer.Option(help="Of one answer.", min=1)] = DEFAULT.max_tokens,
    max_body: Annotated[int, typer.Option(help="Bytes of one request.", min=1)] = DEFAULT.max_body_bytes,
    max_rows: Annotated[int, typer.Option(help="Answers that are made at the same time.", min=1)] = DEFAULT.max_rows,
    max_waiting: Queue = DEFAULT.max_waiting,
    cache_tokens: Caches = DEFAULT.cache_tokens,
    chunk_tokens: Chunk = DEFAULT.chunk_tokens,
    prefix_tokens: Prefixes = DEFAULT.prefix_tokens,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.", min=0)] = DEFAULT.seconds,
    drain: Drain = DEFAULT.drain_seconds,
    margin: Margin = DEFAULT.margin,
    recipe: Annotated[Path | None, typer.Option(help="Its thinker and stages make the model `staged`.")] = None,
    thinker: Annotated[str | None, typer.Option(help="The same by a source or the URL of an endpoint.")] = None,
    model: Annotated[str | None, typer.Option(help="The endpoint's name for the model.")] = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the endpoint's key.")] = None,
    policy: Annotated[str | None, typer.Option(help="When `staged` thinks: always, never or auto.")] = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="BUNDLE is an export for vLLM, which is started.")] = False,
    vllm_url: Annotated[str | None, typer.Option(help="The same with a vLLM server that runs already.")] = None,
    vllm_python: Annotated[str | None, typer.Option(help="The python that has vLLM; by default `vllm` is run.")] = None,
    vllm_arg: Arguments = None,
    engine: Annotated[str, typer.Option(help="auto says which and why; transformers, vllm, or llamacpp.")] = "auto",
    gguf: Annotated[Path | None, typer.Option(help="The bundle's export for llama.cpp; by default made once.")] = None,
    llama_url: Annotated[str | None, typer.Option(help="A llama-server that runs already with the export.")] = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Check every expert first.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; by default the GPU where there is one.")] = None,
    base: Base = "16bit",
    residuals: Residuals = "decoded",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and answers to the log.")] = False,
    feedback: Annotated[
        Path | None, typer.Option(help="Keep the playground's thumbs, {prompt, expert, right}, in this JSONL file.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when the server listens.")] = False,
) -> None:
    """Serve a bundle: OpenAI's API, a playground at /, metrics. SIGTERM finishes what runs."""
    from ..serve.start import serve_bundle
    from .console import err, out, print_json, tell
    from .logs import hush_libraries, log_to_stderr

    hush_libraries()
    log_to_stderr("WARNING" if quiet else "INFO")

    def ready(running: Running) -> None:
        if as_json:
            print_json(running.to_json())
        else:
            out.print(f"{running.url}  models: {', '.join(running.models)}", markup=False, soft_wrap=True)

    def say(text: str) -> None:
        if not quiet:
            tell(text, to=err)

    serve_bundle(
        bundle, host=host, port=port, api_key_file=api_key_file, open=open_, rate_limit=rate_limit,
        allow_host=allow_host, cors_origin=cors_origin, max_tokens=max_tokens, max_body=max_body, max_rows=max_rows,
        max_waiting=max_waiting, cache_tokens=cache_tokens, chunk_tokens=chunk_tokens, prefix_tokens=prefix_tokens,
        timeout=timeout, drain=drain, margin=margin, recipe=recipe,
        thinker=thinker, model=model, key_env=key_env, policy=policy, vllm=vllm, vllm_url=vllm_url,
        vllm_python=vllm_python, vllm_arg=vllm_arg, engine=engine, gguf=gguf, llama_url=llama_url,
        probe=probe, device=device, base=base, residuals=residuals,
        log_prompts=log_prompts, feedback=feedback, say=say, on_ready=ready,
    )  # fmt: skip
