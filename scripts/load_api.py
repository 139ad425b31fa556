"""python scripts/load_api.py --model demo_output/drip-4x/assistant --clients 64 --seconds 300 --output measured

Loads the API of an assistant with many clients at once, and compares what they get with what one gets. Requests are those of the
rendered world, each about a scene of its own: questions and descriptions with a picture, and without; every second one is
streamed; temperature 0. Three phases of one run:

    before   one client sends each request of the pool once: its answers are what the others are compared with
    load     --clients at once, for --seconds, through the pool and round again
    after    one client again, as many requests as before

A 429 that says when to come again is obeyed and counted; whatever else is no answer is an error. The exit status is then 1, and
where an answer is not the one that its request got alone. Writes to --output

    load.json   all figures, with what was asked for, where, and how busy the machine was
    load.md     tables: speed, times to the first token, answers compared, and the server's memory
    load.png    the same over time

The server is `python -m serve.api`, started for that (--model, with --server for its flags), or one that is there (--url; a key
stands in LLAVA_DRIP_API_KEY). It should keep no pictures (--image-cache-mib 0, as the one that is started does), lest a request
that comes again cost less than one that is new.

    python scripts/load_api.py --url http://127.0.0.1:8000 --clients 16 --seconds 60
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

from llava_drip import cli

REPOSITORY = Path(__file__).resolve().parents[1]
WARM_UP = 20  # requests that are not counted
MANY_ERRORS = 50  # then a phase is over


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="load_api.py", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="an assistant to be served, best one trained on the world")
    add("--server", default="", metavar="FLAGS", help="of serve.api, in one word: --server='--max-rows 64'")
    add("--url", help="of a server that runs already, in place of --model")
    add("--clients", type=int, default=64, help="at once (64)")
    add("--seconds", type=float, default=300.0, help="of load (300)")
    add("--requests", type=int, help="of load, instead of --seconds")
    add("--settle", type=float, help="seconds of load before memory is looked at (a fifth of it)")
    add("--pool", type=int, default=1500, help="different requests (1500)")
    add(
        "--shares",
        type=float,
        nargs=3,
        default=(1.0, 2.0, 1.0),
        metavar="N",
        help="of questions, descriptions, text alone (1 2 1)",
    )
    add("--seed", type=int, default=0, help="of the scenes (0)")
    add("--threads", type=int, default=1, help="of the started server, for torch (1)")
    add("--output", type=Path, help="folder of the results (default: they are printed only)")
    args = parser.parse_args(argv)
    if bool(args.model) == bool(args.url):
        parser.error("give one of --model and --url")
    if args.url and args.server:
        parser.error("--server: is for a server that --model starts")
    parser.check_least(args, {"clients": 1, "pool": 1, "requests": 1, "threads": 1, "seed": 0})
    if not args.seconds > 0 or not (args.settle is None or args.settle >= 0):
        parser.error(f"--seconds {args.seconds:g}, --settle {args.settle}: must be above 0, and at least 0")
    if min(args.shares) < 0 or not sum(args.shares):
        parser.error(f"--shares {args.shares}: must be at least 0, and not all of them 0")
    return args


async def drive(args: argparse.Namespace, url: str, key: str) -> tuple[list, list]:
    """The three phases; samples of memory."""
    from tqdm import tqdm

    from llava_drip.serving_cost.clients import Caller, Got
    from llava_drip.serving_cost.load_report import Phase
    from llava_drip.serving_cost.server import Watch
    from llava_drip.serving_cost.workload import make_asks

    asks = make_asks(args.pool, args.shares, args.seed)
    phases: list[Phase] = []
    caller = Caller(url, asks, key)
    await caller.connect()
    async with Watch(url, key) as watch:

        async def phase(name: str, clients: int, requests: int | None, seconds: float = float("inf")) -> None:
            errors = 0
            with tqdm(
                total=requests, desc=f"{name}, {clients} at once", unit=" requests", leave=False, disable=None
            ) as bar:

                def tell(got: Got) -> None:
                    nonlocal errors
                    errors += got.error is not None
                    bar.update()

                counts, began, cpu = await watch.metrics(), time.perf_counter(), time.process_time()

                def more(sent: int) -> bool:
                    in_time = time.perf_counter() < began + seconds
                    return errors < MANY_ERRORS and in_time and (requests is None or sent < requests)

                got = await caller.call(clients, more, tell)
                ended, cpu = min(time.perf_counter(), began + seconds), time.process_time() - cpu
                now = await watch.metrics()
            if name != "warm up":
                grown = {name: value - counts.get(name, 0.0) for name, value in now.items()}
                phases.append(Phase(name, clients, began, ended, got, grown, cpu))

        await phase("warm up", 1, min(WARM_UP, args.pool))
        await phase("before", 1, args.pool)
        await phase("load", args.clients, args.requests, float("inf") if args.requests else args.seconds)
        await phase("after", 1, args.pool)
    return phases, watch.samples


def main() -> None:
    args = parse()
    from llava_drip import machine  # after parsing: --help is quick
    from llava_drip.draw.serving import draw_load
    from llava_drip.files import write_results
    from llava_drip.serving_cost import load_report
    from llava_drip.serving_cost.server import started
    from llava_drip.serving_cost.workload import make_asks

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server that was started ends too
    before, key = machine.load(), os.environ.get("LLAVA_DRIP_API_KEY") or "none"
    with contextlib.ExitStack() as stack:
        if args.url is None:
            log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
            flags = ["--image-cache-mib", "0", *shlex.split(args.server)]
            url = stack.enter_context(started(REPOSITORY, args.model.resolve(), flags, args.threads, log))
            key = "none"
        else:
            url = args.url.rstrip("/").removesuffix("/v1")
        phases, samples = asyncio.run(drive(args, url, key))
    asks = make_asks(args.pool, args.shares, args.seed)
    alone = {got.number: got.text for got in phases[0].got if got.answered}
    summaries = [load_report.phase_summary(phase, asks, alone) for phase in phases]
    load = phases[1]
    settle = args.settle if args.settle is not None else (load.ended - load.began) / 5
    names = ("clients", "pool", "shares", "seed", "server", "threads")
    found = machine.where(["cpu"])
    result = {
        **{name: getattr(args, name) for name in names},
        "model": str(args.model or args.url),
        **found,
        "where": f"{args.threads} thread(s) of the server. {machine.described(found, (before, machine.load()))}",
        "phases": summaries,
        "ratios": load_report.ratios(*summaries),
        "settle": settle,
        "memory": load_report.memory_summary(samples, load.began + settle, load.ended),
        "busy": load_report.busy(samples, load.began + settle, load.ended),
        "over_time": load_report.over_time(phases, samples),
    }
    print(load_report.table(result))
    if args.output is not None:
        write_results(args.output, "load", result, load_report.table(result))
        draw_load(args.output / "load.png", result["over_time"])
    wrong = {name: sum(one[name] for one in summaries) for name in ("errors", "lost")}
    wrong["answers that differ"] = sum(one["compared"] - one["same"] for one in summaries)
    if any(wrong.values()):
        raise ValueError(", ".join(f"{count} {name}" for name, count in wrong.items() if count))


if __name__ == "__main__":
    cli.run(main, "load_api.py")
