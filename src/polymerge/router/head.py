"""Everything that is learned from the training vectors: how to compare, which field, and what is unlike all of them.

Knows vectors and numbers of fields; does not know texts, models or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engine.base import FloatArray
from .calibrate import Floats, Ints
from .classify import Arrays, Classifier, Kind, fit_classifier, leaned
from .outside import Outside
from .space import Space
from .unseen import Labelled, space_of


@dataclass(frozen=True)
class Head:
    """Fitted to the training samples' raw vectors.

    Attributes:
        vectors: [n, d], the training samples in the space, of length 1.
        outside: what is unlike all of them; finds nothing unknown until it is calibrated.
    """

    space: Space
    classifier: Classifier
    vectors: FloatArray
    outside: Outside

    def logits(self, raw: FloatArray) -> Floats:
        """[m, fields] of raw vectors [m, d]."""
        return self.classifier.logits(self.space(raw))

    def known(self, raw: FloatArray) -> Floats:
        """[m], probability that raw vectors [m, d] belong to any field."""
        return self.outside.known(self.signs(raw))

    def signs(self, raw: FloatArray) -> Floats:
        """[m, 2], the signs of being unlike all training samples."""
        return self.outside.signs(self.space(raw), self.vectors)

    def nearest(self, raw: FloatArray, count: int) -> tuple[Ints, Floats]:
        """Numbers of the nearest training samples and their cosines, each [m, count], the nearest first."""
        cosines = self.space(raw).astype(np.float64) @ self.vectors.T.astype(np.float64)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        return order, np.take_along_axis(cosines, order, axis=1)

    def to_arrays(self) -> dict[str, FloatArray]:
        """Everything as named arrays, for a file."""
        outside = self.outside
        return {
            "mean": self.space.mean,
            "scale": self.space.scale,
            "axes": self.space.axes,
            "gains": self.space.gains,
            "vectors": self.vectors,
            "outside.weights": outside.weights,
            "outside.bias": outside.bias,
            "outside.fields": np.array([outside.fields], np.float32),
            "outside.calibration": np.array([*outside.mix, outside.middle, outside.slope]),  # float64
            **{f"classifier.{name}": array for name, array in self.classifier.arrays.items()},
        }

    @classmethod
    def from_arrays(cls, kind: Kind, arrays: Arrays) -> Head:
        """The head that `to_arrays` wrote. Raises KeyError where an array is missing."""
        classifier = {
            name.removeprefix("classifier."): a for name, a in arrays.items() if name.startswith("classifier.")
        }
        first, second, middle, slope = map(float, arrays["outside.calibration"])
        weights, bias = arrays["outside.weights"], arrays["outside.bias"]
        fields = int(arrays["outside.fields"][0]) if "outside.fields" in arrays else len(weights)  # before: no topics
        outside = Outside(weights, bias, fields, (first, second), middle, slope)
        none = np.zeros((0, len(arrays["mean"])), np.float32)  # routers of before had no axes
        space = Space(arrays["mean"], arrays["scale"], arrays.get("axes", none), arrays.get("gains", none[:, 0]))
        return cls(space, Classifier(kind, classifier), arrays["vectors"], outside)


def fit_head(kind: Kind, train: Labelled, background: Labelled, beside: Labelled | None = None) -> Head:
    """Fits space and classifier to raw vectors with the numbers of their fields; there is no gate yet.

    Args:
        background: texts by topic. The space is that of all texts: few samples of few fields say little about what is
            common to all.
        beside: what nobody labelled, of every field: a logistic regression leans towards it.
    """
    space, labels = space_of(train, background), train.labels
    vectors = space(train.vectors)
    nothing = np.zeros((1, vectors.shape[1]), np.float32)
    classifier = fit_classifier(kind, vectors, labels)
    if beside is not None and kind == "logistic":
        classifier = leaned(classifier, space(beside.vectors), beside.labels, space(background.vectors))
    return Head(space, classifier, vectors, Outside(nothing, nothing[:, 0], 1))
