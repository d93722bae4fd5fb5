"""Requests of the kinds that experts are made for: what stands in for a field's own where nobody labelled any.

The alignment prompt ends where the name of a field would follow. So the words of a field's description are looked up
there, after each of the package's requests, and a field's samples are those whose next word they are, more than any
other field's. The requests are in kinds.txt, by kind; none of them is part of the background, so they are strangers to
no field. Knows texts and likelihoods; does not know vectors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from ..engine.base import Engine, ScoreRequest
from .background import by_topic
from .calibrate import Floats
from .described import described_samples
from .embed import Embedder, EmbedSettings, Progress
from .samples import Sample
from .sure import against_others, sureness

FILE = Path(__file__).with_name("kinds.txt")
MOST = 18  # requests of a field (docs/log-router.md)
# Words of a description that say nothing of what it is about.
SILENT = (
    "a an the of to in on for and or as at by with who whom which that what when where how be is are it its into out "
    "up does do so not"
)


@cache
def kinds() -> tuple[Sample, ...]:
    """The requests, with their kind in the place of a field."""
    return by_topic(FILE)


def made_samples(
    engine: Engine, descriptions: Mapping[str, str], *, experts: Engine | None = None, progress: Progress | None = None
) -> list[Sample]:
    """What stands in for labelled samples: a description's sentences, and the requests that are alike.

    Args: as `alike_samples`.
    """
    if not descriptions:
        return []
    return [
        *described_samples(descriptions),
        *alike_samples(engine, descriptions, experts=experts, progress=progress),
    ]


def alike_samples(
    engine: Engine,
    descriptions: Mapping[str, str],
    requests: Sequence[Sample] | None = None,
    *,
    experts: Engine | None = None,
    progress: Progress | None = None,
) -> list[Sample]:
    """At most MOST requests of every field, none of them of two: those that its words fit best, and fit best of all
    fields. What fits a request's whole kind counts as much as what fits it alone.

    Args:
        requests: to pick from, by kind; by default `kinds()`.
        experts: what has an expert of every field, where nothing but their names is known: a request fits the expert
            that is surest of its answer. One alone has nobody to be surer than, and its name is looked up as words are.
    """
    requests = kinds() if requests is None else requests
    texts = [request.text for request in requests]
    if experts is not None and len(descriptions) > 1:
        fits = sureness(experts, texts, list(descriptions), progress)
    else:
        fits = _fits(engine, texts, list(descriptions.values()))
    names = np.array([request.field for request in requests])
    for name in np.unique(names):
        fits[names == name] += fits[names == name].mean(axis=0)
    samples = []
    for number, field in enumerate(descriptions):
        others = np.delete(fits, number, axis=1)
        lead = fits[:, number] - (others.max(axis=1) if others.shape[1] else 0.0)
        best = [n for n in np.argsort(-lead, kind="stable")[:MOST] if lead[n] > 0]
        samples += [Sample(requests[n].text, field) for n in best]
    return samples


def _fits(engine: Engine, texts: Sequence[str], descriptions: Sequence[str]) -> Floats:
    """[texts, descriptions]: how likely a description's words are after the published prompt, each against what it is
    after the other texts. A word is its first token."""
    of_words = [[engine.encode(f" {word}", special=False)[0] for word in spoken(words)] for words in descriptions]
    tokens = sorted({token for words in of_words for token in words})
    prompts, _ = Embedder(engine, EmbedSettings()).prompts(texts)
    scores = engine.loglikelihood([ScoreRequest(prompt, [token]) for prompt in prompts for token in tokens])
    likely = against_others(np.array([score.log_likelihood for score in scores]).reshape(len(texts), len(tokens)))
    return np.stack([likely[:, [tokens.index(token) for token in words]].mean(axis=1) for words in of_words], axis=1)


def spoken(description: str) -> list[str]:
    """The words of a description that say what it is about; all of them where none does."""
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)?", description.lower())
    silent = SILENT.split()
    return [word for word in words if word not in silent] or words or [description.strip()]
