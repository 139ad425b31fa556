"""python -m serve.api --model DIR [--host 127.0.0.1] [--port 8000]

An assistant behind OpenAI's API: chat with pictures, streamed or whole, embeddings of pictures, and the segments that the model
saw.
docs/guides/serving.md says what of OpenAI's reference there is; SECURITY.md, what requests can and cannot do.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from llava_drip import cli
from llava_drip.assistant.quantization import Quantization
from llava_drip.engine import Engine, placement
from serve import chat_route, image_routes, service_routes
from serve.errors import HANDLERS, LOG
from serve.guard import Guard
from serve.service import Service, Settings

KEY = "LLAVA_DRIP_API_KEY"
MAX_CONNECTIONS = 1024  # idle ones too; uvicorn's own refusal is no JSON, the guard's come first
KEEP_ALIVE = 75  # seconds: more than clients keep idle connections (httpx 5), lest one be closed as they use it
LAST_SECONDS = 3  # for answers to notice that they have been cut off


def make_app(engine: Engine, settings: Settings) -> FastAPI:
    """The API over an engine, which it closes at the end. `app.state.service` is its Service."""
    service = Service(engine, settings)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="llava_drip",
        summary="An assistant that sees pictures as few tokens, behind OpenAI's API.",
        lifespan=life,
        docs_url="/docs" if settings.docs else None,
        redoc_url=None,
        exception_handlers=HANDLERS,
    )
    app.state.service = service
    for routes in (chat_route, image_routes, service_routes):
        app.include_router(routes.router)
    app.add_middleware(Guard, service=service)
    return app


class Server(uvicorn.Server):
    """uvicorn, where SIGTERM and Ctrl-C first let running answers end; a second one ends them too."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float):
        super().__init__(config)
        self.service, self.drain_seconds, self.loop = service, drain_seconds, None

    async def startup(self, sockets=None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"api at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)

    def handle_exit(self, sig: int, frame) -> None:
        if self.service.draining or self.loop is None:
            self.service.cut()
            self.should_exit = True
            return
        self.service.draining = True
        self.loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def drain() -> None:
            if self.service.running:
                LOG.info("waiting for %d requests to end; a second signal cuts them off", self.service.running)
            await self.service.drain(self.drain_seconds)
            self.should_exit = True

        self.draining = asyncio.ensure_future(drain())  # kept: the loop itself holds tasks only weakly


def api_key(path: Path | None) -> str | None:
    """The key in a file's first line, or in the environment. ValueError: both, or a file that has none."""
    given = os.environ.pop(KEY, None)  # no child inherits it
    if path is None:
        if given is not None and not given.strip():
            raise ValueError(f"{KEY} is empty; unset it to serve without a key")
        return given and given.strip()
    if given is not None:
        raise ValueError(f"--api-key-file and {KEY} are both given; leave one of them out")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise ValueError(f"--api-key-file {path}: its first line has no key")
    return lines[0].strip()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def arguments() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="api", description="Serve an assistant behind OpenAI's API.")
    parser.add_argument("--model", required=True, type=Path, help="folder of an assistant (config.json, *.safetensors)")
    parser.add_argument("--name", help="of the model, in requests; default: the folder's")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one, which is printed")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default bfloat16 on cuda, else float32")
    parser.add_argument(
        "--bits", type=int, choices=(4, 8), help="quantise the language model as it is loaded (bitsandbytes)"
    )
    parser.add_argument(
        "--compression",
        type=float,
        help="patches per visual token; default: as the checkpoint says, else each image decides",
    )
    parser.add_argument(
        "--api-key-file", type=Path, help=f"its first line is asked for on every route; or {KEY} has it"
    )
    parser.add_argument("--remote-images", action="store_true", help="fetch pictures from public http(s) addresses too")
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds for an answer, waiting included")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of a request that says no number")
    parser.add_argument(
        "--max-waiting", type=int, default=64, help="requests in the queue; one more is refused with 429"
    )
    parser.add_argument("--max-rows", type=int, default=32, help="requests that the model works on at once")
    parser.add_argument(
        "--image-cache-mib",
        type=float,
        default=256.0,
        help="of pictures' tokens kept for requests that send them again",
    )
    parser.add_argument("--drain-seconds", type=float, default=60.0, help="after SIGTERM, for answers under way to end")
    parser.add_argument(
        "--docs", action="store_true", help="a page of the API at /docs, which browsers get from cdn.jsdelivr.net"
    )
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if not 0 <= args.port < 65536:
        parser.error(f"--port {args.port}: must be 0 to 65535")
    key = api_key(args.api_key_file)
    settings = Settings(
        model=args.name or args.model.resolve().name,
        api_key=key,
        loopback_only=key is None and is_loopback(args.host),
        remote_images=args.remote_images,
        time_limit=args.time_limit,
        max_new_tokens=args.max_new_tokens,
        docs=args.docs,
    )
    if key is None and not is_loopback(args.host):
        print(
            f"api: --host {args.host} without a key: whoever reaches this machine can use it ({KEY})", file=sys.stderr
        )
    quantization = None
    if args.bits is not None:
        dtype = str(placement(args.device, args.dtype)[1]).removeprefix("torch.")
        quantization = Quantization(8, compute_dtype=dtype) if args.bits == 8 else Quantization(4, "nf4", True, dtype)
    if not 0 <= args.image_cache_mib < float("inf"):
        parser.error(f"--image-cache-mib {args.image_cache_mib}: must be at least 0")
    limits = {"max_waiting": args.max_waiting, "max_rows": args.max_rows}
    limits["image_bytes"] = int(args.image_cache_mib * 2**20)
    engine = Engine.load(args.model, args.device, args.dtype, args.compression, quantization, **limits)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    app = make_app(engine, settings)
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_config=None,
        log_level="warning",
        access_log=False,  # the guard has a line for each request
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=LAST_SECONDS,
        timeout_keep_alive=KEEP_ALIVE,
    )
    Server(config, app.state.service, args.drain_seconds).run()


if __name__ == "__main__":
    cli.run(main, "api")
