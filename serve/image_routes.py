"""Pictures without a conversation: /v1/embeddings by the vision tower, and /v1/images/segments, what the model saw of one."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Coroutine
from typing import TypeVar

import anyio
from fastapi import APIRouter, Request
from starlette.responses import Response

from llava_drip.draw.overlay import draw_segments
from serve.errors import busy, late
from serve.leaving import ClientGone, unless_gone
from serve.openai_types import EmbeddingRequest, SegmentsRequest
from serve.reply_types import Embedding, EmbeddingList, EmbeddingUsage, ErrorBody, Segments
from serve.service import Service
from serve.service_routes import Here
from serve.work import refusals

router = APIRouter()
ERRORS = {status: {"model": ErrorBody} for status in (400, 401, 404, 413, 429, 500, 503)}
MAX_WAITING = 32  # requests, the one that the tower works on included
DRAWN_PIXELS = 1024  # longer side of a drawn picture
T = TypeVar("T")


@router.post("/v1/embeddings", tags=["OpenAI"], response_model=EmbeddingList, responses=ERRORS)
async def embeddings(request: Request, body: EmbeddingRequest, service: Here):
    """Pictures as vectors of length 1."""
    service.check_model(body.model)
    urls = [body.input] if isinstance(body.input, str) else body.input

    async def work() -> EmbeddingList:
        names = ["input"] if isinstance(body.input, str) else [f"input[{i}]" for i in range(len(urls))]
        images = [await service.pictures.decode(url, name) for url, name in zip(urls, names)]
        budget = {"compression": body.compression, "max_visual_tokens": body.max_visual_tokens}
        vectors, counts = await see(service, lambda: service.engine.embed(images, **budget))
        rows = [vector.numpy().astype("<f4") for vector in vectors]
        if body.encoding_format == "base64":
            data = [base64.b64encode(row.tobytes()).decode() for row in rows]
        else:
            data = [row.tolist() for row in rows]
        usage = EmbeddingUsage(prompt_tokens=sum(counts), total_tokens=sum(counts), visual_tokens=sum(counts))
        found = [Embedding(index=number, embedding=row) for number, row in enumerate(data)]
        return EmbeddingList(data=found, model=body.model, usage=usage)

    return await in_time(request, service, work())


@router.post(
    "/v1/images/segments",
    tags=["llava_drip"],
    response_model=Segments,
    responses={200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}, **ERRORS},
)
async def segments(request: Request, body: SegmentsRequest, service: Here):
    """How the tower divides a picture into tokens: one number a patch, or a drawing."""
    service.check_model(body.model)
    engine = service.engine

    async def work() -> Segments | Response:
        image = await service.pictures.decode(body.image, "image")
        budget = {"compression": body.compression, "max_visual_tokens": body.max_visual_tokens}
        (count, owners, grid), view = await see(service, lambda: (engine.segments(image, **budget), engine.view(image)))
        if body.format == "json":
            listed = None if owners is None else owners.tolist()
            numbers = {"visual_tokens": count, "patches": engine.patches, "grid": grid, "view": view.size}
            return Segments(model=body.model, segments=listed, **numbers)

        def drawn() -> Response:
            view.thumbnail((DRAWN_PIXELS, DRAWN_PIXELS))
            picture = view if owners is None else draw_segments(view, owners, grid, fill="tint")
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            headers = {"X-Visual-Tokens": str(count), "X-Patches": str(engine.patches)}
            return Response(buffer.getvalue(), media_type="image/png", headers=headers)

        return await service.seers.run(drawn)

    return await in_time(request, service, work())


async def in_time(request: Request, service: Service, work: Coroutine[None, None, T]) -> T | Response:
    """Its result, unless the client leaves. ApiError: its time is up."""
    limit = service.settings.time_limit
    try:
        with anyio.fail_after(limit):
            return await unless_gone(request, work)
    except TimeoutError:
        raise late(limit) from None
    except ClientGone:
        return Response(status_code=499)


async def see(service: Service, work: Callable[[], T]) -> T:
    """Runs what uses the tower beside the conversations. ApiError: too many wait, or what the engine refuses."""
    if service.seers.count >= MAX_WAITING:
        raise busy("too many pictures wait already; try again later", 1)
    with refusals("of a picture"):
        return await service.seers.run(work)
