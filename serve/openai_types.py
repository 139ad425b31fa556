"""What the API takes, after OpenAI's reference, with the budget that it adds.

A field of OpenAI's that would change the answer and is not supported is refused by name, unless it has the value that changes
nothing; one that changes nothing is ignored (IGNORED); one that nobody knows is refused too, as a misspelt one would be.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

MAX_PICTURES = 8  # of one request
MAX_CHOICES = 8
MAX_MESSAGES = 1000
MAX_TEXT = 400_000  # characters of one request, beyond most contexts: what is longer is not worth counting in tokens

RED_DOT = (  # a red square of 32 x 32 pixels, so that the examples of the docs run as they stand
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAALUlEQVR4nGO8oyHHQEvARFPTRy0YtWDUglELRi0YtWDU"
    "glELRi0YtWDUAioCAEu7AWJWoEDrAAAAAElFTkSuQmCC"
)
# Neither changes the answer of this server.
IGNORED = frozenset(
    ("user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier")
    + ("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention")
)
# Each with the values that ask for nothing.
NOT_SUPPORTED: dict[str, tuple] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "moderation": (),
    "dimensions": (),
}


def asks_nothing(name: str, value: Any) -> bool:
    return value is None or value in NOT_SUPPORTED[name]


def check_unicode(data: Any) -> None:
    """JSON can spell half a character ("\\ud800"), which neither a tokenizer nor an error's text can hold."""
    left = [data]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            left += item
        elif isinstance(item, str) and not item.isascii():
            try:
                item.encode()
            except UnicodeEncodeError:
                raise PydanticCustomError(
                    "unicode", "the body has half of a surrogate pair, which is no character", {"code": "invalid_value"}
                ) from None


def _one_or_many(value: Any) -> str:
    """Which member of a union of a text and a list is meant, so that an error speaks of that one."""
    return "parts" if isinstance(value, list) else "text"


class Strict(BaseModel):
    """A part of a request: an unknown field is refused, NaN is no number."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Asked(BaseModel):
    """A whole request: see the module."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        check_unicode(data)
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in NOT_SUPPORTED:
                if not asks_nothing(name, value):
                    raise PydanticCustomError(
                        "unsupported",
                        "{name} is not supported here and would change the answer; leave it out",
                        {"name": name, "code": "unsupported_parameter"},
                    )
            elif name not in IGNORED:
                raise PydanticCustomError(
                    "unknown",
                    "there is no field {name}; /openapi.json lists those that there are",
                    {"name": name[:64], "code": "unknown_parameter"},
                )
        return kept


class Budgeted(Asked):
    """A request with pictures and a budget for their tokens."""

    model: str = Field(description="The model's name, as /v1/models gives it.", max_length=256)
    compression: float | None = Field(
        None,
        ge=1,
        le=1e6,
        description="Ours: patches per visual token, for each picture. Without it as the server was started.",
    )
    max_visual_tokens: int | None = Field(
        None, ge=1, le=2**31, description="Ours: at most so many visual tokens for each picture."
    )

    @model_validator(mode="after")
    def _one_budget(self):
        if self.compression is not None and self.max_visual_tokens is not None:
            raise PydanticCustomError(
                "budget",
                "compression and max_visual_tokens are two ways to say one thing; give one of them",
                {"code": "conflicting_parameters"},
            )
        return self


class ImageUrl(Strict):
    url: str = Field(
        description="data:image/png;base64,... (JPEG, PNG or WebP), or an address where the server allows it."
    )
    detail: Literal["auto", "low", "high"] | None = Field(
        None, description="Ignored: compression or max_visual_tokens says how many tokens a picture gets."
    )


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Text = Annotated[str, Tag("text")]
TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES), Tag("parts")]
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_MESSAGES), Tag("parts")]


class UserMessage(Strict):
    role: Literal["user"]
    content: Annotated[Text | Parts, Discriminator(_one_or_many)]
    name: str | None = Field(None, description="Ignored.")


class OtherMessage(Strict):
    """What is said beside the user: texts alone."""

    role: Literal["system", "developer", "assistant"] = Field(description="developer is read as system.")
    content: Annotated[Text | TextParts, Discriminator(_one_or_many)]
    name: str | None = Field(None, description="Ignored.")
    # As a reply has them, so that it can be sent back as it came. Ones with a value would change the answer.
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    annotations: None = None


Message = Annotated[
    Annotated[UserMessage, Tag("user")] | Annotated[OtherMessage, Tag("other")],
    Discriminator(lambda value: "user" if _role(value) == "user" else "other"),
]


def _role(value: Any) -> Any:
    return value.get("role") if isinstance(value, dict) else getattr(value, "role", None)


StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Field(max_length=4), Tag("parts")]
Url = Annotated[str, Field(min_length=1)]
Urls = Annotated[list[Url], Field(min_length=1, max_length=MAX_PICTURES), Tag("parts")]


class StreamOptions(Strict):
    include_usage: bool | None = Field(None, description="A last chunk with the usage.")
    include_obfuscation: bool | None = Field(None, description="Ignored.")


class ChatRequest(Budgeted):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "assistant",
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "text", "text": "What colour is it?"},
                                {"type": "image_url", "image_url": {"url": RED_DOT}},
                            ],
                        }
                    ],
                    "temperature": 0,
                    "max_completion_tokens": 32,
                }
            ]
        }
    )

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(
        None, ge=0, le=2, description="0 takes the likeliest token. Default 1, as OpenAI's."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31, description="OpenAI's older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    stop: Annotated[Annotated[StopString, Tag("text")] | StopStrings, Discriminator(_one_or_many)] | None = Field(
        None, description="The answer ends before the first of these strings."
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="The same answer for the same request.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def _fits(self):
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "limits",
                "max_tokens and max_completion_tokens differ; give one of them",
                {"code": "conflicting_parameters"},
            )
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream", "stream_options needs stream: true", {"code": "conflicting_parameters"})
        return self


class EmbeddingRequest(Budgeted):
    """POST /v1/embeddings: pictures by the vision tower. Texts have no embedding here."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "assistant", "input": [RED_DOT]}]})

    input: Annotated[Annotated[Url, Tag("text")] | Urls, Discriminator(_one_or_many)] = Field(
        description="A picture, or up to 8, each as ImageUrl.url."
    )
    encoding_format: Literal["float", "base64"] | None = "float"


class SegmentsRequest(Budgeted):
    """POST /v1/images/segments, ours: how the tower divides a picture."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "assistant", "image": RED_DOT, "format": "json", "compression": 4}]}
    )

    image: str = Field(min_length=1, description="As ImageUrl.url.")
    format: Literal["json", "png"] = Field("json", description="png: the picture with its segments drawn.")
