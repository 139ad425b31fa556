"""What goes between a caller and the scheduler: the usage of a reply, its pieces, and what can go wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Finish = Literal["stop", "length", "cancelled", "timeout"]


@dataclass(frozen=True)
class Usage:
    """What a reply took.

    Attributes:
        visual_tokens: tokens of all the conversation's images together, as the language model read them.
        patches: of the same images; a dense tower would have made each one a token.
        prompt_tokens: text and visual tokens of the conversation.
        new_tokens: tokens written so far.
        first_token_ms: from the start of the work (after any wait for other requests) to the first token; of a batch,
            to the first token of all its rows. None before there is one.
        total_ms: from the same start until now.
        finish: None while it runs; "stop" (the model ended, or wrote a stop string), "length" (max_new_tokens or context
            full), "cancelled", "timeout" (the request's time limit). A stop string of the checkpoint stays in the text, one
            of the request does not.
        cached_tokens: of prompt_tokens, those whose keys and values were kept from an earlier conversation.
        waited_ms: in the queue, before the start of the work.
    """

    visual_tokens: int
    patches: int
    prompt_tokens: int
    new_tokens: int = 0
    first_token_ms: float | None = None
    total_ms: float = 0.0
    finish: Finish | None = None
    cached_tokens: int = 0
    waited_ms: float = 0.0


@dataclass(frozen=True)
class StreamEvent:
    """A piece of the reply and the usage up to it. The last event of a stream has no text, and `usage.finish` set."""

    text: str
    usage: Usage


class QueueFull(RuntimeError):
    """Too many requests wait already.

    Attributes:
        retry_after: estimated seconds until there is room, at least 1.
    """

    def __init__(self, waiting: int, retry_after: float):
        why = f"{waiting} requests wait already" if waiting else "every place is taken"
        super().__init__(f"{why}; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class WorkFailed(RuntimeError):
    """A step of the running batch failed (out of memory, say). It says nothing about the request, which may be sent again."""
