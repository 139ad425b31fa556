"""What the routes share: the engine, the settings, and how much is under way."""

from __future__ import annotations

import asyncio
import threading
import time

from fastapi import FastAPI, Request

from llava_drip.engine import Engine
from serve.errors import ApiError
from serve.intake import Intake
from serve.metrics import Metrics
from serve.pictures import Pictures
from serve.remote import Fetcher
from serve.settings import Settings
from serve.threads import Threads
from serve.work import Mailbox

STARTERS = 64
SEERS = 2  # one reads pictures while the other has the model

__all__ = ["Service", "Settings", "service_of"]


class Service(Intake):
    """One running app.

    Attributes:
        cancels: each ends an answer under way.
        starters: make prompts ready. seers: see to what wants the tower alone.
    """

    def __init__(self, engine: Engine, settings: Settings):
        super().__init__(settings)
        self.engine = engine
        self.metrics = Metrics(engine)
        self.pictures = Pictures(Fetcher() if settings.remote_images else None)
        self.created = int(time.time())
        self.cancels: set[threading.Event] = set()
        self._mailbox: Mailbox | None = None
        # A thread that is free is taken first, so that there are few; but a large picture holds up nobody's words.
        self.starters, self.seers = Threads(STARTERS, "start"), Threads(SEERS, "see")

    @property
    def mailbox(self) -> Mailbox:
        """Of the loop that serves the app now."""
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return self._mailbox

    def close(self) -> None:
        for threads in (self.starters, self.seers, self.pictures.decoders):
            threads.close()

    def check_model(self, name: str) -> None:
        if name != self.settings.model:
            raise ApiError(
                404, "there is no such model here; /v1/models says which there is", "model", "model_not_found"
            )

    def cut(self) -> None:
        for cancel in tuple(self.cancels):
            cancel.set()


async def service_of(request: Request) -> Service:
    """For FastAPI's Depends, which would run it in a thread if it were not asynchronous."""
    app: FastAPI = request.app
    return app.state.service
