"""The bundle as a torch model in which every row of a batch has its own expert.

assignment.py  which expert speaks for which row
linear.py      a linear layer under an assignment
own.py         modules of which experts have their own parameters
moe.py         fused mixture-of-experts blocks
loading.py     from a bundle's files to these modules
mixed.py       the model that a caller sees
"""

from .assignment import Experts, RowExpert
from .loading import load_model
from .mixed import MixedModel

__all__ = ["Experts", "MixedModel", "RowExpert", "load_model"]
