"""Errors of the API in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, whatever went wrong and wherever."""

from __future__ import annotations

import json
import logging
import os
import traceback
from collections.abc import Mapping

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

LOG = logging.getLogger("llava_drip.serve")
MAX_MESSAGE = 500  # characters

# By status, where the kind of error is neither invalid_request_error nor server_error.
TYPES = {403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a request gets instead of its answer.

    Attributes:
        status: HTTP status.
        message: one line for the client. Never more of the request than the names of its fields.
        param: the field at fault, as messages[0].content[1].image_url.url; None where it is none.
        code: a word for programs, as invalid_api_key.
        headers: of the response, as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {
                "message": clean(self.message),
                "type": kind,
                "param": None if self.param is None else clean(self.param),
                "code": self.code,
            }
        }

    def response(self) -> Response:
        return JSONResponse(self.body(), self.status, self.headers)

    def event(self) -> str:
        """The last server-sent event of a stream that had begun."""
        return f"data: {json.dumps(self.body())}\n\n"


def clean(text: str) -> str:
    """One line that UTF-8 can hold (names of fields come from outside, with lone surrogates too), and no longer than a line."""
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 3]}..."


def bad_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param, code)


def busy(message: str, seconds: float, status: int = 429, code: str = "rate_limit_exceeded") -> ApiError:
    """Come again: with Retry-After, in whole seconds, at least one."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(max(1, round(seconds)))})


def late(seconds: float) -> ApiError:
    """A request's time is up, and nothing of an answer is there."""
    return busy(f"no answer within {seconds:g} seconds: the server is busy", 10, 503, "timeout")


def from_validation(error: RequestValidationError) -> ApiError:
    """The first thing that pydantic found; it never shows the value, which may be a prompt or a picture."""
    first = error.errors()[0]
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return bad_request("the body is not valid JSON", code="invalid_json")
    if (context := first.get("ctx") or {}).get("code"):  # of our own validators
        return bad_request(message, context.get("name"), context["code"])
    place = field_name(first["loc"], error.body, kind == "missing")
    if not place:
        return bad_request("the body must be a JSON object, with Content-Type: application/json", code="invalid_json")
    if kind == "missing":
        return bad_request(f"{place}: this field is required", place, "missing_required_parameter")
    return bad_request(f"{place}: {message}", place)


def field_name(location: tuple, body: object, missing: bool) -> str:
    """("body", "messages", 0, "content", "parts", 1, "text") → messages[0].content[1].text.

    Pydantic's location also names the members of unions, which are no fields of the body: it is walked to tell them.
    """
    name, here = "", body
    steps = location[1:] if location[:1] in (("body",), ("query",), ("path",)) else location
    for number, step in enumerate(steps):
        if isinstance(step, int) and isinstance(here, list) and step < len(here):
            name, here = f"{name}[{step}]", here[step]
        elif isinstance(step, str) and isinstance(here, dict) and step in here:
            name, here = f"{name}.{step}".lstrip("."), here[step]
        elif isinstance(step, str) and number == len(steps) - 1 and (missing or not isinstance(body, dict)):
            name = f"{name}.{step}".lstrip(".")
    return name


async def on_validation(request: Request, error: RequestValidationError) -> Response:
    return from_validation(error).response()


async def on_http(request: Request, error: HTTPException) -> Response:
    """Starlette's own: no such route, wrong method, a body that cannot be parsed."""
    if error.status_code == 404:
        message, code = "there is no such address; /openapi.json lists those that there are", "unknown_url"
    elif error.status_code == 405:
        message, code = "this address does not take this method", "method_not_supported"
    else:
        message, code = "the body cannot be read as JSON", "invalid_json"
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


async def on_api_error(request: Request, error: ApiError) -> Response:
    return error.response()


HANDLERS = {RequestValidationError: on_validation, HTTPException: on_http, ApiError: on_api_error}


def log_failure(name: str, error: BaseException) -> None:
    """name: the request's, or its answer's."""
    LOG.error("request %s failed: %s", name, where(error))


def where(error: BaseException) -> str:
    """Kind and place of an error, without its message, which may quote a prompt. LLAVA_DRIP_TRACEBACK=1: all of it."""
    if os.environ.get("LLAVA_DRIP_TRACEBACK") == "1":
        return "".join(traceback.format_exception(error))
    if inner := getattr(error, "exceptions", ()):  # a group of them
        return where(inner[0])
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in reversed(frames[-4:]))
    return f"{type(error).__name__} at {places}"
