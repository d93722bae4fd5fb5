"""The gate between an expert and the fallback: how likely it is that a text belongs to any field, fitted to hold where
users write otherwise than the samples do.

Knows vectors, fields' numbers and topics of the background; what follows from a probability is `cost.py`'s to say.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .calibrate import Floats
from .outside import Outside, calibrate_outside, fit_outside
from .space import Space
from .unseen import Labelled, by_wording, space_of

CLAIMED = 0.5  # a topic of which a larger share is claimed by a field is that field's


class Gate(NamedTuple):
    """A fitted gate, and the probabilities that it, or its like, gave what it had not seen.

    Attributes:
        known: [n], of samples whose wording was kept away.
        strange: [m], of texts of the background whose topic was kept away.
        claimed: numbers of the topics that are left out, because a field claims them unseen.
    """

    outside: Outside
    known: Floats
    strange: Floats
    claimed: tuple[int, ...]


def fit_gate(space: Space, train: Labelled, held: Labelled | None, background: Labelled, seed: int) -> Gate:
    """Fits a gate for vectors in this space, the head's.

    Args:
        background: raw vectors of strangers; its labels are topics, of which there are several. Those of no topic (-1)
            are learned from in every turn, and no field can claim them.
    """
    turns = list(by_wording(train, held, seed))
    inside, outside, topics = [], [], []
    for turn, (fitting, measuring) in enumerate(turns):
        away = (background.labels >= 0) & (background.labels % len(turns) == turn)
        beside = background.take(~away)
        near = space_of(fitting, beside)
        vectors = near(fitting.vectors)
        fitted = fit_outside(vectors, fitting.labels, near(beside.vectors), beside.labels)
        inside.append(fitted.signs(near(measuring.vectors), vectors))
        outside.append(fitted.signs(near(background.vectors[away]), vectors))
        topics.append(background.labels[away])
    known, strange, of_topics = np.concatenate(inside), np.concatenate(outside), np.concatenate(topics)
    claimed = [int(t) for t in np.unique(of_topics) if (strange[of_topics == t, 0] < 0).mean() > CLAIMED]
    strange = strange[~np.isin(of_topics, claimed)]
    kept = background.take(~np.isin(background.labels, claimed))
    final = fit_outside(space(train.vectors), train.labels, space(kept.vectors), kept.labels)
    final = calibrate_outside(final, known, strange)
    return Gate(final, final.known(known), final.known(strange), tuple(claimed))
