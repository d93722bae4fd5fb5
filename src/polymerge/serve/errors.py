"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, without paths, stacks or keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..errors import DeadlineError, EngineBusyError, EngineDownError, ModelError

RETRY_SECONDS = 2  # what a client that has to come again is told
NO_JSON = "the body is not JSON"

# Fields of a request that only the engine can check.
GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
ANSWERED = frozenset((*GUIDED, "response_format", "tools", "text", "logit_bias", "ignore_eos"))


class Fields(NamedTuple):
    """What a request calls its text, and how long its answer may be."""

    prompt: str
    tokens: str


class ApiError(Exception):
    """An error that a client is told.

    Args:
        param: the field of the request that is wrong, as a path: `messages.0.content`.
        retry_after: seconds after which it may work.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"retry-after": str(self.retry_after)} if self.retry_after is not None else {}
        if self.status == 401:
            headers["www-authenticate"] = 'Basic realm="polymerge: any name, an API key as password", charset="UTF-8"'
        return headers


_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def told(error: Exception) -> ApiError:
    """What a client is told about an error. Only what is about its own request is told in words."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ModelError):
        field = str(error).partition(":")[0]
        return ApiError(400, str(error), param=field if field.split(".")[0] in ANSWERED else None)
    if isinstance(error, EngineBusyError):
        return ApiError(429, str(error), code="queue_full", retry_after=RETRY_SECONDS)
    if isinstance(error, EngineDownError):
        return ApiError(503, str(error), code="engine_down", retry_after=RETRY_SECONDS)
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), code="timeout")
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


@contextmanager
def about(field: str) -> Iterator[None]:
    """What the engine refuses inside is told of a field. Raises ApiError."""
    try:
        yield
    except ModelError as error:
        raise ApiError(400, f"{field}: {error}", param=field) from None


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors, with the field that it is about."""
    first = next((error for error in errors if error["type"] == "extra_forbidden"), _telling(errors))
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    # an alternative of a union (`messages.0.content.str`) is no field
    named = [part for part in path if part.isidentifier() or part.isdigit()]
    field = ".".join(part for part in named if part not in ("str", "int", "float", "bool", "list", "dict")) or None
    if first["type"] == "extra_forbidden":
        message = f"{field}: not a field of this request, or one that this server does not support"
        return ApiError(400, message, param=field, code="unknown_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, NO_JSON)
    if first["type"] == "missing" and not path:
        return ApiError(400, "the body is empty")
    message = str(first["msg"]).removeprefix("Value error, ")
    if field is None and (begins := re.match(r"([a-z][a-z_.]*): ", message)):  # told of the request as a whole
        return ApiError(400, message, param=begins[1])
    return ApiError(400, f"{field}: {message}" if field else message, param=field)


def _telling(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first one; of a field with alternatives, the first of an alternative whose type was met."""
    about = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    return next((error for error in about if not str(error["type"]).endswith("_type")), errors[0])
