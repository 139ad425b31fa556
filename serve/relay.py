"""Hands each request to the worker, over its Unix socket, and says in OpenAI's shape when the worker is lost or not there.

Pure ASGI, behind a guard, which has read the body, so that what is lost is lost here, not on the way of a body.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import httpcore
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from serve.errors import LOG, ApiError, bad_request, busy
from serve.guard import RELAYED
from serve.leaving import ClientGone, unless_gone
from serve.worker_process import LOST, url_of

if TYPE_CHECKING:
    from serve.supervisor import Front

# Of one connection, not of what goes over it (RFC 9110, 7.6.1); length and date are set anew, the key was asked for already.
REQUEST_ONLY = {b"content-length", b"expect", b"authorization", b"proxy-authorization"}
RESPONSE_ONLY = {b"date", b"proxy-authenticate"}
CONNECTION_ONLY = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}


class FrontMetrics:
    """What the front knows and the worker cannot: the worker itself, and requests that never came to it."""

    def __init__(self, front: Front):
        worker = front.worker
        self.registry = registry = CollectorRegistry()
        up = Gauge("llava_drip_worker_up", "Whether the process with the model takes requests.", registry=registry)
        up.set_function(lambda: float(worker.up))
        restarts = Gauge("llava_drip_worker_restarts", "How often it was started again.", registry=registry)
        restarts.set_function(lambda: float(worker.restarts))
        took = Gauge("llava_drip_worker_start_seconds", "What its last start took.", registry=registry)
        took.set_function(lambda: worker.start_seconds)
        running = Gauge("llava_drip_front_running", "Requests under way, probes not counted.", registry=registry)
        running.set_function(lambda: float(front.running))
        self._requests = Counter(
            "llava_drip_front_requests", "Requests answered without the worker.", ["status"], registry=registry
        )

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(status).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Relay:
    """The app behind the front's guard. /health is its own, /ready and /metrics partly."""

    def __init__(self, front: Front):
        self.front, self.worker = front, front.worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the API has no WebSockets
            await send({"type": "websocket.close", "code": 1000})
            return
        match scope["method"], scope["path"]:
            case "GET", "/health":
                await PlainTextResponse("ok\n")(scope, receive, send)
            case "GET", "/ready":
                if self.front.draining:
                    raise busy("the server is shutting down", 5, 503, "shutting_down")
                self._check_worker()
                await PlainTextResponse("ready\n")(scope, receive, send)
            case "GET", "/metrics":
                found = await self._metrics() + self.front.metrics.text()
                await Response(found, headers={"Content-Type": CONTENT_TYPE_LATEST})(scope, receive, send)
            case _:
                await self._relay(scope, receive, send)

    def _check_worker(self) -> None:
        if not self.worker.up:
            raise busy("the model is being started again; try again", self.worker.start_seconds, 503, "worker_starting")

    async def _metrics(self) -> bytes:
        """The worker's; none while it is not there."""
        if not self.worker.up:
            return b""
        with contextlib.suppress(ValueError, *LOST):
            return await self.worker.get(b"/metrics")
        return b""

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_worker()
        body = (await receive())["body"]  # whole: the guard has read it
        try:
            await unless_gone(Request(scope, receive), self._answer(scope, body, send))
        except ClientGone:  # the worker's log has it
            scope[RELAYED] = True

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        named = (
            word for name, value in scope["headers"] if name == b"connection" for word in value.lower().split(b",")
        )
        skipped = CONNECTION_ONLY | REQUEST_ONLY | {word.strip() for word in named}
        headers = [item for item in scope["headers"] if item[0] not in skipped]
        headers.append((b"content-length", str(len(body)).encode()))
        if all(name != b"host" for name, _ in headers):  # HTTP/1.0
            headers.append((b"host", b"worker"))
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        request = httpcore.Request(scope["method"], url_of(target), headers=headers, content=body)
        started, answer = time.perf_counter(), Answer(send)
        try:
            response = await self.worker.pool.handle_async_request(request)
            try:
                await answer.pass_on(response)
            finally:
                await response.aclose()
        except httpcore.LocalProtocolError as error:
            raise bad_request("the request's head is not valid HTTP", code="invalid_request") from error
        except LOST as error:
            lost = busy(
                "the process that had the model ended; it is being started again, and the request may be sent again",
                self.worker.start_seconds,
                503,
                "worker_lost",
            )
            if not answer.begun:
                raise lost from error
            LOG.error("request %s lost its worker after %.3f s", answer.name, time.perf_counter() - started)
            await answer.end(lost)
        scope[RELAYED] = True


class Answer:
    """One answer on its way from the worker to the client: events as they come, all else when it is whole."""

    def __init__(self, send: Send):
        self.send, self.begun, self.name = send, False, ""

    async def pass_on(self, response: httpcore.Response) -> None:
        headers = [(name.lower(), value) for name, value in response.headers]
        headers = [item for item in headers if item[0] not in CONNECTION_ONLY | RESPONSE_ONLY]
        self.name = dict(headers).get(b"x-request-id", b"").decode("latin-1")
        start: Message = {"type": "http.response.start", "status": response.status, "headers": headers}
        if not dict(headers).get(b"content-type", b"").startswith(b"text/event-stream"):
            content = await response.aread()
            await self.send(start)
            await self.send({"type": "http.response.body", "body": content})
            return
        await self.send(start)
        self.begun, rest = True, b""
        async for piece in response.aiter_stream():
            whole, end, rest = (rest + piece).rpartition(b"\n\n")  # never half an event: an error may have to follow it
            if end:
                await self.send({"type": "http.response.body", "body": whole + end, "more_body": True})
        await self.send({"type": "http.response.body", "body": rest})

    async def end(self, error: ApiError) -> None:
        """Says within a stream why it ends."""
        await self.send({"type": "http.response.body", "body": error.event().encode()})
