"""uvicorn, as every program here runs it: its limits, what it prints, and how signals end it."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from serve.errors import LOG
from serve.http_protocol import BoundedHttp
from serve.intake import Intake

MAX_CONNECTIONS = 1024  # idle ones too; uvicorn's own refusal is no JSON, the guard's come first
KEEP_ALIVE = 75  # seconds: more than clients keep idle connections (httpx 5), lest one be closed as they use it
LAST_SECONDS = 3  # for answers to notice that they have been cut off


class Server(uvicorn.Server):
    """uvicorn, where SIGTERM and Ctrl-C first let running answers end; a second one ends them too."""

    def __init__(self, config: uvicorn.Config, intake: Intake, drain_seconds: float):
        super().__init__(config)
        self.intake, self.drain_seconds, self.loop = intake, drain_seconds, None

    async def startup(self, sockets=None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if not self.started:
            return
        address = self.servers[0].sockets[0].getsockname()
        if not isinstance(address, str):  # a Unix socket's is its path
            host, port = address[:2]
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        with contextlib.suppress(OSError):  # a full disk is no reason not to serve
            print(f"api at {address}", flush=True)

    def handle_exit(self, sig: int, frame) -> None:
        if self.intake.draining or self.loop is None:
            self.intake.cut()
            self.should_exit = True
            return
        self.intake.draining = True
        self.loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def drain() -> None:
            if self.intake.running:
                LOG.info("waiting for %d requests to end; a second signal cuts them off", self.intake.running)
            await self.intake.drain(self.drain_seconds)
            self.should_exit = True

        self.draining = asyncio.ensure_future(drain())  # kept: the loop itself holds tasks only weakly


def log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)


def configured(app: ASGIApp, **place: object) -> uvicorn.Config:
    """place: host and port, or uds. The log goes to stderr."""
    log_to_stderr()
    return uvicorn.Config(
        app,
        http=BoundedHttp,
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,  # the guard has a line for each request
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=LAST_SECONDS,
        timeout_keep_alive=KEEP_ALIVE,
        **place,
    )


def end_with_stdin(socket: Path) -> None:
    """Ends this process, as SIGTERM does, when its stdin is closed: whoever holds the other end has ended, however it did. Its
    socket goes with it, and the socket's folder, if that is empty then."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):  # not sys.stdin.read, whose lock would be held at the end
            pass
        with contextlib.suppress(OSError):  # the other may have done it
            socket.unlink(missing_ok=True)
            socket.parent.rmdir()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stdin", daemon=True).start()


def leave_to_no_collector() -> None:
    """What there is now, a model above all, stays: looking through it again and again would hold requests up."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries that count their objects at the end call them leaks, at length


def bars_for_terminals_alone() -> None:
    """No progress bars of transformers in a log: a model would not load where that cannot be written."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar  # late: seconds, and a supervisor loads no model

        disable_progress_bar()
