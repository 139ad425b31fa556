"""What the routes share: the engine, the settings, and how much is under way."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass

from fastapi import FastAPI, Request

from llava_drip.engine import Engine
from serve.errors import ApiError
from serve.metrics import Metrics
from serve.pictures import Pictures
from serve.remote import Fetcher


@dataclass(frozen=True)
class Settings:
    """Of one app.

    Attributes:
        model: the name that requests give, and /v1/models.
        api_key: asked for on every route; None: none is.
        loopback_only: the Host header must name this machine itself; for a server that listens there alone and has no key.
        remote_images: pictures are fetched from http(s) addresses too.
        time_limit: seconds, waiting included, after which an answer ends as it is.
        max_new_tokens: of a request that says no number.
        max_body: bytes of a request.
        docs: the page /docs, which a browser gets from cdn.jsdelivr.net; /openapi.json is there without.
    """

    model: str
    api_key: str | None = None
    loopback_only: bool = False
    remote_images: bool = False
    time_limit: float = 120.0
    max_new_tokens: int = 512
    max_body: int = 32 * 2**20
    docs: bool = False

    def __post_init__(self):
        if not self.time_limit > 0:
            raise ValueError(f"time limit: must be above 0 seconds, got {self.time_limit}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max new tokens: must be at least 1, got {self.max_new_tokens}")
        if self.api_key is not None and not (
            self.api_key.isascii() and self.api_key.isprintable() and self.api_key.strip()
        ):
            raise ValueError("the API key must be printable ASCII, and not empty")


class Service:
    """One running app.

    Attributes:
        running: requests under way, probes not counted.
        seeing: of those, how many want the tower alone.
        held_bytes: of bodies.
        draining: no new requests are taken.
        cancels: each ends an answer under way.
    """

    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)
        self.pictures = Pictures(Fetcher() if settings.remote_images else None)
        self.created = int(time.time())
        self.cancels: set[threading.Event] = set()
        self.running, self.seeing, self.held_bytes, self.draining = 0, 0, 0, False

    def check_model(self, name: str) -> None:
        if name != self.settings.model:
            raise ApiError(
                404, "there is no such model here; /v1/models says which there is", "model", "model_not_found"
            )

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, waits for those under way, so long, and then cuts off what still runs."""
        self.draining = True
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.cut()

    def cut(self) -> None:
        """Ends every answer at its next token; its client is told that the server shuts down."""
        for cancel in tuple(self.cancels):
            cancel.set()


def service_of(request: Request) -> Service:
    """For FastAPI's Depends."""
    app: FastAPI = request.app
    return app.state.service
