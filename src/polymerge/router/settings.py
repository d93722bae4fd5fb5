"""How a router is fitted, as checked settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..engine.base import Engine
from ..errors import RouterError, first_problem
from .classify import Kind
from .embed import ALIGNMENT_PROMPT, CHAT_MARKS, PROMPTS, TASK_PROMPT, EmbedSettings

# Labelled samples of a field: from ENOUGH on nothing stands in for them, and below FEW the task prompt names more
# fields rightly, while the gate is as good (docs/log-router.md).
ENOUGH, FEW = 2, 16


class FitSettings(BaseModel):
    """How a router is fitted.

    Attributes:
        coverage: share of known texts that stay over the threshold; None for the threshold of `cost.py`.
        accuracy: instead, share of right fields wanted among the texts over the threshold.
        fallback: what answers under the threshold: "average", an expert's name, or "mixture".
        seed: of the draws for the learning curve and of the cross-validation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    embed: EmbedSettings = EmbedSettings()
    classifier: Kind = "logistic"
    coverage: float | None = Field(default=None, gt=0, le=1)
    accuracy: float | None = Field(default=None, gt=0, le=1)
    fallback: str = "average"
    seed: int = Field(default=0, ge=0)

    @property
    def fixed(self) -> bool:
        """Whether a share of texts was asked for, whatever experts gain and lose."""
        return self.coverage is not None or self.accuracy is not None


def fit_settings(
    *, template: str | None = None, layers: str | Sequence[int] | None = None, pooling: str | None = None, **others: Any
) -> FitSettings:
    """FitSettings from loose values; None takes the default. `layers` may be "4,-1" and
    `template` a name of PROMPTS.

    Raises:
        RouterError: a value that cannot be used, in one line.
    """
    given = {"template": PROMPTS.get(template or "", template), "pooling": pooling}
    embed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if layers is not None:
        embed["layers"] = layers.split(",") if isinstance(layers, str) else layers
    try:
        return FitSettings.model_validate({"embed": embed, **others})
    except ValidationError as error:
        raise RouterError(f"{first_problem(error)} (got {error.errors()[0]['input']!r})") from None


def with_template(embed: EmbedSettings, engine: Engine, fewest: int) -> EmbedSettings:
    """The same with an alignment prompt where none was chosen.

    Args:
        engine: the task prompt is for models that know its marks; it takes some twenty tokens more a route.
        fewest: labelled samples of the field that has fewest.
    """
    if embed.template is not None:
        return embed
    begins, ends = (engine.encode(mark, special=False) for mark in CHAT_MARKS)
    knows_marks = len(begins) == len(ends) == 1 and begins != ends  # where they are one, it is the unknown token
    few = ENOUGH <= fewest < FEW and knows_marks
    return embed.model_copy(update={"template": TASK_PROMPT if few else ALIGNMENT_PROMPT})
