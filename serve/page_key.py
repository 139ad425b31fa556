"""The key of the chat page: nothing of it without, neither its files nor its events.

Pure ASGI around gradio's app. Programs send Authorization: Bearer KEY; a browser gets a form, and then a cookie.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from urllib.parse import parse_qs

from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.guard import bearer, has_key, names_this_machine

COOKIE = "llava_drip_key"
MAX_FORM = 4096  # bytes
# gradio asks itself for this at its start, before it says where it is; the answer is true, and its queue is started if it is not
OWN_START = "/gradio_api/startup-events"

FORM = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Key · llava_drip</title><style>
:root { color-scheme: light dark }
body { font: 1rem system-ui, sans-serif; display: grid; place-content: center; min-height: 90vh }
form { display: grid; gap: .75rem; width: min(20rem, 90vw) } input, button { font: inherit; padding: .5rem }
</style></head><body><main><form method="post" action="key">
<label for="key">This page asks for a key.</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<p role="alert">PROBLEM</p><button>Open</button></form></main></body></html>
"""


class OwnName:
    """Middleware of a page without a key, on this machine's own address: the Host header has to name it, lest a page from
    elsewhere whose name has come to point here talks to it."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(reversed(scope.get("headers", ())))
        if scope["type"] not in ("http", "websocket") or names_this_machine(headers.get(b"host", b"")):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            problem = {"error": "the Host header does not name this machine"}
            await JSONResponse(problem, 403)(scope, receive, send)


class PageKey:
    """Middleware: see the module."""

    def __init__(self, app: ASGIApp, key: str, started: threading.Event):
        """started: is set once gradio has started, and asks nothing of itself any more."""
        self.app, self.started = app, started
        self.bearer = bearer(key)
        # Not the key itself, and the same after a restart: who knew the key need not show it again.
        self.token = hmac.new(key.strip().encode(), b"llava_drip chat page", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._may(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await (await self._refusal(Request(scope, receive)))(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
        if not self.started.is_set() and scope["path"] == OWN_START and scope.get("method") == "GET":
            return True
        headers = dict(reversed(scope["headers"]))  # of two alike the first counts
        if has_key(headers, self.bearer):
            return True
        cookie = HTTPConnection(scope).cookies.get(COOKIE, "")
        return hmac.compare_digest(cookie.encode(), self.token.encode())

    async def _refusal(self, request: Request) -> Response:
        """What is answered without the key: the form, and what becomes of it."""
        if request.method == "POST" and request.url.path == "/key":
            given = await self._given(request)
            if given is None or not hmac.compare_digest(b"bearer " + given, self.bearer):
                return form("That is not the key.")
            response = RedirectResponse("./", status_code=303)
            secure = request.url.scheme == "https"
            response.set_cookie(COOKIE, self.token, httponly=True, samesite="lax", secure=secure)
            return response
        if request.method in ("GET", "HEAD") and request.url.path == "/":
            return form("")
        problem = {"error": "the key is missing or wrong; send it as Authorization: Bearer KEY, or open the page at /"}
        return JSONResponse(problem, 401, {"WWW-Authenticate": "Bearer"})

    async def _given(self, request: Request) -> bytes | None:
        """The form's key; None: the form is not one."""
        body = b""
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_FORM:
                    return None
            return parse_qs(body.decode("ascii"), encoding="latin-1")["key"][0].strip().encode("latin-1")
        except (ClientDisconnect, UnicodeError, KeyError):
            return None


def form(problem: str) -> Response:
    return HTMLResponse(
        FORM.replace("PROBLEM", problem),
        401,
        {"Cache-Control": "no-store", "X-Frame-Options": "DENY", "WWW-Authenticate": "Bearer"},
    )
