"""How likely a served model finds tokens: one call for a whole text, or one call a token.

vLLM 0.32 takes the log-probabilities of a prompt from all its tokens at once, but looks its adapter up as if there were
one token a request: with an adapter on the output head, a batch of two such requests ends the server (on a CPU; lone
requests are right). Where there is such an adapter, every token is therefore scored as a generation of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...errors import ModelError
from .api import VllmApi

TOKEN_ID = "token_id:"


class Scored(NamedTuple):
    """log p(token | what stands before it) in nats, and whether no token is likelier."""

    logprob: float
    is_likeliest: bool


class Place(NamedTuple):
    """A token to be scored: of which model, after which tokens."""

    model: str
    before: Sequence[int]
    token: int


def score_text(api: VllmApi, model: str, ids: Sequence[int], start: int) -> list[Scored]:
    """Tokens `start` and following of a text, in one call."""
    places = prompt_scores(api, model, ids)[start:]
    entries = [place[str(token)] for place, token in zip(places, ids[start:], strict=True)]
    return [Scored(float(entry["logprob"]), entry["rank"] == 1) for entry in entries]


def score_token(api: VllmApi, place: Place) -> Scored:
    """One token, as the only one that is generated."""
    body = {
        "model": place.model,
        "prompt": list(place.before),
        "max_tokens": 1,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": 1,
        "logprob_token_ids": [place.token],
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }
    choice = api.complete(body)["choices"][0]
    top = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]
    logprob = top[0].get(f"{TOKEN_ID}{place.token}")
    if logprob is None:
        raise ModelError(f"{api.url}: the server does not tell a token's log-probability; is it vLLM 0.32 or newer?")
    return Scored(float(logprob), choice["token_ids"][:1] == [place.token])


def prompt_scores(api: VllmApi, model: str, ids: Sequence[int], count: int = 0) -> list[Any]:
    """For every token of a prompt but the first: token id (as text) -> log-probability and rank, with so many of the
    likeliest tokens."""
    body = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": count}
    scores = api.complete(body)["choices"][0].get("prompt_logprobs")
    if not isinstance(scores, list) or len(scores) != len(ids):
        raise ModelError(f"{api.url}: the server gives no prompt_logprobs; is it vLLM?")
    return scores
