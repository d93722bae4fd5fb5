"""Does the padding token change what a forward pass gives? In most models it does not; some count positions from it.

Tried on a small model of the architecture, with two padding tokens and the same weights. Knows configurations; does not
know experts.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..sources.classes import opener_of
from ..sources.configuration import PADDING, paddings_of
from .small import small_configs

logger = logging.getLogger(__name__)

# Two padding tokens, both among those that are read.
TRIED = (1, 3)
IDS = (4, 3, 5, 1, 6)
TOO_LARGE = 10**9  # parameters, so that a configuration is always made small


def padding_matters(config: Mapping[str, Any]) -> bool:
    """Whether one model with two padding tokens gives two answers. False where no small one can be built: then nothing
    of the architecture is proved, as a merge says.

    Args:
        config: resolved, as `polymerge.sources.configuration.resolved` gives it.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dict(config), default=str))
    return any(_matters(json.dumps(small, sort_keys=True)) for small in small_configs(plain, TOO_LARGE))


@functools.cache
def _matters(settings: str) -> bool:
    small = json.loads(settings)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            one, other = (_answer(padded) for padded in _with_paddings(small))
    except Exception as error:  # it does not fit together, made small
        logger.debug("no small model to try padding on: %s", error)
        return False
    return not torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _with_paddings(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for token in TRIED:
        padded = copy.deepcopy(dict(settings))
        for key in paddings_of(settings):
            *outer, name = key.split(".")
            inner = functools.reduce(lambda part, step: part[step], outer, padded)
            inner[name] = token
        yield {**padded, PADDING: token} if PADDING in settings else padded


def _answer(settings: Mapping[str, Any]) -> Tensor:
    import transformers

    config = transformers.AutoConfig.for_model(**settings)
    torch.manual_seed(0)
    model = opener_of(config).from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():  # embeddings of padding begin as zeros
        if value.is_floating_point() and bool(value.isfinite().all()):
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    answer: Tensor = model(input_ids=torch.tensor([IDS])).logits
    return answer
