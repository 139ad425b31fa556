"""python -m serve.supervisor --model DIR [--host 127.0.0.1] [--port 8000]

The API of `python -m serve.api`, which has the model in a process of its own here and is started again when it dies: killed,
without memory, by a fault in a driver. Meanwhile clients get OpenAI's errors, in streams too, and /ready says 503.
Takes serve.api's flags. It imports no torch: it is small, and what kills the model does not reach it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import httpcore

from serve.errors import LOG
from serve.guard import Guard
from serve.intake import Intake
from serve.relay import FrontMetrics, Relay
from serve.server import LAST_SECONDS, Server, configured
from serve.settings import KEY, Settings, api_key, is_loopback, warn_of_no_key
from serve.unix_socket import UnixSockets

PROG = "supervisor"


class Worker:
    """The process that has the model: `python -m serve.api` on a Unix socket. It ends when this one does, however that ends.

    Attributes:
        up: it takes requests.
        pool: connections to it, one a request: a connection that breaks then means that the worker did.
        restarts: how often it was started again. start_seconds: what the last start took.
    """

    def __init__(self, flags: Sequence[str], folder: Path):
        """folder: of the sockets, which nobody else may open."""
        self.command = [sys.executable, "-m", "serve.api", *flags, "--drain-seconds", "0"]
        self.folder, self.starts = folder, 0
        self.up, self.ending, self.start_seconds = False, False, 0.0
        self.process: asyncio.subprocess.Process | None = None

    @property
    def restarts(self) -> int:
        return max(0, self.starts - 1)

    async def start(self) -> None:
        """Returns when it takes requests. ChildProcessError: it ended before; what it said of that is on stderr."""
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
        while not (line := await self.process.stdout.readline()).startswith(b"api at "):
            if not line:
                raise ChildProcessError(f"the worker ended before it was ready, {how(await self.process.wait())}")
        options = {"max_connections": None, "max_keepalive_connections": 0, "network_backend": UnixSockets()}
        self.pool = httpcore.AsyncConnectionPool(uds=str(self.socket), **options)
        self.up, self.start_seconds = True, time.monotonic() - began

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
                except ChildProcessError as error:
                    if attempt == attempts:
                        raise
                    LOG.error("%s; attempt %d of %d", error, attempt, attempts)
                await asyncio.sleep(2 ** (attempt - 1))
            LOG.info("the worker is back after %.1f s", self.start_seconds)

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
            self.process.kill()
            await self.process.wait()


def how(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"


class Front(Intake):
    """What this process counts, beside its worker."""

    def __init__(self, settings: Settings, worker: Worker):
        super().__init__(settings)
        self.worker = worker
        self.metrics = FrontMetrics(self)

    def cut(self) -> None:
        self.worker.cut()


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def arguments() -> Parser:
    parser = Parser(
        prog=PROG,
        description="Serve an assistant behind OpenAI's API, and start it again when it dies.",
        epilog="All other flags (--model, --name, --device, --dtype, --compression, ...) are those of python -m serve.api.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one, which is printed")
    parser.add_argument("--api-key-file", type=Path, help=f"as of serve.api; or {KEY} has the key")
    parser.add_argument("--drain-seconds", type=float, default=60.0, help="after SIGTERM, for answers under way to end")
    parser.add_argument(
        "--attempts", type=int, default=3, help="to start it again; if so many in a row fail, the program ends"
    )
    return parser


async def serve(args: argparse.Namespace, flags: Sequence[str], settings: Settings) -> None:
    """Until a signal ends it. ChildProcessError: the worker cannot be started."""
    with tempfile.TemporaryDirectory(prefix="llava_drip-") as folder:  # for this user alone
        worker = Worker(flags, Path(folder))
        front = Front(settings, worker)
        config = configured(Guard(Relay(front), front), host=args.host, port=args.port, lifespan="off")
        server = Server(config, front, args.drain_seconds)
        kept = None
        try:
            with ended_by_signals():
                await worker.start()
            kept = asyncio.create_task(worker.keep(args.attempts))
            kept.add_done_callback(lambda _: setattr(server, "should_exit", True))
            await server.serve()
        finally:
            if kept is not None:
                kept.cancel()
            await worker.stop()
        with contextlib.suppress(asyncio.CancelledError):
            await kept


@contextlib.contextmanager
def ended_by_signals():
    """Within: SIGTERM and SIGINT cancel this task, so that nothing is left behind. The server has its own handlers later."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def main() -> NoReturn:
    parser = arguments()
    args, flags = parser.parse_known_args()
    if not 0 <= args.port < 65536:
        parser.error(f"--port {args.port}: must be 0 to 65535")
    if args.attempts < 1:
        parser.error(f"--attempts {args.attempts}: must be at least 1")
    try:
        key = api_key(args.api_key_file)
        settings = Settings("", api_key=key, loopback_only=key is None and is_loopback(args.host))
        warn_of_no_key(PROG, args.host, key)
        asyncio.run(serve(args, flags, settings))
    except (ValueError, OSError) as error:  # ChildProcessError is one of these
        if os.environ.get("LLAVA_DRIP_TRACEBACK") == "1":
            raise
        print(f"{PROG}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except asyncio.CancelledError:
        print(f"{PROG}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


if __name__ == "__main__":
    main()
