"""Everything that is learned from the training vectors: how to compare, which field, and what is unlike all of them.

Knows vectors and numbers of fields; does not know texts, models or files.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ..engine.base import FloatArray
from .calibrate import Floats, Ints
from .classify import Arrays, Classifier, Kind, fit_classifier
from .outside import Outside, strangeness
from .space import Space, fit_space


@dataclass(frozen=True)
class Head:
    """Fitted to the training samples' raw vectors.

    Attributes:
        vectors: [n, d], the training samples in the space, of length 1.
        outside: how distances become probabilities; says nothing until it is calibrated.
    """

    space: Space
    classifier: Classifier
    vectors: FloatArray
    outside: Outside = field(default_factory=Outside)

    def logits(self, raw: FloatArray) -> Floats:
        """[m, fields] of raw vectors [m, d]."""
        return self.classifier.logits(self.space(raw))

    def known(self, raw: FloatArray) -> Floats:
        """[m], probability that raw vectors [m, d] belong to any field."""
        return self.outside.known(strangeness(self.space(raw), self.vectors))

    def nearest(self, raw: FloatArray, count: int) -> tuple[Ints, Floats]:
        """Numbers of the nearest training samples and their cosines, each [m, count], the nearest first."""
        cosines = self.space(raw).astype(np.float64) @ self.vectors.T.astype(np.float64)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        return order, np.take_along_axis(cosines, order, axis=1)

    def with_outside(self, outside: Outside) -> Head:
        """The same head with calibrated distances."""
        return replace(self, outside=outside)

    def to_arrays(self) -> dict[str, FloatArray]:
        """Everything as named arrays, for a file."""
        own = {"mean": self.space.mean, "scale": self.space.scale, "vectors": self.vectors}
        outside = np.array([self.outside.middle, self.outside.slope])
        return {**own, "outside": outside, **{f"classifier.{name}": a for name, a in self.classifier.arrays.items()}}

    @classmethod
    def from_arrays(cls, kind: Kind, arrays: Arrays) -> Head:
        """The head that `to_arrays` wrote. Raises KeyError where an array is missing."""
        own = {name.removeprefix("classifier."): a for name, a in arrays.items() if name.startswith("classifier.")}
        middle, slope = map(float, arrays["outside"])
        space = Space(arrays["mean"], arrays["scale"])
        return cls(space, Classifier(kind, own), arrays["vectors"], Outside(middle, slope))


def fit_head(kind: Kind, raw: FloatArray, labels: Ints) -> Head:
    """Fits space and classifier to raw vectors [n, d] with the numbers of their fields [n]."""
    space = fit_space(raw)
    vectors = space(raw)
    return Head(space, fit_classifier(kind, vectors, labels), vectors)
