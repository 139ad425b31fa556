"""Which model there is, and how the server is: /v1/models, /health, /ready, /metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from serve.errors import busy
from serve.reply_types import ErrorBody, Model, ModelList
from serve.service import Service, service_of

router = APIRouter()
Here = Annotated[Service, Depends(service_of)]


def model_of(service: Service) -> Model:
    return Model(id=service.settings.model, created=service.created)


@router.get("/v1/models", tags=["OpenAI"])
async def models(service: Here) -> ModelList:
    """The one model that is served."""
    return ModelList(data=[model_of(service)])


@router.get("/v1/models/{model:path}", tags=["OpenAI"], responses={404: {"model": ErrorBody}})
async def model(model: str, service: Here) -> Model:
    service.check_model(model)
    return model_of(service)


@router.get("/health", tags=["operation"], response_class=PlainTextResponse)
async def health() -> Response:
    """200 as long as the process answers."""
    return PlainTextResponse("ok\n")


@router.get("/ready", tags=["operation"], response_class=PlainTextResponse, responses={503: {"model": ErrorBody}})
async def ready(service: Here) -> Response:
    """200 while requests are taken, 503 once the server shuts down."""
    if service.draining:
        raise busy("the server is shutting down", 5, 503, "shutting_down")
    return PlainTextResponse("ready\n")


@router.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
async def metrics(service: Here) -> Response:
    """Counts and times in Prometheus' text format."""
    return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})
