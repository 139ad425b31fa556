"""Conversations from outside → turns for the chat template, in which a user's words can be nothing but words.

A tokenizer reads "<image>", "</s>" and the like in running text as the special tokens themselves. In a user's text they
would be images that do not exist, or ends of turns; so they are taken apart before the text reaches the template. Text parts
that follow each other are joined first, as the template would, lest one hold "</" and the next "s>".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from llava_drip.assistant.processing import IMAGE_TOKEN

ROLES = ("system", "user", "assistant")


class PlainText:
    """Takes special tokens apart: `plain("<image>")` is "< image>", which the tokenizer reads as text."""

    def __init__(self, processor):
        """processor: LlavaDripProcessor, whose tokenizer says which tokens are special."""
        tokenizer = processor.tokenizer
        special = {processor.image_token, *tokenizer.all_special_tokens}
        special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        # Without space around: a space before the rest would leave such a token whole.
        special = {token.strip() for token in special}
        longest_first = sorted((token for token in special if len(token) > 1), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))

    def __call__(self, text: str) -> str:
        # Again until nothing is found: a token may begin inside another one.
        while (apart := self.pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)) != text:
            text = apart
        return text


def user_turn(text: str, images: int = 1) -> dict:
    """A user's message in transformers' form: so many pictures, then the text."""
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def checked_turns(messages: Sequence[dict], images: int, plain: PlainText) -> list[dict]:
    """Messages in transformers' form → the same with every content a list of parts, and with plain text, in one part where
    several follow each other.

    Args:
        messages: [{"role": "system" | "user" | "assistant", "content": text or parts}, ...]; a part is
            {"type": "image"} or {"type": "text", "text": "..."}.
        images: how many pictures come with them.

    Raises:
        ValueError: naming the message and part, or the two numbers of images.
    """
    if not messages:
        raise ValueError("messages: there are none")
    turns, wanted = [], 0
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{where}: needs a role, one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, (list, tuple)):
            raise ValueError(f"{where}: content must be text or a list of parts")
        parts = []
        for place, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image":
                wanted += 1
                parts.append({"type": "image"})
            elif kind == "text" and isinstance(part.get("text"), str):
                before = parts.pop()["text"] if parts and parts[-1]["type"] == "text" else ""
                parts.append({"type": "text", "text": before + part["text"]})
            else:
                raise ValueError(f'{where}.content[{place}]: must be {{"type": "image"}} or a text part')
        for part in parts:
            if part["type"] == "text":
                part["text"] = plain(part["text"])
        turns.append({"role": message["role"], "content": parts})
    if wanted != images:
        raise ValueError(f"messages have {wanted} image parts, but {images} images are given")
    return turns


class TemplateFailure(ValueError):
    """A chat template cannot write a conversation: it refuses it, or is no template for it."""


def write_chat(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict], template: str | dict, add_generation_prompt: bool = False
) -> str:
    """A conversation as a chat template writes it, whether the template reads parts or, as a text model's, strings.

    turns: messages whose content is a list of parts. For a template that reads strings the parts are joined in their order,
        an image as "<image>" and a line break.
    Raises:
        TemplateFailure: the template raised something; the message is one line.
    """
    if isinstance(template, dict):  # several named ones, as transformers has them
        template = template.get("default")
    if not reads_parts(tokenizer, template):
        turns = [{**turn, "content": joined(turn["content"])} for turn in turns]
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program from outside, and may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise TemplateFailure(f"the chat template cannot write this conversation ({reason})") from None


def joined(content: str | Sequence[dict]) -> str:
    """Parts as one string."""
    if isinstance(content, str):
        return content
    return "".join(f"{IMAGE_TOKEN}\n" if part["type"] == "image" else part["text"] for part in content)


@lru_cache(maxsize=8)
def reads_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template takes content as a list of parts, tried with a conversation.

    A template for strings raises at a list, leaves it out, or writes its repr. One that fails with strings as well counts as
    reading parts.
    """

    def written(as_parts: bool) -> str | None:
        turns = [{"role": role, "content": text} for role, text in (("user", "Ping?"), ("assistant", "Pong."))]
        if as_parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        try:
            return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
        except Exception:  # any: see write_chat
            return None

    def clean(text: str | None) -> bool:  # the answer alone: our template `plain` leaves out what the user says
        return text is not None and "Pong." in text and not re.search(r"""['"]type['"]""", text)

    return clean(written(as_parts=True)) or not clean(written(as_parts=False))
