"""Which codes there are. A new one is a file beside this and a line here.

Knows names alone: a code's own module, and torch with it, is imported when the code is asked for.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .code import Code

# Name -> "module:maker", in the order in which codes are offered. A maker takes the dtype of the bundle.
CODES = {
    "factors": ".factors:Factors",
    "int8": ".quantised:int8",
    "int4": ".quantised:int4",
    "entropy": ".entropy:entropy",
}
# Those that need no extra: what a search tries unless it is told which.
PLAIN = ("factors", "int8", "int4")
# The published code.
PUBLISHED = "factors"
# What is nearest to a fine-tune at its bytes without an entropy coder (docs/codes.md).
NEAREST = "int4"


def known_code(name: str) -> str:
    """The name itself. Raises ValueError, which says the names there are, where it is none of them."""
    if name in CODES:
        return name
    near = difflib.get_close_matches(name, CODES, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no code {name!r} among {', '.join(CODES)}{hint}")


def code_of(name: str, dtype: torch.dtype) -> Code:
    """The code of a recipe's or a manifest's name, for a bundle of this dtype.

    Raises:
        ValueError: as `known_code`. MissingExtraError: the code needs a package that is not installed.
    """
    module, _, maker = CODES[known_code(name)].partition(":")
    code: Code = getattr(import_module(module, __package__), maker)(dtype)
    return code
