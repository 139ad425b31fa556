"""A server of this project's API (python -m serve.api) behind the chat page, by OpenAI's client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import queue
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence

import httpx
import openai
import torch
from openai import AsyncOpenAI
from PIL import Image

from llava_drip.engine import StreamEvent, Usage
from serve.backends import Busy, Failed, Seen, decoded
from serve.settings import KEY

SHORT_SIDE = 1024  # pixels; towers see fewer, and eight pictures have to fit into a request of 32 MB
TIMEOUT = httpx.Timeout(600, connect=10)  # an answer may wait in the server's queue, which has a limit of its own


class ApiBackend:
    """Answers through an API. The connections live in a loop of their own, so that an answer that nobody waits for can be hung up
    on at once, also before its first word."""

    def __init__(self, url: str, key: str | None = None):
        """url: of the server, with or without /v1. key: default: what LLAVA_DRIP_API_KEY says.

        Raises:
            ValueError: nobody answers there, the key is wrong, or it is another API.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--api-url {url}: must begin with http:// or https://")
        key = key or os.environ.get(KEY) or "none"
        self.client = AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True, name="api backend").start()
        try:
            models = self._wait(self._models())
            if len(models) != 1:
                raise ValueError(f"it serves {len(models)} models; a server of llava_drip has one")
            self.name = models[0]
            probe = Image.new("RGB", (32, 32), "red")
            seen = self.see(probe, None)
        except (ValueError, Busy, Failed) as error:
            raise ValueError(f"--api-url {url}: {error}") from error
        self.patches = seen.grid[0] * seen.grid[1]
        try:
            self.see(probe, 1.0)
            self.fixed = ""
        except ValueError as error:
            self.fixed = str(error)

    def stream(
        self,
        messages: Sequence[dict],
        paths: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        compression: float | None,
        cancel: threading.Event,
    ) -> Iterator[StreamEvent]:
        """As Backend.stream. first_token_ms is what passed here, the way there and the server's queue included."""
        started, pieces = time.perf_counter(), queue.SimpleQueue()
        body = {
            "model": self.name,
            "messages": with_pictures(messages, paths),
            "max_completion_tokens": max_new_tokens,
            "temperature": temperature,
            "extra_body": {} if compression is None else {"compression": compression},
        }
        usage = Usage(visual_tokens=0, patches=self.patches * len(paths), prompt_tokens=0)
        work = asyncio.run_coroutine_threadsafe(self._read(body, pieces), self.loop)
        first, written, finish = None, 0, None
        try:
            while not cancel.is_set():
                try:
                    item = pieces.get(timeout=0.05)
                except queue.Empty:
                    continue
                passed = 1000 * (time.perf_counter() - started)
                if item is None:
                    if finish is None:
                        raise Failed("The server hung up in the middle of the answer.")
                    usage = Usage(**{**vars(usage), "total_ms": passed, "finish": finish})
                    yield StreamEvent("", usage)
                    return
                if isinstance(item, BaseException):
                    raise self._translated(item) from item
                if item.choices and item.choices[0].delta.content:
                    first, written = first or passed, written + 1
                    usage = Usage(0, usage.patches, 0, written, first, passed)
                    yield StreamEvent(item.choices[0].delta.content, usage)
                if item.choices and item.choices[0].finish_reason:
                    finish = item.choices[0].finish_reason
                if item.usage is not None:
                    visual, patches = item.usage.visual_tokens, item.usage.patches  # ours, beside OpenAI's
                    usage = Usage(
                        visual, patches, item.usage.prompt_tokens, item.usage.completion_tokens, first, passed
                    )
            yield StreamEvent("", Usage(**{**vars(usage), "finish": "cancelled"}))
        finally:
            work.cancel()

    def see(self, image: Image.Image, compression: float | None) -> Seen:
        image = smaller(image)
        body = {"model": self.name, "image": data_url(image), "format": "json"}
        if compression is not None:
            body["compression"] = compression
        reply = self._wait(self.client.post("/images/segments", cast_to=object, body=body))
        width, height = reply["view"]
        left, top = (image.width - width) // 2, (image.height - height) // 2
        view = image.crop((left, top, left + width, top + height))
        owners = None if reply["segments"] is None else torch.tensor(reply["segments"])
        return Seen(reply["visual_tokens"], view, owners, tuple(reply["grid"]))

    async def _models(self) -> list[str]:
        return [model.id async for model in self.client.models.list()]

    async def _read(self, body: dict, pieces: queue.SimpleQueue) -> None:
        """Puts the chunks of an answer into `pieces`, then None, or the error that ended it."""
        try:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            async with await self.client.chat.completions.create(**body, **options) as chunks:
                async for chunk in chunks:
                    pieces.put(chunk)
        except Exception as error:
            pieces.put(error)
        else:
            pieces.put(None)

    def _wait(self, work: Coroutine):
        """The result of a short request."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self.loop).result()
        except (openai.OpenAIError, httpx.HTTPError) as error:
            raise self._translated(error) from error

    def _translated(self, error: BaseException) -> Exception:
        """An error of the client, as the page knows it."""
        if isinstance(error, (openai.APIConnectionError, httpx.HTTPError)):
            return Failed(f"The server at {self.url} cannot be reached.")
        if not isinstance(error, openai.APIError):
            return error
        said = error.body.get("message") if isinstance(error.body, dict) else None
        said = said or f"the server answered {getattr(error, 'status_code', 'with an error')}"
        kind = getattr(error, "status_code", None) or {"rate_limit_error": 429, "server_error": 500}.get(
            error.type, 400
        )
        if kind == 429:
            seconds = 5.0
            with contextlib.suppress(AttributeError, KeyError, ValueError):
                seconds = float(error.response.headers["Retry-After"])
            return Busy(seconds)
        return Failed(f"The server failed: {said}") if kind >= 500 else ValueError(said)


def with_pictures(messages: Sequence[dict], paths: Sequence[str]) -> list[dict]:
    """The engine's messages with the pictures of these files in their places → OpenAI's. Others than the user say texts alone."""
    left, found = iter(paths), []
    for message in messages:
        content = []
        for part in message["content"]:
            if part["type"] == "image":
                content.append({"type": "image_url", "image_url": {"url": url_of_file(next(left))}})
            else:
                content.append(part)
        found.append({"role": message["role"], "content": content})
    return found


def url_of_file(path: str) -> str:
    with decoded(path) as image:
        return data_url(smaller(image))


def smaller(image: Image.Image) -> Image.Image:
    """At most SHORT_SIDE pixels high or wide, whichever is less."""
    scale = SHORT_SIDE / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
