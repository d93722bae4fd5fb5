"""The engine for scale: a vLLM server that serves an exported bundle, every expert as a LoRA model of its own.

vLLM batches, schedules and distributes; this module speaks its API in the words of the contract, and believes nothing:
an adapter that a server ignores answers like the average, so before the first request every expert must answer a probe
as the export says. Hidden states are not to be had from a server that generates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

from ...errors import ModelError
from ...sources.checkpoint import read_json
from ...sources.persona import Group, Persona, read_persona
from ..answer import Answer, Collector, new_answer
from ..base import FloatArray, GenerateRequest, Generation, Pooling, Prompt, Score, ScoreRequest
from ..exported import AVERAGE, check_average, check_probe
from ..grammar import Grammars
from ..served import ServedEngine
from ..streaming import Listener, StreamRequest
from .api import VllmApi
from .folder import VllmNote, read_note
from .form import form_of
from .reading import Reader
from .scores import Place, Scored, score_text, score_token
from .server import VllmServer

# Requests in flight: vLLM's own batches are made of what has arrived, by default of 256 sequences at most.
CONCURRENCY = 256
Item = TypeVar("Item")
Result = TypeVar("Result")


class VllmEngine(ServedEngine):
    """An `Engine` on a running vLLM server. `connect` makes one and probes it; `vllm_engine` starts a server too.

    Args:
        folder: what `polymerge export --to vllm` wrote; tokenizer and references come from there.
        api: of a server that serves this folder.
        guided: whether it is known to hold answers by llguidance, as one that is started here does.
    """

    def __init__(
        self, folder: str | Path, api: VllmApi, *, concurrency: int = CONCURRENCY, guided: bool = False
    ) -> None:
        self.folder, self.api = Path(folder).expanduser(), api
        self.note: VllmNote = read_note(self.folder)
        self._concurrency = concurrency
        self._reader = Reader(api, self._form)
        self._grammars = Grammars(0) if guided else None

    @classmethod
    def connect(
        cls, folder: str | Path, url: str, *, api_key: str | None = None, concurrency: int = CONCURRENCY,
        guided: bool = False,
    ) -> Self:  # fmt: skip
        """An engine on a server that runs already.

        Raises:
            BundleError: not an exported folder. ModelError: the server does not answer, lacks an expert, or an expert
                does not answer as the export says.
        """
        engine = cls(folder, VllmApi(url, api_key=api_key), concurrency=concurrency, guided=guided)
        engine.check()
        return engine

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
        """The served context, in tokens."""
        length = next((m.get("max_model_len") for m in self.api.models() if m.get("max_model_len")), None)
        if length is None:
            raise ModelError(f"{self.api.url}: the server does not say its max_model_len; is it vLLM?")
        return int(length)

    def _average_persona(self) -> Persona:
        config = self.folder / "config.json"
        return read_persona(self.folder, read_json(config) if config.is_file() else {})

    @property
    def tokenizer(self) -> Any:
        """The bundle's."""
        return self.voices.average.tokenizer

    def _persona(self, expert: str, average: Persona) -> tuple[Persona, tuple[Group, ...]]:
        return self.note.persona(self.folder, expert, average)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """As in the contract; vLLM makes its batches of requests for different experts."""
        collectors = [Collector() for _ in requests]
        answers = [self.answer(StreamRequest(r), heard) for r, heard in zip(requests, collectors, strict=True)]
        self._all(lambda answer: self._reader.read(answer, self._model(answer.request.generate.expert)), answers)
        return [heard.result(len(answer.prompt)) for heard, answer in zip(collectors, answers, strict=True)]

    def answer(self, request: StreamRequest, listener: Listener) -> Answer:
        """An answer that is ready to be read. Raises ModelError for a request that vLLM cannot answer."""
        asked = request.generate
        self._model(asked.expert)
        self._form(asked)  # refused here, where whoever asks hears it
        if request.score_prompt and self.note.head_adapters:
            raise ModelError(
                "vLLM cannot score prompts of experts with heads (or tied embeddings) of their own; "
                "merge with `embeddings: average` and `lm_head: average`"
            )
        return new_answer(
            request,
            self.ids(asked.prompt, asked.expert),
            listener,
            voice=self.voices.of(asked.expert),
            spare=1,  # vLLM makes a token even where only scores are wanted
        )

    def _form(self, request: GenerateRequest) -> dict[str, Any]:
        """The form of its answer in vLLM's words. Raises ModelError for one that llguidance is to hold and cannot."""
        if self._grammars is None or request.structure is None:
            return form_of(request.structure)
        voice = self.voices.of(request.expert)
        self._grammars.matcher(request.structure, voice)  # names what cannot be held, as vLLM does not
        with voice.lock:
            return form_of(request.structure, voice.tokenizer)

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """As in the contract. One token less of the context fits: vLLM always makes one."""
        pairs = [(self._model(request.expert), *self._pair(request)) for request in requests]
        texts = self._scores([(model, [*context, *ids], len(context)) for model, context, ids in pairs])
        return [
            Score(sum(s.logprob for s in tokens), all(s.is_likeliest for s in tokens), len(tokens)) for tokens in texts
        ]

    def embed(
        self, prompts: Sequence[Prompt], *, layers: Sequence[int] = (-1,), pooling: Pooling = "last"
    ) -> FloatArray:
        """Always raises ModelError: the router needs another engine beside this one."""
        raise ModelError(
            "a vLLM server that generates gives no hidden states; the router needs the embedded engine "
            "(transformers) or an embedding server for its embeddings"
        )

    def check(self) -> None:
        """Compares the served models with the export's references: every expert, then the average.

        Raises:
            ModelError: a model is missing, ignored or another one.
        """
        served = {model.get("id") for model in self.api.models()}
        missing = [name for name in (*self.experts, AVERAGE) if name not in served]
        if missing:
            raise ModelError(
                f"{self.api.url} does not serve {', '.join(missing)}; start vLLM with the arguments that "
                "`polymerge export --to vllm` prints"
            )
        probes = {expert: served.probe.ids for expert, served in self.note.experts.items()}
        experts = self._scores([(expert, ids, 1) for expert, ids in probes.items()])
        for expert, scores in zip(probes, experts, strict=True):
            self._compare(expert, [score.logprob for score in scores])
        # the average last: by then every slot that will be taken is taken
        for expert, scores in zip(probes, self._scores([(AVERAGE, ids, 1) for ids in probes.values()]), strict=True):
            self._compare_average(expert, [score.logprob for score in scores])

    def _compare(self, expert: str, logprobs: Sequence[float]) -> None:
        probe = self.note.experts[expert].probe
        check_probe(expert, probe, logprobs, where=self.api.url, runtime="vLLM", folder=self.folder)

    def _compare_average(self, expert: str, logprobs: Sequence[float]) -> None:
        fix = f"does the server run {self.folder}, with --max-loras {len(self.experts) + 1} or more?"
        check_average(self.note.experts[expert].probe, logprobs, where=self.api.url, fix=fix)

    def _scores(self, items: Sequence[tuple[str, Sequence[int], int]]) -> list[list[Scored]]:
        """Every token of the texts from `start` on: (model, ids, start)."""
        if not self.note.head_adapters:
            return self._all(lambda item: score_text(self.api, *item), items)
        places = [Place(model, ids[:n], ids[n]) for model, ids, start in items for n in range(start, len(ids))]
        scores = iter(self._all(lambda place: score_token(self.api, place), places))
        return [[next(scores) for _ in range(start, len(ids))] for _, ids, start in items]

    def _model(self, expert: Any) -> str:
        """The served name of an expert."""
        if expert is None or expert == AVERAGE:
            return AVERAGE
        if not isinstance(expert, str):
            raise ModelError("vLLM serves one expert a request; mixtures need the embedded engine (transformers)")
        if expert not in self.note.experts:
            raise ModelError(f"{self.folder}: no expert {expert!r}; it holds {', '.join(self.experts)}")
        return expert

    def _all(self, call: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """All calls at once, as many as may be in flight; results in the order of the items."""
        if len(items) < 2:
            return [call(item) for item in items]
        with ThreadPoolExecutor(min(self._concurrency, len(items))) as pool:
            return list(pool.map(call, items))


Kind = TypeVar("Kind", bound=VllmEngine)


@contextmanager
def vllm_engine(
    folder: str | Path,
    *,
    url: str | None = None,
    extra: Sequence[str] = (),
    python: str | None = None,
    api_key: str | None = None,
    say: Callable[[str], None] | None = None,
    kind: type[Kind] = VllmEngine,  # type: ignore[assignment]
) -> Iterator[Kind]:
    """An engine for as long as the context lasts, on a server of its own or, with a url, on one that runs already.

    Args:
        folder, extra, python, say: as for `VllmServer`.
        kind: VllmEngine, or `polymerge.engine.vllm.streaming.VllmStreaming` for a server.

    Raises:
        ModelError: the server does not start or does not answer as the export says.
    """
    if url is not None:
        yield kind.connect(folder, url, api_key=api_key)
        return
    with VllmServer(folder, extra=extra, python=python, say=say) as server:
        yield kind.connect(folder, server.url, api_key=api_key, guided=server.guided)
