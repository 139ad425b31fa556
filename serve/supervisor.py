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
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from serve.guard import Guard
from serve.intake import Intake
from serve.relay import FrontMetrics, Relay
from serve.server import Server, configured
from serve.settings import KEY, Settings, api_key, check_place, is_loopback, warn_of_no_key
from serve.worker_process import Worker

PROG = "supervisor"


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
    parser.add_argument(
        "--start-seconds",
        type=float,
        default=900.0,
        help="that a start may take, the model's loading included, before it has failed; 0: any",
    )
    parser.add_argument(
        "--hang-seconds",
        type=float,
        default=120.0,
        help="that the worker may not answer, or get nowhere with its requests, before it is killed; 0: it never is",
    )
    return parser


async def serve(args: argparse.Namespace, flags: Sequence[str], settings: Settings) -> None:
    """Until a signal ends it. ChildProcessError: the worker cannot be started."""
    with tempfile.TemporaryDirectory(prefix="llava_drip-") as folder:  # for this user alone
        worker = Worker(flags, Path(folder), args.start_seconds)
        front = Front(settings, worker)
        config = configured(Guard(Relay(front), front), host=args.host, port=args.port, lifespan="off")
        server = Server(config, front, args.drain_seconds)
        kept = watched = None
        try:
            with ended_by_signals():
                await worker.start()
            kept = asyncio.create_task(worker.keep(args.attempts))
            watched = asyncio.create_task(worker.watch(args.hang_seconds))
            kept.add_done_callback(lambda _: setattr(server, "should_exit", True))
            await server.serve()
        finally:
            for task in (kept, watched):
                if task is not None:
                    task.cancel()
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
    for flag, seconds in (("--hang-seconds", args.hang_seconds), ("--start-seconds", args.start_seconds)):
        if not 0 <= seconds < float("inf"):
            parser.error(f"{flag} {seconds:g}: must be at least 0")
    try:
        key = api_key(args.api_key_file)
        settings = Settings("", api_key=key, loopback_only=key is None and is_loopback(args.host))
        warn_of_no_key(PROG, args.host, key)
        check_place(args.host, args.port)
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
