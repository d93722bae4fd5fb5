"""One answer of llama.cpp: its stream of tokens, handed to an `Answer` that makes the pieces and finds its end.

An answer that is set aside goes on later from the tokens that it has. Knows llama.cpp's request and its stream. Does
not know folders or threads.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from ...errors import DeadlineError, EngineDownError, ModelError, PolymergeError
from ..answer import Answer
from ..base import GenerateRequest
from ..streaming import TokenScore
from .api import LlamaApi
from .form import form_of

logger = logging.getLogger(__name__)

Lora = list[dict[str, Any]]
# An answer is set aside after so many tokens of a turn at the earliest: whoever goes on must read all of it again.
LEAST_TOKENS = 64


def can_wait(request: GenerateRequest) -> bool:
    """Whether an answer may be set aside: a draw with a seed would not go on with the numbers that it had,
    nor a form where it was."""
    return (request.greedy or request.seed is None) and request.structure is None


class Reader:
    """Reads answers from a server."""

    def __init__(self, api: LlamaApi) -> None:
        self._api = api

    def read(self, answer: Answer, lora: Lora, aside: threading.Event) -> bool:
        """The answer, to its end or until it is set aside; whether it is over. What goes wrong is told to it."""
        try:
            if not answer.made and not answer.over:
                self._take_prompt(answer, lora)
            begun = len(answer.made)
            while not answer.over:
                before = len(answer.made)
                stopped = self._take_some(answer, lora, aside, begun)
                if stopped is None:
                    return answer.over
                if stopped != "eos" or len(answer.made) == before:
                    raise EngineDownError(f"llama.cpp at {self._api.url} broke off an answer")
                # it ends at every token that it takes for an end; the checkpoint, or the request, may not
        except PolymergeError as error:
            answer.fail(error)
        except Exception as error:
            logger.exception("an answer of llama.cpp could not be read")
            answer.fail(ModelError(f"{self._api.url}: llama.cpp's answer cannot be read ({type(error).__name__})"))
        return True

    def _take_prompt(self, answer: Answer, lora: Lora) -> None:
        if answer.request.score_prompt:
            answer.take_prompt(self._scored_prompt(answer, lora))
        elif answer.request.generate.max_new_tokens == 0:
            answer.take_prompt(())

    def _take_some(self, answer: Answer, lora: Lora, aside: threading.Event, begun: int) -> str | None:
        """One stream's tokens. Returns why llama.cpp ended it, or None: the answer is over, or was set aside."""
        left = None if answer.due is None else answer.due - time.monotonic()
        if left is not None and left <= 0:
            raise DeadlineError("the answer was not whole in time")
        stopped, predicted, body = "broken", 0, self._body(answer, lora)
        with closing(self._api.stream(body, timeout=left)) as events:
            for event in events:
                for token in self._untold(answer, event, body, predicted):
                    answer.take(token, self._score_of(answer, token, lora))
                for token, score in _tokens(answer, event):
                    answer.take(token, score)
                predicted = event.get("tokens_predicted", predicted)
                if answer.due is not None and time.monotonic() > answer.due:
                    answer.fail(DeadlineError("the answer was not whole in time"))
                if answer.over:
                    return None
                enough = len(answer.made) - begun >= LEAST_TOKENS
                if enough and aside.is_set() and can_wait(answer.request.generate):
                    return None
                stopped = event.get("stop_type") or stopped
        return stopped

    def _untold(self, answer: Answer, event: dict[str, Any], body: dict[str, Any], predicted: int) -> list[int]:
        """Tokens before an event's that had none: llama.cpp streams whole characters, and of their tokens the last.

        The others are read off the text; where it ends before the character is whole, off the same answer once more.
        """
        last = bool(event.get("stop"))
        told = [] if last else event.get("tokens") or []
        count = event.get("tokens_predicted", 0) - predicted - len(told)
        if count <= 0:
            return []
        if last:
            whole = self._api.complete({**body, "n_predict": predicted + count}).get("tokens") or []
            return list(whole[predicted:])
        ids = self._api.tokenize(event["content"])
        return ids[-count - len(told) : -len(told)] if ids[-len(told) :] == told else ids[:-1]

    def _score_of(self, answer: Answer, token: int, lora: Lora) -> TokenScore | None:
        count = answer.request.logprobs
        if count is None:
            return None
        return _score(answer, self._api.next_scores(answer.tokens, lora, token=token, count=count), count)

    def _body(self, answer: Answer, lora: Lora) -> dict[str, Any]:
        asked = answer.request.generate
        body = {"prompt": answer.tokens, "lora": lora, **settings(asked)}
        body["n_predict"] = asked.max_new_tokens - len(answer.made)
        body["seed"] = secrets.randbelow(2**32 - 1) if body["seed"] == -1 else body["seed"]  # it may be asked twice
        body["repeat_last_n"] = answer.longest if body["repeat_penalty"] != 1.0 else 0  # 0 looks at none
        if answer.request.logprobs is not None:
            body["n_probs"] = max(answer.request.logprobs, 1)
        return body

    def _scored_prompt(self, answer: Answer, lora: Lora) -> list[TokenScore]:
        count = answer.request.logprobs or 0
        scores = [TokenScore(answer.text_of(answer.prompt[:1], True), None)]
        for place in range(1, len(answer.prompt)):
            token = answer.prompt[place]
            told = self._api.next_scores(answer.prompt[:place], lora, token=token, count=count)
            scores.append(_score(answer, told, count))
        return scores


def _tokens(answer: Answer, event: dict[str, Any]) -> list[tuple[int, TokenScore | None]]:
    count = answer.request.logprobs
    told: Sequence[dict[str, Any]] = event.get("completion_probabilities") or ()
    if count is not None and told and not event.get("stop"):
        return [(entry["id"], _score(answer, entry, count)) for entry in told]
    return [(token, None) for token in event.get("tokens") or ()] if not event.get("stop") else []


def _score(answer: Answer, told: dict[str, Any], count: int) -> TokenScore:
    top = tuple(
        (answer.text_of([entry["id"]], True), float(entry["logprob"])) for entry in told["top_logprobs"][:count]
    )
    return TokenScore(answer.text_of([told["id"]], True), float(told["logprob"]), top)


def settings(request: GenerateRequest) -> dict[str, Any]:
    """What /completion is asked for: the samplers in the order of `engine/sampling.py`, and all others off.

    Stop texts are not llama.cpp's to find: it looks for them without special tokens, and counts otherwise than
    `Answer`.
    """
    drawn = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    if not request.greedy:
        drawn = {name: getattr(request, name) for name in drawn}
    return {
        **drawn,
        "samplers": ["penalties", "temperature", "min_p", "top_k", "top_p"],
        "repeat_penalty": 1.0 if request.repetition_penalty is None else request.repetition_penalty,
        "seed": -1 if request.seed is None else request.seed % 2**32,
        "logit_bias": [[token, value] for token, value in request.logit_bias.items()],
        **form_of(request.structure),
        "return_tokens": True,
        "cache_prompt": True,
    }
