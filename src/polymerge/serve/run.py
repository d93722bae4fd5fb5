"""`serve(bundle)`: load, check, listen, answer, and end without cutting anybody off."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from ..bundle.bundle import Bundle
from ..engine.local.batching import BatchingEngine
from ..engine.local.engine import HFEngine
from ..engine.streaming import StreamingEngine
from ..errors import PolymergeError
from ..model.mixed import MixedModel
from ..recipe.response import StageSettings, ThinkerSettings
from ..router.route import Routes
from .app import create_app
from .connections import BACKLOG, http_protocol
from .experts import LoadedExperts
from .probe import probe as check
from .settings import LOCAL_HOSTS, ServeSettings
from .stages import Responds

Say = Callable[[str], None]
# Given what ends the server.
OnReady = Callable[[Callable[[], None]], None]


@dataclass(frozen=True)
class Running:
    """What is served, told when it listens. `stop` ends the server as a signal would."""

    url: str
    models: list[str]
    keys: int
    stop: Callable[[], None] = field(default=lambda: None, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {"url": self.url, "models": self.models, "keys": self.keys}


@dataclass(frozen=True)
class ThinkerChoice:
    """Where the thinker and its settings come from: a recipe, and single values over it.

    Attributes:
        thinker: a source or the URL of an endpoint, with `model` and `key_env`.
        use: always, never or auto, in the place of the recipe's.
    """

    recipe: Path | None = None
    thinker: str | None = None
    model: str | None = None
    key_env: str | None = None
    use: str | None = None

    def settings(self) -> tuple[StageSettings, ThinkerSettings]:
        """What the recipe and the values over it say.

        Raises:
            RecipeError: the recipe or a value cannot be used.
        """
        from ..recipe.merge import load_recipe
        from ..staged.opening import stage_settings, thinker_settings

        read = load_recipe(self.recipe) if self.recipe else None
        chosen = stage_settings(read.staged if read else None, use=self.use)
        given = read.thinker if read else None
        return chosen, thinker_settings(given, self.thinker, model=self.model, key_env=self.key_env)

    def open(
        self, bundle: Bundle, engine: BatchingEngine, router: Routes | None, device: str | None = None
    ) -> Responds:
        """The pipeline. A thinker of this process is loaded when it is first asked. Raises as `settings`."""
        from ..staged import Evidence, Pipeline, open_thinker

        chosen, named = self.settings()
        thinker, evidence = open_thinker(named, device), Evidence.load(bundle.path)
        return Pipeline(engine, chosen, thinker=thinker, router=router, evidence=evidence)


def serve(
    bundle: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: ServeSettings | None = None,
    everyone: bool = False,
    device: str | None = None,
    residuals: str = "decoded",
    base: str = "16bit",
    stages: ThinkerChoice | None = None,
    probe: bool = True,
    say: Say = lambda text: None,
    on_ready: Callable[[Running], None] = lambda running: None,
) -> None:
    """Serves a bundle until SIGTERM or SIGINT; then finishes what runs, for `drain_seconds` at most.

    Args:
        settings: every limit of the server, and its keys.
        everyone: listen to other machines although there are no keys.
        residuals: decoded or packed, and base: 16bit or fewer, as `load_model` takes them.
        stages: the thinker of the model `staged`; None leaves that model out.
        probe: check every expert first.
        say: told what is being done before the server listens.

    Raises:
        PolymergeError: it cannot listen there, or may not; BundleError, ModelError: the bundle is not whole.
    """
    settings = guarded(settings or ServeSettings(), host, everyone=everyone)
    if stages:
        stages.settings()  # refused before the bundle is loaded
    with listener(host, port) as place:
        opened = Bundle.open(bundle)
        say(f"loading {opened.path}")

        def load(chosen: Bundle, beside: MixedModel | None = None) -> HFEngine:
            made = HFEngine.from_bundle(chosen, device=device, residuals=residuals, base=base, beside=beside)
            new = [expert for expert in chosen.experts if beside is None or expert not in beside.experts]
            if probe:
                check(made, chosen, new, progress=lambda expert: say(f"checking expert {expert}"))
            return made

        engine = BatchingEngine(load(opened), settings.limits)
        try:
            router = bundle_router(opened, engine, device)
            pipeline = stages.open(opened, engine, router, device) if stages else None
            experts = LoadedExperts(opened, engine, load, settings.seconds)
            app = create_app(engine, router, pipeline, settings, experts)
            _listen(app, place, host, settings, on_ready)
        finally:
            engine.close(settings.close_seconds)


def serve_vllm(
    folder: str | Path,
    *,
    url: str | None = None,
    python: str | None = None,
    extra: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: ServeSettings | None = None,
    everyone: bool = False,
    say: Say = lambda text: None,
    on_ready: Callable[[Running], None] = lambda running: None,
) -> None:
    """Serves what `polymerge export --to vllm` wrote, from a vLLM server that is started or, with `url`, runs already.

    vLLM tells no hidden states, so there is no router. Other arguments are `serve`'s.

    Args:
        python, extra: as for `polymerge.engine.vllm.server.VllmServer`.

    Raises:
        PolymergeError: as `serve`; ModelError: vLLM does not start or does not answer as the export says.
    """
    from ..engine.vllm.engine import CONCURRENCY, vllm_engine
    from ..engine.vllm.streaming import VllmStreaming

    settings = guarded(settings or ServeSettings(), host, everyone=everyone)
    with (
        listener(host, port) as place,
        vllm_engine(folder, url=url, python=python, extra=extra, say=say, kind=VllmStreaming) as engine,
    ):
        engine.max_waiting = settings.max_waiting
        try:
            places = replace(settings, max_rows=CONCURRENCY)  # vLLM makes its own batches
            _listen(create_app(engine, settings=places), place, host, settings, on_ready)
        finally:
            engine.close(settings.close_seconds)


def serve_llamacpp(
    source: str | Path,
    *,
    gguf: str | Path | None = None,
    url: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: ServeSettings | None = None,
    everyone: bool = False,
    device: str | None = None,
    probe: bool = True,
    say: Say = lambda text: None,
    on_ready: Callable[[Running], None] = lambda running: None,
) -> None:
    """Serves from llama.cpp what `polymerge export --to gguf` wrote, or a bundle by its export.

    A bundle's router is served too, and its embeddings are the embedded engine's, loaded when first asked for. Other
    arguments are `serve`'s.

    Args:
        source: the export's folder, or the bundle's.
        gguf: the export of the bundle; by default it is made once, at q8_0, in the cache.
        url: of a llama-server that runs already with the export's files.

    Raises:
        PolymergeError: as `serve`; ModelError: llama.cpp does not load the export or does not answer as it says.
    """
    from ..engine.llamacpp.engine import llama_engine
    from ..engine.llamacpp.server import package
    from .gguf import average_embedder, export_of

    settings = guarded(settings or ServeSettings(), host, everyone=everyone)
    with listener(host, port) as place:
        if url is None:
            package()  # missing, it should be missed now and not after an export
        bundle, folder = export_of(source, gguf, say)
        with llama_engine(
            folder, url=url, rows=settings.max_rows, cache_tokens=settings.cache_tokens, probe=probe,
            embed=average_embedder(bundle, device) if bundle else None,
        ) as engine:  # fmt: skip
            engine.max_waiting = settings.max_waiting
            try:
                router = bundle_router(bundle, engine, device) if bundle else None
                _listen(create_app(engine, router, settings=settings), place, host, settings, on_ready)
            finally:
                engine.close(settings.close_seconds)


def _listen(
    app: FastAPI,
    place: socket.socket,
    host: str,
    settings: ServeSettings,
    on_ready: Callable[[Running], None],
) -> None:
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{place.getsockname()[1]}"
    models = app.state.service.chooser.models
    run_app(app, place, settings, lambda stop: on_ready(Running(url, models, len(settings.keys), stop)))


def guarded(settings: ServeSettings, host: str, *, everyone: bool = False) -> ServeSettings:
    """The settings with the names under which a local server may be asked.

    Raises:
        PolymergeError: other machines could ask without a key.
    """
    if _local(host):
        return replace(settings, hosts=(*LOCAL_HOSTS, *settings.hosts))
    if not settings.keys and not everyone:
        raise PolymergeError(
            f"{host}: other machines could use this server without a key; give --api-key-file, or --open if they may"
        )
    return settings


def bundle_router(bundle: Bundle, engine: StreamingEngine, device: str | None = None) -> Routes | None:
    """The bundle's router, which embeds between the running batch's steps; None where the bundle has none.

    Raises:
        RouterError: it is damaged, or was fitted for another bundle.
    """
    from ..router.opening import open_router
    from ..router.record import has_router

    if not has_router(bundle.path):
        return None

    def other(model: str) -> StreamingEngine:
        return BatchingEngine(HFEngine.from_checkpoint(model, device=device))

    return open_router(bundle, lambda: engine, other)


class _Server(uvicorn.Server):
    """Tells when it listens, reads the keys again on SIGHUP, and lets /ready say when it ends."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, on_ready: OnReady) -> None:
        super().__init__(config)
        self._app, self._on_ready = app, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._app.state.keys.reread)
        self._on_ready(self.stop)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._app.state.service.ready = False
        super().handle_exit(sig, frame)

    def stop(self) -> None:
        self.handle_exit(signal.SIGTERM, None)


def run_app(app: FastAPI, place: socket.socket, settings: ServeSettings, on_ready: OnReady) -> None:
    """Answers on a bound socket until a signal, or until what `on_ready` is given is called; then finishes what runs,
    for `drain_seconds` at most. In a thread other than the first, which gets no signals, only the latter ends it."""
    config = uvicorn.Config(
        app,
        http=http_protocol(settings),
        ws="none",
        backlog=BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
        timeout_keep_alive=int(settings.keep_alive_seconds),
    )
    # uvicorn raises the signal that ended it once more when it is done; by then it has been obeyed
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        _Server(config, app, on_ready).run(sockets=[place])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listener(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet: a port that is taken is known before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as unless_bound:
            place = unless_bound.enter_context(socket.socket(family, kind, protocol))
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a token waits for no acknowledgement
            place.bind(address)
            unless_bound.pop_all()
    except (OSError, OverflowError) as error:
        raise PolymergeError(
            f"{host}:{port}: cannot listen there ({getattr(error, 'strerror', None) or error})"
        ) from None
    return place
