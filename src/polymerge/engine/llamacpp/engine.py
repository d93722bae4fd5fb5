"""The engine for laptops: a llama.cpp server that serves an exported bundle, every expert as a LoRA adapter.

llama.cpp makes batches of requests with the same adapter alone, and lets others wait for the first that runs, so
requests of one expert are brought together here (`turns.py`). It believes nothing: before the first request every
expert must answer a probe as the export says. Hidden states are another engine's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EngineBusyError, EngineDownError, ModelError
from ...sources.persona import Group, Persona
from ..admission import DEFAULT_LIMITS
from ..answer import Answer, Collector, new_answer
from ..base import FloatArray, GenerateRequest, Generation, Pooling, Prompt, Score, ScoreRequest
from ..exported import AVERAGE, check_average, check_probe
from ..grammar import check_held
from ..served import ServedEngine
from ..streaming import EngineState, Listener, Stream, StreamRequest
from .api import LlamaApi
from .folder import TOLERANCE, GgufNote, read_note
from .form import form_of
from .lora import applied_adapter
from .reading import Lora, Reader
from .room import check_room
from .scheduling import Scheduler, Work
from .server import CACHE_TOKENS, ROWS, llama_server

if TYPE_CHECKING:
    pass

HEALTH_SECONDS = 1.0
# (prompts, layers, pooling) -> hidden states, as `Engine.embed` gives them.
Embed = Callable[[Sequence[Prompt], Sequence[int], Pooling], FloatArray]


class LlamaEngine(ServedEngine):
    """A `polymerge.engine.streaming.StreamingEngine` on a running llama.cpp server.

    Args:
        folder: what `polymerge export --to gguf` wrote; tokenizer and references come from there.
        api: of a server that serves this folder.
        rows, cache_tokens: answers at the same time, and tokens in their caches.
        embed: makes hidden states of the average, which llama.cpp's server does not give beside answers.

    Attributes:
        max_waiting: requests that wait for a place at most; more are refused.
    """

    def __init__(
        self, folder: str | Path, api: LlamaApi, *, rows: int = ROWS, cache_tokens: int = CACHE_TOKENS,
        embed: Embed | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.api, self._embed = Path(folder).expanduser(), api, embed
        self.note: GgufNote = read_note(self.folder)
        self.max_waiting = DEFAULT_LIMITS.max_waiting
        self._reader = Reader(api)
        self._scheduler = Scheduler(rows, cache_tokens)
        self._answers: set[Answer] = set()
        self._lock = threading.Lock()
        self._closing = False
        self._health = (0.0, True)

    @property
    def experts(self) -> list[str]:
        """Names of the served experts."""
        return list(self.note.experts)

    @property
    def fingerprint(self) -> str:
        """Changes with the export."""
        return self.note.fingerprint

    @cached_property
    def max_length(self) -> int:
        """The served context of one request, in tokens."""
        served = (self.api.properties().get("default_generation_settings") or {}).get("n_ctx")
        if not served:
            raise ModelError(f"{self.api.url}: the server does not say its n_ctx; is it llama.cpp's?")
        return min(int(served), self.note.context, self._scheduler.cache_tokens)

    @property
    def state(self) -> EngineState:
        """`restarting` while llama.cpp does not answer: whoever runs it may start it again."""
        now = time.monotonic()
        if now - self._health[0] > HEALTH_SECONDS:
            self._health = (now, self.api.healthy())
        status: Any = "stopped" if self._closing else "ready" if self._health[1] else "restarting"
        return EngineState(status, *self._scheduler.counts)

    def _persona(self, expert: str, average: Persona) -> tuple[Persona, tuple[Group, ...]]:
        return self.note.persona(self.folder, expert, average)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """As in the contract; requests of one expert run together, however long the queue is."""
        collectors = [Collector() for _ in requests]
        streams = self._take([StreamRequest(r) for r in requests], collectors, bounded=False)
        return [heard.result(stream.prompt_tokens) for heard, stream in zip(collectors, streams, strict=True)]

    def submit(self, requests: Sequence[StreamRequest], listeners: Sequence[Listener]) -> list[Stream]:
        """As in the contract."""
        return list(self._take(requests, listeners, bounded=True))

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """As in the contract; a call for each token of a continuation."""
        pairs = [self._pair(request) for request in requests]
        texts = [(self._name(r.expert), [*c, *ids], len(c)) for r, (c, ids) in zip(requests, pairs, strict=True)]
        return [
            Score(sum(logprob for logprob, _ in tokens), all(likeliest for _, likeliest in tokens), len(tokens))
            for tokens in self._scored(texts)
        ]

    def embed(
        self, prompts: Sequence[Prompt], *, layers: Sequence[int] = (-1,), pooling: Pooling = "last"
    ) -> FloatArray:
        """As in the contract, by the engine that was given for it. Raises ModelError where none was."""
        if self._embed is None:
            raise ModelError(
                "llama.cpp's server gives no hidden states beside answers; the router needs the bundle itself beside "
                "the export"
            )
        return self._embed(prompts, layers, pooling)

    def close(self, seconds: float | None = None) -> None:
        """As in the contract. The server lives on: it is whoever started it who ends it."""
        self._closing = True
        self._scheduler.drain(seconds)
        with self._lock:
            for answer in self._answers:  # its reader sees it at the next token
                answer.fail(EngineDownError("the engine was stopped before the answer was whole"))
            self._answers.clear()
        self._scheduler.close()

    def check(self) -> None:
        """Compares the served adapters with the export's references: every expert, and the average.

        Raises:
            ModelError: an adapter is missing, in another place, ignored or another one.
        """
        served = [Path(adapter["path"]).parts[-3:] for adapter in self.api.adapters()]
        wanted = [Path(expert.adapter).parts[-3:] for expert in self.note.experts.values()]
        if served != wanted:
            shown = ", ".join("/".join(parts) for parts in served) or "none"
            raise ModelError(
                f"{self.api.url}: serves the adapters {shown}, not those of {self.folder} in their order; start "
                "llama-server as `polymerge export --to gguf` prints"
            )
        tolerance = TOLERANCE[self.note.type]
        probes = {expert: served.probe for expert, served in self.note.experts.items()}
        texts = [(expert, probe.ids, 1) for expert, probe in probes.items()]
        for (expert, probe), scores in zip(probes.items(), self._scored(texts), strict=True):
            check_probe(
                expert, probe, [logprob for logprob, _ in scores], where=self.api.url, runtime="llama.cpp",
                folder=self.folder, tolerance=tolerance,
            )  # fmt: skip
        expert, probe = next(iter(probes.items()))
        scores = next(iter(self._scored([(AVERAGE, probe.ids, 1)])))
        fix = f"does the server run {self.folder}?"
        check_average(probe, [logprob for logprob, _ in scores], where=self.api.url, fix=fix, tolerance=tolerance)

    def _take(self, requests: Sequence[StreamRequest], listeners: Sequence[Listener], *, bounded: bool) -> list[Answer]:
        answers = [self._answer(*pair) for pair in zip(requests, listeners, strict=True)]
        with self._lock:
            if self._closing:
                raise EngineDownError("the engine is stopping")
            if bounded and len(self._answers) + len(answers) > self._scheduler.rows + self.max_waiting:
                raise EngineBusyError(f"{len(self._answers)} requests are under way already; try again later")
            self._answers.update(answers)
        self._scheduler.add([self._work(answer) for answer in answers])
        return answers

    def _answer(self, request: StreamRequest, listener: Listener) -> Answer:
        asked = request.generate
        self._name(asked.expert)
        if asked.structure and asked.structure.kind == "json":
            check_held(asked.structure)  # llama.cpp passes over keywords that it does not hold
        form_of(asked.structure)  # refused here, where whoever asks hears it
        if asked.presence_penalty or asked.frequency_penalty:
            raise ModelError(
                "llama.cpp's presence and frequency penalties count the prompt's tokens too; leave them out"
            )
        ids = self.ids(asked.prompt, asked.expert)
        # llama.cpp keeps a place of the context free
        return new_answer(request, ids, listener, voice=self.voices.of(asked.expert), max_length=self.max_length - 1)

    def _work(self, answer: Answer) -> Work:
        name = self._name(answer.request.generate.expert)

        def run(work: Work) -> bool:
            over = self._reader.read(answer, self._lora(name), work.aside)
            if over:
                with self._lock:
                    self._answers.discard(answer)
            return over

        return Work(name, answer.longest, run)

    def _scored(self, texts: Sequence[tuple[str, Sequence[int], int]]) -> list[list[tuple[float, bool]]]:
        """Log-probability of every token from `start` on, and whether it is the likeliest: (name, ids, start)."""
        results: list[Any] = [None] * len(texts)
        done = [threading.Event() for _ in texts]

        def work_of(number: int) -> Work:
            name, ids, start = texts[number]

            def run(work: Work) -> bool:
                try:
                    results[number] = [self._score(name, ids, place) for place in range(start, len(ids))]
                except Exception as error:  # told to whoever asked
                    results[number] = error
                done[number].set()
                return True

            return Work(name, len(ids) + 1, run)

        self._scheduler.add([work_of(number) for number in range(len(texts))])
        for event in done:
            event.wait()
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def _score(self, name: str, ids: Sequence[int], place: int) -> tuple[float, bool]:
        told = self.api.next_scores(ids[:place], self._lora(name), token=ids[place])
        return float(told["logprob"]), told["top_logprobs"][0]["id"] == ids[place]

    def _lora(self, name: str) -> Lora:
        return applied_adapter(self.experts, name)

    def _name(self, expert: Any) -> str:
        """The name of an expert's turn."""
        if expert is None or expert == AVERAGE:
            return AVERAGE
        if not isinstance(expert, str):
            raise ModelError("llama.cpp serves one expert a request; mixtures need the embedded engine (transformers)")
        if expert not in self.note.experts:
            raise ModelError(f"{self.folder}: no expert {expert!r}; it holds {', '.join(self.experts)}")
        return expert


@contextmanager
def llama_engine(
    folder: str | Path, *, url: str | None = None, api_key: str | None = None, rows: int = ROWS,
    cache_tokens: int = CACHE_TOKENS, embed: Embed | None = None, probe: bool = True,
) -> Iterator[LlamaEngine]:  # fmt: skip
    """An engine for as long as the context lasts, on a server in this process or, with a url, on one that runs already.

    Raises:
        MissingExtraError: the extra `llamacpp` is not installed. ModelError: llama.cpp cannot load the folder or does
            not answer as the export says, or too little memory is free for it.
    """
    if url is None:
        check_room(Path(folder).expanduser(), read_note(folder), cache_tokens)
        with llama_server(folder, rows=rows, cache_tokens=cache_tokens) as served:
            yield from _checked(folder, served, rows, cache_tokens, embed, probe)
        return
    api = LlamaApi(url, api_key=api_key)
    slots = int(api.properties().get("total_slots") or rows)
    yield from _checked(folder, api, min(rows, slots), cache_tokens, embed, probe)


def _checked(
    folder: str | Path, api: LlamaApi, rows: int, cache_tokens: int, embed: Embed | None, probe: bool
) -> Iterator[LlamaEngine]:
    engine = LlamaEngine(folder, api, rows=rows, cache_tokens=cache_tokens, embed=embed)
    try:
        if probe:
            engine.check()
        engine.encode("")  # the tokenizer is there before the first request
        yield engine
    finally:
        engine.close(0)
