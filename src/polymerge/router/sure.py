"""How sure every expert is of its answer to a request: what tells fields apart that nobody described.

An expert knows how to answer what it was trained on, and guesses elsewhere: measured in docs/log-router.md. Knows
requests and likelihoods; does not know vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..engine.base import Engine, GenerateRequest, ScoreRequest
from .calibrate import Floats
from .embed import Progress

TOKENS = 1  # of an answer
TOGETHER = 32  # texts that all experts are asked about at once
UNSURE = -20.0  # nats: of an answer that has no text


def sureness(engine: Engine, texts: Sequence[str], experts: Sequence[str], progress: Progress | None = None) -> Floats:
    """[texts, experts]: log-probability of the likeliest beginning of an expert's answer, against its other answers."""
    likely: list[Floats] = []
    for start in range(0, len(texts), TOGETHER):
        likely.append(_begun(engine, texts[start : start + TOGETHER], experts))
        if progress:
            progress(min(start + TOGETHER, len(texts)), len(texts))
    return against_others(np.concatenate(likely))


def against_others(likely: Floats) -> Floats:
    """[texts, ...]: how many spreads a text is over the mean of all texts."""
    over: Floats = (likely - likely.mean(axis=0)) / np.maximum(likely.std(axis=0), 1e-9)
    return over


def _begun(engine: Engine, texts: Sequence[str], experts: Sequence[str]) -> Floats:
    """[texts, experts], in nats a token."""
    asked = [(engine.chat_prompt([{"role": "user", "content": t}], expert=e), e) for t in texts for e in experts]
    begun = engine.generate([GenerateRequest(prompt, expert, TOKENS) for prompt, expert in asked])
    answers = [engine.encode(answer.text, special=False, expert=e) for answer, (_, e) in zip(begun, asked, strict=True)]
    likely = np.full(len(asked), UNSURE)
    told = [n for n, answer in enumerate(answers) if answer]
    scores = engine.loglikelihood([ScoreRequest(asked[n][0], answers[n], asked[n][1]) for n in told])
    likely[told] = [score.log_likelihood / score.tokens for score in scores]
    return likely.reshape(len(texts), len(experts))
