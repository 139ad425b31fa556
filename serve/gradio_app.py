"""python -m serve.gradio_app --model DIR [--host 127.0.0.1] [--port 7860]

A chat in the browser: add pictures, ask, see the answer stream in, and beside it how the tower cut each picture into segments,
how many tokens that took, and how soon the first word came. A slider sets the budget of the next answer. Works without
internet and reports to nobody. With --api-url the model is elsewhere, behind `python -m serve.api`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import uvicorn
from starlette.middleware import Middleware

from llava_drip import cli
from llava_drip.engine import Engine
from llava_drip.images import MAX_BYTES
from serve.backends import Backend, LocalBackend
from serve.chat_look import CSS, theme
from serve.chat_page import make_page
from serve.page_key import OwnName, PageKey
from serve.server import bars_for_terminals_alone, leave_to_no_collector
from serve.settings import KEY, api_key, check_key, check_place, is_loopback, key_of_file, warn_of_no_key


def arguments() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="gradio_app", description="Chat with an assistant in the browser.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, help="folder of an assistant (config.json, *.safetensors)")
    where.add_argument(
        "--api-url", help=f"address of a running python -m serve.api; {KEY} has its key, if it asks for one"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--api-key-file",
        type=Path,
        help=f"the page asks for the key in its first line; with --model, {KEY} may have it instead",
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default bfloat16 on cuda, else float32")
    parser.add_argument(
        "--compression",
        type=float,
        help="patches per visual token; default: as the checkpoint says, else each image decides",
    )
    return parser


def make_backend(args) -> Backend:
    if args.api_url is not None:
        from serve.api_backend import ApiBackend  # with OpenAI's client, which takes a second

        return ApiBackend(args.api_url)
    engine = Engine.load(args.model, args.device, args.dtype, args.compression)
    return LocalBackend(engine, args.model.resolve().name)


def page_key(args) -> str | None:
    """What visitors are asked for. ValueError: two of them, or none where one is said to be."""
    if args.api_url is None:
        key = api_key(args.api_key_file)
    else:  # the environment's is that of the API
        key = args.api_key_file and key_of_file(args.api_key_file)
    if key is not None:
        check_key(key)
    return key


def middleware(host: str, key: str | None, started: threading.Event) -> list[Middleware]:
    if key is not None:
        return [Middleware(PageKey, key=key, started=started)]
    return [Middleware(OwnName)] if is_loopback(host) else []


def launch(page: gr.Blocks, host: str, port: int, key: str | None) -> str:
    """Serves the page by threads of this process; its address. key: visitors are asked for it; None: they are not."""
    started = threading.Event()
    uvicorn.config.HTTP_PROTOCOLS["auto"] = "serve.http_protocol:BoundedHttp"  # gradio makes its own configuration
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=MAX_BYTES,
        theme=theme(),
        css=CSS,
        app_kwargs={"middleware": middleware(host, key, started)},
    )
    started.set()
    return url


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if not 0 < args.port < 65536:
        parser.error(f"--port {args.port}: must be 1 to 65535")
    if args.api_url is not None:
        for name in ("device", "dtype", "compression"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} belongs to the server behind --api-url; give it there")

    key = page_key(args)
    warn_of_no_key("gradio_app", args.host, key)
    check_place(args.host, args.port)
    bars_for_terminals_alone()
    page = make_page(make_backend(args))
    leave_to_no_collector()
    url = launch(page, args.host, args.port, key)
    print(f"chat at {url}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    cli.run(main, "gradio_app")
