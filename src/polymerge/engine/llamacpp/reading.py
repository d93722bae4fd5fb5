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
                if form_of(answer.request.generate.structure):  # its form is whole: another stream would begin it anew
                    answer.end("stop")
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
        held: list[dict[str, Any]] = []
        with closing(self._api.stream(body, timeout=left)) as events:
            for event in events:
                untold = [] if held else self._untold(answer, event, predicted)
                if untold is None or held:
                    held.append(event)
                else:
                    for token, score in (*((token, None) for token in untold), *_tokens(answer, event)):
                        answer.take(token, score)
                    predicted = event.get("tokens_predicted", predicted)
                if self._is_over(answer):
                    return None
                enough = not held and len(answer.made) - begun >= LEAST_TOKENS
                if enough and aside.is_set() and can_wait(answer.request.generate):
                    return None
                stopped = event.get("stop_type") or stopped
        if held and not self._take_held(answer, held, body, predicted, lora) and stopped == "limit":
            answer.end("length")
        return None if answer.over else stopped

    def _is_over(self, answer: Answer) -> bool:
        if answer.due is not None and time.monotonic() > answer.due:
            answer.fail(DeadlineError("the answer was not whole in time"))
        return answer.over

    def _untold(self, answer: Answer, event: dict[str, Any], predicted: int) -> list[int] | None:
        """Tokens before an event's that had none: llama.cpp streams whole characters, and of their tokens the last.

        Read off the text, where it is spelled as the tokenizer spells it. None: the server must be asked, which takes a
        place of its own there until this answer's stream has ended; so must it for their log-probabilities.
        """
        last, told = bool(event.get("stop")), event.get("tokens") or []
        count = event.get("tokens_predicted", 0) - predicted - (0 if last else len(told))
        if count <= 0:
            return []
        if last or answer.request.logprobs is not None:
            return None
        ids = self._api.tokenize(event["content"])
        return ids[:count] if len(ids) == count + len(told) and ids[count:] == told else None

    def _take_held(
        self, answer: Answer, held: Sequence[dict[str, Any]], body: dict[str, Any], predicted: int, lora: Lora
    ) -> bool:
        """The tokens of events that wait for those before them, read off the same answer once more.

        What is drawn is not always the same beside other requests. Where that answer was another one, characters take
        the tokens that the tokenizer has for them. Returns whether all tokens are those that were drawn.
        """
        left = None if answer.due is None else max(answer.due - time.monotonic(), 0.01)
        until = [event.get("tokens_predicted", predicted) for event in held]
        told = [_tokens(answer, event) for event in held]
        again = self._api.complete({**body, "n_predict": until[-1]}, timeout=left).get("tokens") or []
        alike = len(again) >= until[-1] and again[:predicted] == answer.made[len(answer.made) - predicted :]
        for end, tokens in zip(until, told, strict=True):
            alike = alike and again[end - len(tokens) : end] == [token for token, _ in tokens]
        for event, end, tokens in zip(held, until, told, strict=True):
            if alike:
                new, scored = again[predicted : end - len(tokens)], tokens
            elif end - predicted == len(tokens):
                new, scored = [], tokens
            else:
                new, scored = self._api.tokenize(event.get("content") or ""), []
            for token in new:
                if self._is_over(answer):
                    return alike
                answer.take(token, self._score_of(answer, token, lora))
            for token, score in scored:
                answer.take(token, score)
            predicted = end
        return alike

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
