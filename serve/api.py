"""python -m serve.api --model DIR [--host 127.0.0.1] [--port 8000]

An assistant behind OpenAI's API: chat with pictures, streamed or whole, embeddings of pictures, and the segments that the model
saw.
docs/guides/serving.md says what of OpenAI's reference there is; SECURITY.md, what requests can and cannot do.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI

from llava_drip import cli
from llava_drip.assistant.quantization import Quantization
from llava_drip.engine import Engine, placement
from serve import chat_route, image_routes, service_routes
from serve.errors import HANDLERS
from serve.guard import Guard
from serve.server import Server, bars_for_terminals_alone, configured, end_with_stdin, leave_to_no_collector
from serve.service import Service
from serve.settings import KEY, Settings, api_key, check_place, is_loopback, warn_of_no_key


def make_app(engine: Engine, settings: Settings) -> FastAPI:
    """The API over an engine, which it closes at the end. `app.state.service` is its Service."""
    service = Service(engine, settings)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()
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


def load_engine(args) -> Engine:
    """The engine that flags ask for. args: has the attributes --model to --max-cached-tokens of `arguments`, by their names."""
    quantization = None
    if args.bits is not None:
        dtype = str(placement(args.device, args.dtype)[1]).removeprefix("torch.")
        quantization = Quantization(8, compute_dtype=dtype) if args.bits == 8 else Quantization(4, "nf4", True, dtype)
    if not 0 <= args.image_cache_mib < float("inf"):
        raise ValueError(f"--image-cache-mib {args.image_cache_mib}: must be at least 0")
    limits = {name: getattr(args, name) for name in ("max_waiting", "max_rows", "max_cached_tokens")}
    limits["image_bytes"] = int(args.image_cache_mib * 2**20)
    return Engine.load(args.model, args.device, args.dtype, args.compression, quantization, **limits)


def settings_of(args, key: str | None, loopback: bool) -> Settings:
    """args: as for `load_engine`; loopback: the server listens on this machine's own address alone."""
    return Settings(
        model=args.name or args.model.resolve().name,
        api_key=key,
        loopback_only=key is None and loopback,
        remote_images=args.remote_images,
        time_limit=args.time_limit,
        max_new_tokens=args.max_new_tokens,
        most_new_tokens=args.most_new_tokens,
        docs=args.docs,
    )


def arguments(prog: str, description: str) -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog=prog, description=description)
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
        "--most-new-tokens", type=int, help="that a request may ask for, as room is kept for them; default: any number"
    )
    parser.add_argument(
        "--max-waiting", type=int, default=64, help="requests in the queue; one more is refused with 429"
    )
    parser.add_argument("--max-rows", type=int, default=64, help="requests that the model works on at once")
    parser.add_argument(
        "--max-cached-tokens",
        type=int,
        help="whose keys and values are held; default: what half of the free GPU memory holds, or 2 GiB of a CPU's",
    )
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
    parser = arguments("api", "Serve an assistant behind OpenAI's API.")
    parser.add_argument(
        "--worker-socket",
        type=Path,
        metavar="PATH",
        help="as serve.supervisor starts it: listen on this Unix socket instead, and end when stdin is closed",
    )
    args = parser.parse_args()
    if not 0 <= args.port < 65536:
        parser.error(f"--port {args.port}: must be 0 to 65535")
    key = api_key(args.api_key_file)
    settings = settings_of(args, key, is_loopback(args.host) and args.worker_socket is None)
    warn_of_no_key("api", args.host, key)
    if args.worker_socket is None:
        check_place(args.host, args.port)
    else:
        end_with_stdin(args.worker_socket)
    bars_for_terminals_alone()
    engine = load_engine(args)

    app = make_app(engine, settings)
    leave_to_no_collector()
    place = {"host": args.host, "port": args.port} if args.worker_socket is None else {"uds": str(args.worker_socket)}
    Server(configured(app, **place), app.state.service, args.drain_seconds).run()


if __name__ == "__main__":
    cli.run(main, "api")
