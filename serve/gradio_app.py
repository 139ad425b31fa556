"""python -m serve.gradio_app --model DIR [--host 127.0.0.1] [--port 7860]

A chat in the browser: add pictures, ask, see the answer stream in, and beside it how the tower cut each picture into segments,
how many tokens that took, and how soon the first word came. A slider sets the budget of the next answer. Works without
internet and reports to nobody. With --api-url the model is elsewhere, behind `python -m serve.api`.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

from llava_drip import cli
from llava_drip.engine import Engine
from llava_drip.images import MAX_BYTES
from serve.backends import Backend, LocalBackend
from serve.chat_look import CSS, theme
from serve.chat_page import make_page


def arguments() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="gradio_app", description="Chat with an assistant in the browser.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, help="folder of an assistant (config.json, *.safetensors)")
    where.add_argument(
        "--api-url", help="address of a running python -m serve.api; LLAVA_DRIP_API_KEY has its key, if it asks for one"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too, without a password")
    parser.add_argument("--port", type=int, default=7860)
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


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if not 0 < args.port < 65536:
        parser.error(f"--port {args.port}: must be 1 to 65535")
    if args.api_url is not None:
        for name in ("device", "dtype", "compression"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} belongs to the server behind --api-url; give it there")

    page = make_page(make_backend(args))
    _, url, _ = page.launch(
        server_name=args.host,
        server_port=args.port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=MAX_BYTES,
        theme=theme(),
        css=CSS,
    )
    print(f"chat at {url}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    cli.run(main, "gradio_app")
