"""The vLLM engine for a server: requests come at any time, their answers come piece by piece.

One thread an answer reads vLLM's stream and hands its tokens to an `Answer`, which makes the pieces, finds stop texts
and ends; a connection that is closed makes vLLM stop. Batches and their order are vLLM's own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import DeadlineError, EngineBusyError, EngineDownError, ModelError, PolymergeError
from ...sources.checkpoint import read_json
from ..admission import DEFAULT_LIMITS
from ..answer import Answer
from ..streaming import EngineState, Listener, Stream, StreamRequest, TokenScore
from .api import VllmApi
from .engine import CONCURRENCY, VllmEngine
from .scores import TOKEN_ID, prompt_scores

logger = logging.getLogger(__name__)

HEALTH_SECONDS = 1.0


class VllmStreaming(VllmEngine):
    """A `polymerge.engine.streaming.StreamingEngine` on a running vLLM server.

    Args:
        concurrency: answers at the same time; vLLM may take fewer of them into a batch.

    Attributes:
        max_waiting: requests that wait for a place at most; more are refused.
    """

    def __init__(self, folder: str | Path, api: VllmApi, *, concurrency: int = CONCURRENCY) -> None:
        super().__init__(folder, api, concurrency=concurrency)
        self.max_waiting = DEFAULT_LIMITS.max_waiting
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="polymerge-vllm")
        self._rows = concurrency
        self._answers: set[Answer] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._health = (0.0, True)

    @property
    def state(self) -> EngineState:
        """`restarting` while vLLM does not answer: whoever runs it may start it again."""
        now = time.monotonic()
        if now - self._health[0] > HEALTH_SECONDS:
            self._health = (now, self.api.healthy())
        status: Any = "stopped" if self._closing else "ready" if self._health[1] else "restarting"
        under_way = len(self._answers)
        return EngineState(status, min(under_way, self._rows), max(0, under_way - self._rows))

    def submit(self, requests: Sequence[StreamRequest], listeners: Sequence[Listener]) -> list[Stream]:
        """As in the contract."""
        answers = [self._answer(*pair) for pair in zip(requests, listeners, strict=True)]
        with self._changed:
            if self._closing:
                raise EngineDownError("the engine is stopping")
            if len(self._answers) + len(answers) > self._rows + self.max_waiting:
                raise EngineBusyError(f"{len(self._answers)} requests are under way already; try again later")
            self._answers.update(answers)
        for answer in answers:
            self._pool.submit(self._run, answer)
        return list(answers)

    def close(self, seconds: float | None = None) -> None:
        """As in the contract. The server lives on: it is whoever started it who ends it."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._answers, seconds)
            for answer in self._answers:
                answer.fail(EngineDownError("the engine was stopped before the answer was whole"))
        self._pool.shutdown(wait=seconds is None, cancel_futures=True)

    @cached_property
    def ends(self) -> set[int]:
        """Tokens after which an answer is over."""
        file = self.folder / "generation_config.json"
        listed = read_json(file).get("eos_token_id") if file.exists() else None
        found = listed if isinstance(listed, list) else [listed]
        return {int(token) for token in (*found, self.tokenizer.eos_token_id) if token is not None}

    def _answer(self, request: StreamRequest, listener: Listener) -> Answer:
        asked = request.generate
        prompt = self._ids(asked.prompt)
        if not prompt:
            raise ModelError("generate: the prompt is empty")
        room = self.max_length - len(prompt)
        if room < 1:  # vLLM makes a token even where only scores are wanted
            raise ModelError(f"generate: the prompt has {len(prompt)} tokens, the model's context {self.max_length}")
        self._model(asked.expert)
        if request.score_prompt and self.note.head_adapters:
            raise ModelError(
                "vLLM cannot score prompts of experts with heads (or tied embeddings) of their own; "
                "merge with `embeddings: average` and `lm_head: average`"
            )
        request = replace(request, generate=replace(asked, max_new_tokens=min(asked.max_new_tokens, room)))
        return Answer(request, prompt, listener, ends=self.ends, decode=self.decode)

    def _run(self, answer: Answer) -> None:
        try:
            if not answer.over and answer.request.score_prompt:
                answer.take_prompt(self._scored_prompt(answer))
            elif answer.request.generate.max_new_tokens == 0:
                answer.take_prompt(())
            if not answer.over:
                self._read(answer)
        except PolymergeError as error:
            answer.fail(error)
        except Exception as error:
            logger.exception("an answer of vLLM could not be read")
            answer.fail(ModelError(f"vLLM at {self.api.url}: its answer cannot be read ({type(error).__name__})"))
        finally:
            with self._changed:
                self._answers.discard(answer)
                self._changed.notify_all()

    def _read(self, answer: Answer) -> None:
        """Tokens from vLLM's stream until either side is done."""
        finish = None
        with closing(self._stream(answer)) as chunks:
            for choice in chunks:
                for token, score in self._tokens(choice, answer.request.logprobs):
                    answer.take(token, score)
                if answer.due is not None and time.monotonic() > answer.due:
                    answer.fail(DeadlineError("the answer was not whole in time"))
                if answer.over:
                    return
                finish = choice.get("finish_reason") or finish
        if finish == "stop" and self.ends:  # the end token itself was not in the stream
            answer.take(min(self.ends), None)
        answer.fail(EngineDownError(f"vLLM at {self.api.url} broke off an answer"))

    def _stream(self, answer: Answer) -> Generator[dict[str, Any], None, None]:
        asked = answer.request.generate
        left = None if answer.due is None else answer.due - time.monotonic()
        if left is not None and left <= 0:
            raise DeadlineError("the answer was not whole in time")
        body = self._body(asked, answer.prompt, stop=False) | {"stream": True}
        if answer.request.logprobs is not None:
            body |= {"logprobs": answer.request.logprobs, "return_tokens_as_token_ids": True}
        return self.api.stream(body, timeout=left)

    def _tokens(self, choice: dict[str, Any], logprobs: int | None) -> list[tuple[int, TokenScore | None]]:
        ids: list[int] = choice.get("token_ids") or []
        found = choice.get("logprobs")
        if logprobs is None or not found:
            return [(token, None) for token in ids]
        rows = zip(ids, found["token_logprobs"], found["top_logprobs"] or [{}] * len(ids), strict=True)
        return [(token, self._token_score(token, value, _by_id(top), logprobs)) for token, value, top in rows]

    def _scored_prompt(self, answer: Answer) -> list[TokenScore]:
        count = answer.request.logprobs or 0
        places = prompt_scores(self.api, self._model(answer.request.generate.expert), answer.prompt, count)
        found = [TokenScore(self._text(answer.prompt[0]), None)]
        for token, place in zip(answer.prompt[1:], places[1:], strict=True):
            values = {int(key): float(value["logprob"]) for key, value in place.items()}
            found.append(self._token_score(token, values[token], values, count))
        return found

    def _token_score(self, token: int, logprob: float, values: dict[int, float], count: int) -> TokenScore:
        likeliest = sorted(values.items(), key=lambda item: -item[1])[:count]
        return TokenScore(self._text(token), logprob, tuple((self._text(other), value) for other, value in likeliest))

    def _text(self, token: int) -> str:
        """One token's own text, special ones too."""
        with self._tokenizing:
            text: str = self.tokenizer.decode([token])
            return text


def _by_id(top: dict[str, float] | None) -> dict[int, float]:
    return {int(key.removeprefix(TOKEN_ID)): value for key, value in (top or {}).items()}
