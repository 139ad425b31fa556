"""Chat templates (Jinja), and which characters of a rendered conversation are the assistant's.

`plain` and `vicuna_v1` follow the prompt formats of LLaVA (Liu et al., 2023) and Vicuna v1 (Chiang et al., 2023), which the
published weights were trained with. A language model that brings its own template keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llava_drip.conversation import write_chat

# Content is a string or a list of {"type": "image"} and {"type": "text", "text": ...} parts, as transformers has it.
_CONTENT = (
    "{%- macro content(message) -%}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ '<image>\n' }}{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)

# Alignment: the pictures, then the caption. What the user asked is left out.
PLAIN = (
    _CONTENT + "{{ bos_token or '' }}{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}"
    "{%- if message.content is not string -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ '<image>' }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- elif message.role == 'assistant' -%}{{ content(message) + '\n' }}{%- endif -%}{%- endfor -%}"
)

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _user_assistant(system: str) -> str:
    """USER: ... ASSISTANT: ...</s>, behind a system text unless the conversation brings its own."""
    system = system.replace("'", "\\'")
    return (
        _CONTENT + "{{ bos_token or '' }}"
        "{%- if messages[0].role != 'system' -%}{{ '" + system + "' }}{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}{{ content(message) }}"
        "{%- elif message.role == 'user' -%}{{ ' USER: ' + content(message) }}"
        "{%- else -%}{{ ' ASSISTANT: ' + content(message) + eos_token }}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"
    )


VICUNA_V1 = _user_assistant(VICUNA_SYSTEM)
BRIEF = _user_assistant("")  # for small models of our own: no system text to read each time

APPENDING = (PLAIN, VICUNA_V1, BRIEF)  # known to write each turn behind the others, whatever its text
TEMPLATES = {"plain": PLAIN, "vicuna_v1": VICUNA_V1, "v1": VICUNA_V1}  # v1: the same under LLaVA's name


def resolve_template(version: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text for `--version`: a name of TEMPLATES, or None for the tokenizer's own (vicuna_v1 if it has none)."""
    if version is None:
        return tokenizer.chat_template or VICUNA_V1
    if version not in TEMPLATES:
        raise ValueError(f"--version must be one of {sorted(TEMPLATES)}, got {version!r}")
    return TEMPLATES[version]


@dataclass
class Rendered:
    """A conversation as text, and the [start, end) character spans that the assistant says."""

    text: str
    spans: list[tuple[int, int]]


def text_of(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], template: str, add_generation_prompt: bool = False
) -> str:
    """A conversation as the template writes it, in training as in the engine. TemplateFailure: it cannot."""
    return write_chat(tokenizer, messages, template, add_generation_prompt)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], template: str) -> Rendered:
    """Render a conversation and find what the assistant says in it, the end-of-turn mark included.

    A span is what the template adds for an assistant turn beyond the prompt for it, so any template will do in which a longer
    conversation begins with the text of the shorter one.

    Args:
        messages: [{"role": "system" | "user" | "assistant", "content": ...}, ...].
        template: Jinja text.
    Raises:
        ValueError: the template rewrites earlier turns, so spans cannot be told.
    """
    text = text_of(tokenizer, messages, template)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = text_of(tokenizer, messages[:i], template, add_generation_prompt=True)
        answered = text_of(tokenizer, messages[: i + 1], template)
        if not (text.startswith(answered) and answered.startswith(prompt)):
            raise ValueError(
                f"the chat template rewrites earlier turns (at turn {i}); use --version vicuna_v1 or a template "
                "in which each turn is appended"
            )
        spans.append((len(prompt), len(answered)))
    return Rendered(text, spans)
