"""Which expert should answer.

route.py   what a router answers
"""

from .route import Neighbour, Route, Routes

__all__ = ["Neighbour", "Route", "Routes"]
