"""What the API answers: OpenAI's objects, with what ours adds to them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Usage(BaseModel):
    """OpenAI's fields, then ours."""

    prompt_tokens: int = Field(description="Text and visual tokens read, once however many choices there are.")
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[Literal["cached_tokens"], int]
    visual_tokens: int = Field(description="Of prompt_tokens those of pictures.")
    patches: int = Field(description="As many visual tokens a dense tower would have made.")
    first_token_ms: float | None = Field(None, description="From the start of the work to the first token.")


class Said(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: Said
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="base64: of little-endian float32.")


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    visual_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Segments(BaseModel):
    """How the tower divided a picture. The grid lies over `view`, the part of the picture that the tower saw."""

    object: Literal["image.segments"] = "image.segments"
    model: str
    visual_tokens: int
    patches: int
    grid: tuple[int, int] = Field(description="Rows and columns of patches.")
    view: tuple[int, int] = Field(
        description="Width and height, in the picture's pixels, of what the tower saw: its centre."
    )
    segments: list[int] | None = Field(
        description="The token of each patch, in raster order; -1: it went into none. null: this tower's tokens are no segments."
    )


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llava_drip"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
