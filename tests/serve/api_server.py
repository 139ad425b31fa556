"""The API for tests: its process, an app on loopback within this one, and the requests of its clients."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import uvicorn
from fastapi import FastAPI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from serve.http_protocol import BoundedHttp

MODEL = "small-model"


def data_url(image: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def asking(text: str, *urls: str) -> list[dict]:
    """A conversation of one question about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def chat(text: str = "Hello", *urls: str, **fields) -> dict:
    """The body of a chat request, greedy and short unless fields say otherwise."""
    return {"model": MODEL, "messages": asking(text, *urls), "temperature": 0, "max_tokens": 4, **fields}


def client_of(url: str, key: str = "none", retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries, timeout=60)


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it holds within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def process(
    repository: Path, model: Path, *flags: str, program: str = "serve.api", **environment: str
) -> Iterator[subprocess.Popen]:
    """The API on a free port, as `program` serves it: its `url`, and `log`, the file of what it says on stderr. It is killed at
    the end."""
    command = [sys.executable, "-m", program, "--model", str(model), "--device", "cpu", "--port", "0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository), **environment}
    with open(model.parent / f"api-{time.monotonic_ns()}.log", "w+") as log:
        server = subprocess.Popen(
            command, cwd=repository, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            line = server.stdout.readline()
            found = re.search(r"api at (http://\S+)/v1", line)
            assert found, f"the server ended before it was ready: {line}{Path(log.name).read_text()}"
            server.url, server.log = found[1], Path(log.name)
            yield server
        finally:
            server.kill()
            server.wait(30)
            server.stdout.close()


@contextlib.contextmanager
def on_loopback(app: FastAPI, **place: object) -> Iterator[str]:
    """The app behind uvicorn, in a thread; its address. place: where else it is to be, as uds."""
    place = place or {"host": "127.0.0.1", "port": 0}
    http = {"http": BoundedHttp, "ws": "none"}  # as serve.server has it
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2, **http, **place))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    try:
        assert until(lambda: server.started, 20)
        address = server.servers[0].sockets[0].getsockname()
        yield address if isinstance(address, str) else f"http://127.0.0.1:{address[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def metric(url: str, name: str, headers: dict | None = None) -> float:
    """The sum of a metric's series, 0 where there is none."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", headers=headers, trust_env=False).text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)
