"""The staged response: a thinker reasons, the bundle writes the answer.

thought.py     what a thinker gives back
thinker.py     a model that thinks, in this process
endpoint.py    ... or behind an OpenAI-compatible endpoint
formatter.py   the bundle answers, or scores choices
templates.py   the prompts of both
evidence.py    where thinking helped on validation data
pipeline.py    route, decide, think, answer
opening.py     a pipeline from a bundle's folder, a thinker from its settings
validation.py  measures direct answers and both versions of the prompts
"""

from .evidence import Evidence
from .formatter import Question
from .opening import open_thinker
from .pipeline import Pipeline, Response
from .thinker import LocalThinker, Thinker
from .thought import Thought

__all__ = ["Evidence", "LocalThinker", "Pipeline", "Question", "Response", "Thinker", "Thought", "open_thinker"]
