"""The process that has the model, for the supervisor: started, started again when it dies, watched, ended."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpcore
from prometheus_client.parser import text_string_to_metric_families

from serve.errors import LOG
from serve.server import LAST_SECONDS
from serve.unix_socket import UnixSockets

LOST = (httpcore.NetworkError, httpcore.RemoteProtocolError)  # what its end is to those who wait for it
LONGEST_LOOK = 10.0  # seconds between looks at whether the worker works


@dataclass(frozen=True)
class Progress:
    """What a worker says of itself. waited_for: it has requests. done: what it has done since it started."""

    waited_for: bool
    done: tuple[float, ...]


class Worker:
    """The process that has the model: `python -m serve.api` on a Unix socket. It ends when this one does, however that ends.

    Attributes:
        up: it takes requests.
        pool: connections to it, one a request: a connection that breaks then means that the worker did.
        restarts: how often it was started again. start_seconds: what the last start took.
    """

    def __init__(self, flags: Sequence[str], folder: Path, start_limit: float = 0.0):
        """folder: of the sockets, which nobody else may open. start_limit: seconds that a start may take; 0: any."""
        self.command = [sys.executable, "-m", "serve.api", *flags, "--drain-seconds", "0"]
        self.folder, self.start_limit, self.starts = folder, start_limit, 0
        self.up, self.ending, self.start_seconds = False, False, 0.0
        self.process: asyncio.subprocess.Process | None = None

    @property
    def restarts(self) -> int:
        return max(0, self.starts - 1)

    async def start(self) -> None:
        """Returns when it takes requests. ChildProcessError: it ended before, and what it said of that is on stderr; or it took
        too long."""
        self.starts += 1
        self.socket, began = self.folder / f"{self.starts}.sock", time.monotonic()
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            "--worker-socket",
            str(self.socket),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is for this process alone, which lets answers end
        )
        try:
            await asyncio.wait_for(self._ready(), self.start_limit or None)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
            text = f"the worker was not ready after {self.start_limit:g} s (--start-seconds) and was killed"
            raise ChildProcessError(text) from None
        self.connect()
        self.start_seconds = time.monotonic() - began

    async def _ready(self) -> None:
        said = self.process.stdout
        while True:
            with contextlib.suppress(ValueError):  # a line longer than any of ours
                line = await said.readline()
                if line.startswith(b"api at "):
                    break
                if not line:
                    raise ChildProcessError(f"the worker ended before it was ready, {how(await self.process.wait())}")
        self.listener = asyncio.create_task(self._let_speak(said))

    @staticmethod
    async def _let_speak(said: asyncio.StreamReader) -> None:
        """Whatever else it prints must not make it wait."""
        while await said.read(2**16):
            pass

    def connect(self) -> None:
        options = {"max_connections": None, "max_keepalive_connections": 0, "network_backend": UnixSockets()}
        self.pool = httpcore.AsyncConnectionPool(uds=str(self.socket), **options)
        self.up = True

    async def keep(self, attempts: int) -> None:
        """Starts it again whenever it ends, until `stop`. ChildProcessError: so many attempts in a row failed."""
        while True:
            status = await self.process.wait()
            self.up = False
            if self.ending:
                return
            self.socket.unlink(missing_ok=True)
            LOG.error("the worker ended, %s; it is started again", how(status))
            for attempt in range(1, attempts + 1):
                try:
                    await self.start()
                    break
                except OSError as error:  # ChildProcessError, or no memory for another process
                    if attempt == attempts:
                        raise
                    LOG.error("%s; attempt %d of %d", error, attempt, attempts)
                await asyncio.sleep(2 ** (attempt - 1))
            LOG.info("the worker is back after %.1f s", self.start_seconds)

    async def watch(self, patience: float) -> None:
        """Kills it, for `keep` to start it again, when for so many seconds it does not answer, or has requests and gets nowhere
        with them. patience: 0: never."""
        done, silent, stuck = None, None, None  # since when
        while patience:
            await asyncio.sleep(min(patience / 4, LONGEST_LOOK))
            if not self.up:
                done = silent = stuck = None
                continue
            now, since = None, time.monotonic()
            with contextlib.suppress(asyncio.TimeoutError, KeyError, ValueError, *LOST):
                now = await asyncio.wait_for(self._progress(), patience / 2)
            if now is None:
                silent = silent or since
            elif now.done != done:
                done, silent, stuck = now.done, None, None
            else:  # that nobody asks for a while is no progress
                silent, stuck = None, stuck or (since if now.waited_for else None)
            begun = silent or (stuck if now is not None and now.waited_for else None)
            if begun is not None and time.monotonic() - begun > patience:
                why = "does not answer" if now is None else "gets nowhere with its requests"
                LOG.error("the worker %s for %.0f s; it is killed", why, time.monotonic() - begun)
                self.up = False
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()

    async def _progress(self) -> Progress:
        families = text_string_to_metric_families((await self.get(b"/metrics")).decode())
        counts = {
            sample.name.removeprefix("llava_drip_engine_"): sample.value for one in families for sample in one.samples
        }
        done = tuple(counts[name] for name in ("steps", "prefilled_tokens", "decoded_tokens"))
        return Progress(counts["waiting"] + counts["running"] > 0, done)

    async def get(self, path: bytes) -> bytes:
        """The body of its answer. Raises: LOST: it is gone. ValueError: it refuses."""
        request = httpcore.Request("GET", url_of(path), headers=[(b"host", b"worker")])
        response = await self.pool.handle_async_request(request)
        try:
            body = await response.aread()
            if response.status != 200:
                raise ValueError(f"the worker answers {path.decode()} with {response.status}")
            return body
        finally:
            await response.aclose()

    def cut(self) -> None:
        """Ends it; answers under way get OpenAI's error of a server that shuts down."""
        self.ending = True
        with contextlib.suppress(ProcessLookupError):
            if self.process is not None:
                self.process.terminate()

    async def stop(self) -> None:
        """Ends it, by force where it does not."""
        self.cut()
        if self.process is None:
            return
        try:
            await asyncio.wait_for(self.process.wait(), 2 * LAST_SECONDS)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()


def url_of(target: bytes) -> httpcore.URL:
    """target: path and query, as they came."""
    return httpcore.URL(scheme=b"http", host=b"worker", port=None, target=target)


def how(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
