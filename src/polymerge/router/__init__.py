"""Which expert should answer: the router, how it is fitted, and how good it is.

route.py       what a router answers
router.py      the router
record.py      a router on disk, in the bundle's folder router/
opening.py     a router with the engine that embeds for it
embed.py       texts as vectors: alignment prompt, layer, pooling
space.py       what is done to a vector before it is compared
classify.py    vectors to fields: logistic regression, nearest centroid, k nearest neighbours
background.py  texts of many topics that stand for requests of no field
outside.py     how unlike all training samples a vector is
head.py        how to compare, which field, and what is outside, fitted to one set of samples
unseen.py      splits into what a fit sees and what is kept away from it
gate.py        the probability of being known, weighed where wording is new
cost.py        how sure is sure enough, by what an expert gains and loses
calibrate.py   temperature, calibration error, thresholds
fit.py         samples to a router
feedback.py    a router that learns from use
training.py    a folder of data to a router in the bundle
table.py       fields to experts; samples labelled by the experts themselves
samples.py     labelled samples and their files
evaluation.py  a router measured
picture.py     the embeddings in the plane
"""

from .route import Neighbour, Route, Routes

__all__ = ["Neighbour", "Route", "Routes"]
