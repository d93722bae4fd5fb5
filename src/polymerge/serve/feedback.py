"""GET and POST /v1/feedback: whether an answer's expert was the right one, kept in a file if the server was told to.

A row is {"prompt", "expert", "right"}: with them a router can be fitted or measured. Off unless the server names a
file: prompts are people's own words. Knows a file; does not know what is done with it.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from .errors import ApiError
from .service import Service, in_thread

LONGEST = 100_000  # characters of a prompt


class Feedback(BaseModel):
    """One thumb."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=LONGEST)]
    expert: Annotated[str, Field(min_length=1, max_length=200)]
    right: bool


def feedback_routes(service: Service) -> APIRouter:
    """Both endpoints; the second refuses where nothing is kept."""
    routes, lock = APIRouter(), threading.Lock()

    @routes.get("/v1/feedback")
    async def kept() -> dict[str, bool]:
        """Whether thumbs are kept."""
        return {"kept": service.settings.feedback is not None}

    @routes.post("/v1/feedback")
    async def feedback(body: Feedback) -> dict[str, bool]:
        """Appends a row."""
        file = service.settings.feedback
        if file is None:
            raise ApiError(404, "this server keeps no feedback; start it with --feedback FILE")
        if body.expert not in (*service.engine.experts, "average"):
            raise ApiError(400, f"expert: there is no {body.expert!r}", param="expert")
        await in_thread(lambda: _append(file, body, lock))
        return {"kept": True}

    return routes


def _append(file: Path, body: Feedback, lock: threading.Lock) -> None:
    line = json.dumps(body.model_dump(), ensure_ascii=False) + "\n"
    with lock, file.open("a", encoding="utf-8", errors="replace") as handle:
        handle.write(line)
