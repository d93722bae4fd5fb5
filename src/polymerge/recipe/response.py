"""What a recipe may say about answering: the thinker, when it is asked, and its budgets.

Knows the keys, their defaults and which of them go together. Does not know how a thinker is run (`polymerge.staged`).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .numbers import Real, Whole

Use = Literal["always", "never", "auto"]
# How a model's linear layers are held in memory (`polymerge.model.quantised`).
Base = Literal["16bit", "int8", "nf4", "int4", "fp8"]
PromptVersion = Literal["v1", "v2"]
LengthNorm = Literal["none", "tokens", "characters"]


class ThinkerSettings(BaseModel):
    """The model that thinks: a `source` as experts have one, or an `endpoint` that speaks OpenAI's protocol.

    Attributes:
        source: a folder, a hub id, a GGUF file or `package:NAME`.
        endpoint: base URL of the API, up to and with its version (`https://host/v1`).
        model: the endpoint's name for the model.
        key_env: the environment variable that holds the endpoint's key. The key itself never stands in a recipe.
        timeout: seconds for one request to the endpoint, from its first byte sent to its last byte read.
        retries: after a refused connection, a time-out, a 429 or an error of the server.
        concurrency: requests to the endpoint at once.
        base: how a `source`'s linear layers are held in memory, as `load_model` takes it for a bundle's.
        config: folder with the source's config.json, for `polymerge plan` where the source is not here.
        trust_remote_code: allow the source's own modelling code to run. Off.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[str, Field(min_length=1)] | None = None
    endpoint: str | None = None
    model: str | None = None
    key_env: str | None = None
    timeout: Annotated[Real, Field(gt=0, le=3600)] = 60.0
    retries: Annotated[Whole, Field(ge=0, le=10)] = 3
    concurrency: Annotated[Whole, Field(ge=1, le=256)] = 8
    base: Base = "16bit"
    config: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.source is None) == (self.endpoint is None):
            raise ValueError("give either source (a model to run here) or endpoint (a URL)")
        if self.endpoint is not None and not re.match(r"https?://[^\s/@]+(/\S*)?$", self.endpoint):
            raise ValueError("endpoint must be a URL such as https://host/v1, without user name and password")
        if self.endpoint is not None and not self.model:
            raise ValueError("an endpoint needs model, its name for the model")
        if self.endpoint is not None and self.base != "16bit":
            raise ValueError("base is for a source that runs here; an endpoint holds its model as it likes")
        return self


class StageSettings(BaseModel):
    """When the thinker is asked, with which prompts, and for how long.

    Attributes:
        use: `always`; `never`; `auto`, which asks it in the fields where `polymerge stages` has shown on validation
            data that it helps, and where the router is confident.
        fields: exceptions from `use` for single fields.
        prompts: the version of the prompts. With `auto` the version that helped most in a field is taken there.
        templates: folder with own prompts, for all fields or for one (docs/staged.md).
        min_confidence: of the router; `auto` answers directly below it.
        thought_tokens: at most so many a thought.
        thought_seconds: for all thoughts of one run together; rows without a thought by then are answered directly.
        length_norm: what a choice's log-likelihood is divided by. The competition's kit does not divide.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    use: Use = "auto"
    fields: dict[str, Use] = {}
    prompts: PromptVersion = "v2"
    templates: str | None = None
    min_confidence: Annotated[Real, Field(ge=0.0, le=1.0)] = 0.5
    thought_tokens: Annotated[Whole, Field(ge=1, le=65536)] = 128
    thought_seconds: Annotated[Real, Field(gt=0)] | None = None
    length_norm: LengthNorm = "none"
