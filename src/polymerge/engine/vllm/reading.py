"""One answer of vLLM: its stream of tokens, handed to an `Answer` that makes the pieces, finds stop texts and ends.

So an answer ends, and is counted, as in this process; a connection that is closed makes vLLM stop. Knows vLLM's request
and its stream. Does not know experts, folders or threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

from ...errors import DeadlineError, EngineDownError, ModelError, PolymergeError
from ..answer import Answer
from ..base import GenerateRequest
from ..streaming import TokenScore
from .api import VllmApi
from .scores import TOKEN_ID, prompt_scores

logger = logging.getLogger(__name__)


class Reader:
    """Reads answers from a server.

    Args:
        form: the fields of a request that hold its answer to a form.
    """

    def __init__(self, api: VllmApi, form: Callable[[GenerateRequest], dict[str, Any]]) -> None:
        self._api, self._form = api, form

    def read(self, answer: Answer, model: str) -> None:
        """The whole answer of a served model. What goes wrong is told to the answer."""
        try:
            if not answer.over and answer.request.score_prompt:
                answer.take_prompt(self._scored_prompt(answer, model))
            elif answer.request.generate.max_new_tokens == 0:
                answer.take_prompt(())
            if not answer.over:
                self._take_all(answer, model)
        except PolymergeError as error:
            answer.fail(error)
        except Exception as error:
            logger.exception("an answer of vLLM could not be read")
            answer.fail(ModelError(f"vLLM at {self._api.url}: its answer cannot be read ({type(error).__name__})"))

    def _take_all(self, answer: Answer, model: str) -> None:
        """Tokens from vLLM's stream until either side is done."""
        finish = None
        with closing(self._stream(answer, model)) as chunks:
            for choice in chunks:
                for token, score in _tokens(answer, choice):
                    answer.take(token, score)
                if answer.due is not None and time.monotonic() > answer.due:
                    answer.fail(DeadlineError("the answer was not whole in time"))
                if answer.over:
                    return
                finish = choice.get("finish_reason") or finish
        if finish == "stop" and answer.ends:  # the end token itself was not in the stream
            answer.take(min(answer.ends), None)
        answer.fail(EngineDownError(f"vLLM at {self._api.url} broke off an answer"))

    def _stream(self, answer: Answer, model: str) -> Generator[dict[str, Any], None, None]:
        left = None if answer.due is None else answer.due - time.monotonic()
        if left is not None and left <= 0:
            raise DeadlineError("the answer was not whole in time")
        asked = answer.request.generate
        body = {"model": model, "prompt": answer.prompt, **settings(asked), **self._form(asked)}
        if answer.request.logprobs is not None:
            body |= {"logprobs": answer.request.logprobs, "return_tokens_as_token_ids": True}
        return self._api.stream(body, timeout=left)

    def _scored_prompt(self, answer: Answer, model: str) -> list[TokenScore]:
        count = answer.request.logprobs or 0
        places = prompt_scores(self._api, model, answer.prompt, count)
        scores = [TokenScore(answer.text_of(answer.prompt[:1], True), None)]
        for token, place in zip(answer.prompt[1:], places[1:], strict=True):
            values = {int(key): float(value["logprob"]) for key, value in place.items()}
            scores.append(_score(answer, token, values[token], values))
        return scores


def _tokens(answer: Answer, choice: dict[str, Any]) -> list[tuple[int, TokenScore | None]]:
    ids: list[int] = choice.get("token_ids") or []
    told = choice.get("logprobs")
    if answer.request.logprobs is None or not told:
        return [(token, None) for token in ids]
    rows = zip(ids, told["token_logprobs"], told["top_logprobs"] or [{}] * len(ids), strict=True)
    return [(token, _score(answer, token, value, _by_id(top))) for token, value, top in rows]


def _score(answer: Answer, token: int, logprob: float, values: dict[int, float]) -> TokenScore:
    likeliest = sorted(values.items(), key=lambda item: -item[1])[: answer.request.logprobs or 0]
    top = tuple((answer.text_of([other], True), value) for other, value in likeliest)
    return TokenScore(answer.text_of([token], True), logprob, top)


def settings(request: GenerateRequest) -> dict[str, Any]:
    """What /v1/completions is asked for. Every number is written out: the server's own defaults are the checkpoint's.

    Stop texts are not vLLM's to find: it looks for them without special tokens, and counts otherwise than `Answer`.
    """
    drawn = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    if not request.greedy:
        drawn = {name: getattr(request, name) for name in drawn}
    return {
        **drawn,
        "repetition_penalty": 1.0 if request.repetition_penalty is None else request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        **({"logit_bias": {str(t): v for t, v in request.logit_bias.items()}} if request.logit_bias else {}),
        "ignore_eos": request.ignore_eos,
        "max_tokens": request.max_new_tokens,
        "seed": request.seed,
        "return_token_ids": True,
        "stream": True,
    }


def _by_id(top: dict[str, float] | None) -> dict[int, float]:
    return {int(key.removeprefix(TOKEN_ID)): value for key, value in (top or {}).items()}
