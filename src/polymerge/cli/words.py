"""How words on the command line are read: pairs, lists, and a recipe or the experts in its place.

Knows how things are written; what they may be is the library's to say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RecipeError

Base = Annotated[
    str,
    typer.Option(help="Of the average in memory: 16bit as stored, or int8, nf4, int4, fp8 (extra quantized)."),
]
Residuals = Annotated[
    str, typer.Option(help="In memory: decoded; or packed, as stored, which takes a quarter for int4 and is slower.")
]
RecipeOrExperts = Annotated[
    list[str],
    typer.Argument(metavar="RECIPE|NAME=SOURCE...", help="A recipe, a YAML file; or NAME=SOURCE for every expert."),
]
# Keys of a recipe. Given beside a recipe, they count in the place of its own.
Method = Annotated[
    str | None, typer.Option(help="published: code, rate and all else as the published system has them.")
]
CompressRate = Annotated[
    float | None, typer.Option(help="Share of a residual's parameters to drop, over the recipe's; 0.95 is published.")
]
Code = Annotated[
    str | None, typer.Option(help="Of residuals: auto, factors, int8, int4 or entropy, over the recipe's.")
]
Scale = Annotated[str | None, typer.Option(help="per_expert or shared, over the recipe's.")]
DType = Annotated[str | None, typer.Option(help="Of the bundle: float32, bfloat16 or float16, over the recipe's.")]
Embeddings = Annotated[str | None, typer.Option(help="auto, keep, average or compress, over the recipe's.")]
LmHead = Annotated[str | None, typer.Option(help="auto, keep, average or compress, over the recipe's.")]
EmbeddingRate = Annotated[
    float | None, typer.Option(help="Compress rate of embeddings and heads with compress, over the recipe's.")
]
Align = Annotated[str | None, typer.Option(help="permutation, for experts that share no base, over the recipe's.")]
Calibration = Annotated[
    list[str] | None,
    typer.Option(help="NAME=FILE.jsonl, an expert's requests: what counts for them is kept first."),
]
Norms = Annotated[str | None, typer.Option(help="keep or average, over the recipe's; biases count as norms.")]


def read_recipe(words: list[str]) -> Path | dict[str, str]:
    """A recipe's file, or the experts as pairs. Raises RecipeError for a mix of both."""
    if len(words) == 1 and ("=" not in words[0] or Path(words[0]).is_file()):
        return Path(words[0])
    for word in (word for word in words if "=" not in word):
        raise RecipeError(f"{word}: give one recipe, a YAML file, or NAME=SOURCE for every expert, not both")
    return read_pairs(words)


def read_pairs(words: list[str] | None, form: str = "NAME=SOURCE") -> dict[str, str]:
    """["math=path"] -> {"math": "path"}. Raises RecipeError for a word of another form and for a name given twice."""
    pairs: dict[str, str] = {}
    for word in words or ():
        name, separator, value = word.partition("=")
        if not (name and separator and value):
            raise RecipeError(f"{word!r} is not {form}")
        if name in pairs:
            raise RecipeError(f"{name!r} is given twice, as {pairs[name]!r} and {value!r}")
        pairs[name] = value
    return pairs


def read_list(text: str | None) -> list[str] | None:
    """ "a,b" -> ["a", "b"]"""
    return [part.strip() for part in text.split(",")] if text is not None else None


def read_numbers(text: str, option: str) -> list[float]:
    """ "0.9,0.95" -> [0.9, 0.95]. Raises RecipeError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{option} {text!r}: not numbers separated by commas") from None
