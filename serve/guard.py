"""What stands before every route: key, host, size of the body, and after it: no error but in OpenAI's shape, one line of log.

Pure ASGI, so that it sees a body before anything reads it, and an exception before the server would print it.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
import uuid

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import LOG, ApiError, busy, log_failure
from serve.intake import Intake

BODY_SECONDS = 60.0  # for the whole of it to arrive
MAX_RUNNING = 256  # requests, those included that the engine's queue will refuse
HELD_BODIES = 512 * 2**20  # bytes of all requests under way
PROBES = ("/health", "/ready", "/metrics")  # answered while the service drains, and not waited for
RELAYED = "llava_drip.relayed"  # in the scope of a request that another process has answered, counted and logged
LOOPBACK_NAMES = ("localhost", "localhost.localdomain")


class Guard:
    """Middleware; its counts are the service's."""

    def __init__(self, app: ASGIApp, service: Intake):
        self.app, self.service = app, service
        key = service.settings.api_key
        self.key = None if key is None else bearer(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = scope.get("state", {}).get("request_id") or uuid.uuid4().hex
        started, status = time.perf_counter(), 0
        work = scope["path"] not in PROBES
        self.service.running += work

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {key for key, _ in message.get("headers", ())}  # of a relayed answer, by the guard before it
                ours = ((b"x-request-id", name.encode()), (b"x-content-type-options", b"nosniff"))
                message["headers"] = [*message.get("headers", ()), *(item for item in ours if item[0] not in given)]
            await send(message)

        try:
            await self._checked(scope, receive, noting)
        except asyncio.CancelledError:
            if not self.service.draining:
                raise
            LOG.info("request %s was cut off", name)  # uvicorn would print where it stood
        except Exception as error:
            log_failure(name, error)
            if not status:
                await ApiError(500, "the server failed; its log has the request's id").response()(
                    scope, receive, noting
                )
        finally:
            self.service.running -= work
            if RELAYED not in scope:
                self._note(scope, name, status or 499, time.perf_counter() - started, work)

    def _note(self, scope: Scope, name: str, status: int, seconds: float, work: bool) -> None:
        route = getattr(scope.get("route"), "path", "none")  # the template: what is asked for may be anything
        self.service.metrics.request(route, scope["method"], status, seconds)
        if work:
            LOG.info("request %s %s %s %s %.3f s", name, scope["method"], route, status, seconds)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, held = bytearray(), 0
        try:
            self._admit(scope)
            with anyio.move_on_after(BODY_SECONDS) as limit:
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    self._check_size(len(body) + len(piece))
                    if self.service.held_bytes + len(piece) > HELD_BODIES:
                        raise busy("the server holds as many requests as it can; try again soon", 2)
                    held += len(piece)
                    self.service.held_bytes += len(piece)
                    body += piece
            if limit.cancelled_caught:
                raise ApiError(408, "the body did not arrive in time", code="timeout", headers={"Connection": "close"})
            messages = [{"type": "http.request", "body": bytes(body), "more_body": False}]
            del body

            async def replay() -> Message:
                return messages.pop() if messages else await receive()

            await self.app(scope, replay, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        finally:
            self.service.held_bytes -= held

    def _admit(self, scope: Scope) -> None:
        """ApiError for a request that is not to be read."""
        settings = self.service.settings
        headers = dict(reversed(scope["headers"]))  # of two alike the first counts
        if settings.loopback_only and not names_this_machine(headers.get(b"host", b"")):
            raise ApiError(403, "the Host header does not name this machine", code="host_not_allowed")
        if self.key is not None and not has_key(headers, self.key):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self.service.draining and scope["path"] not in PROBES:
            raise busy("the server is shutting down; try again", 5, 503, "shutting_down")
        if self.service.running > MAX_RUNNING and scope["path"] not in PROBES:
            raise busy("the server has as many requests as it can; try again soon", 2)
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit():
            self._check_size(int(declared[:18]) if len(declared) <= 18 else 10**18)

    def _check_size(self, size: int) -> None:
        if size > self.service.settings.max_body:
            raise ApiError(
                413,
                f"the body is too large; at most {self.service.settings.max_body:,} bytes are allowed",
                code="body_too_large",
                headers={"Connection": "close"},
            )


def bearer(key: str) -> bytes:
    """What `has_key` compares with."""
    return f"bearer {key.strip()}".encode()


def has_key(headers: dict[bytes, bytes], expected: bytes) -> bool:
    """Whether the Authorization header is that of `bearer`, in constant time."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return hmac.compare_digest(scheme.lower() + b" " + key.strip(), expected)


def names_this_machine(host: bytes) -> bool:
    """Whether a Host header names this machine itself, with any port."""
    name = host.decode("latin-1").lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
