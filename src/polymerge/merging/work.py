"""What answering shall do at once, and on which GPU: what `plan` is asked about beside the recipe.

Knows numbers as users write them. Does not know what a bundle takes (`polymerge.merging.footprint`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RecipeError
from ..host import gpu_memory
from ..recipe.numbers import no_switch, parse_size

# Of a GPU's memory, what weights and caches may take: activations, kernels and what torch keeps need the rest.
USABLE = 0.9
# Tokens that are in work at once: the engine's batches hold so many, or one text of the model's whole context.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Work:
    """How long conversations are, how many go on at once, and where.

    Attributes:
        context: tokens of one conversation; None for the model's own, and at least a batch of the engine.
        requests: conversations at once.
        gpu: bytes of its memory; None where none was named.
    """

    context: int | None = None
    requests: int = 1
    gpu: int | None = None

    @property
    def usable(self) -> int | None:
        """Bytes of the GPU for weights and caches."""
        return None if self.gpu is None else int(USABLE * self.gpu)

    def tokens(self, longest: int) -> int:
        """Of all conversations together, for a model that reads at most `longest` tokens (0: not known)."""
        if self.context is None:
            return self.requests * max(BATCH_TOKENS, longest)
        return self.requests * (min(self.context, longest) if longest else self.context)


def work_of(gpu: int | str | None, context: int | None, requests: int) -> Work:
    """As the command line has it.

    Args:
        gpu: bytes, a text such as `24GB`, or `auto` for this machine's.

    Raises:
        RecipeError: a number that is none. DeviceError: `auto`, and no GPU is here.
    """
    if requests < 1 or (context is not None and context < 1):
        raise RecipeError("context and requests: whole numbers from 1 on")
    if gpu == "auto":
        return Work(context, requests, gpu_memory())
    try:
        size = parse_size(no_switch(gpu))
    except ValueError as error:
        raise RecipeError(f"gpu: {error}, or auto") from None
    if size is not None and size < 1:
        raise RecipeError(f"gpu: {gpu} is no memory; write it as 24GB, or auto")
    return Work(context, requests, size)
