"""Which expert should answer: the router, how it is fitted, and how good it is.

route.py       what a router answers
router.py      the router
record.py      a router on disk, in the bundle's folder router/
opening.py     a router with the engine that embeds for it
embed.py       texts as vectors: alignment prompt, layer, pooling
space.py       what is done to a vector before it is compared
classify.py    vectors to fields: logistic regression, nearest centroid, k nearest neighbours
outside.py     how unlike all training samples a vector is
head.py        the three above, fitted to one set of samples
calibrate.py   temperature, calibration error, thresholds
fit.py         samples to a router
training.py    a folder of data to a router in the bundle
table.py       fields to experts; samples labelled by the experts themselves
samples.py     labelled samples and their files
evaluation.py  a router measured
picture.py     the embeddings in the plane
"""

from .route import Neighbour, Route, Routes

__all__ = ["Neighbour", "Route", "Routes"]
