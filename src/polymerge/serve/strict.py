"""How a request's fields are taken: each is known, or refused by name.

Knows kinds of fields; does not know any request.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator


class Neutral:
    """Marks a field whose only accepted values are those that ask for nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __call__(self, value: Any) -> Any:
        if value is not None and value not in self.values:
            raise ValueError(f"not supported; leave it out or send {json.dumps(self.values[0])}")
        return value


Nothing = Annotated[Any, AfterValidator(Neutral(None))]
NoText = Annotated[Any, AfterValidator(Neutral(""))]
NoList = Annotated[Any, AfterValidator(Neutral([]))]


def _has_bytes(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except (TypeError, ValueError):  # no JSON; the fields say so
        return True
    return True


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        """A lone half of a character (surrogate) has no bytes and no tokens."""
        for key, value in data.items() if isinstance(data, dict) else ():
            if not _has_bytes(value):
                raise ValueError(f"{key}: holds half a character (a lone surrogate), which is no text")
        return data


# Asks for something that cannot change the answer: where it is kept, billed, cached or found again.
Harmless = Any
