"""The engine writes a conversation as training did, whatever the template reads."""

from __future__ import annotations

import pytest
from PIL import Image

from llava_drip.conversation import TemplateFailure, user_turn
from llava_drip.engine import Engine
from llava_drip.instruct.data import to_messages
from llava_drip.instruct.templates import VICUNA_V1, render

TEXT_ALONE = (
    "{%- for m in messages -%}{{ '[' + m.role + '] ' + m.content + '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[assistant] ' }}{%- endif -%}"
)


@pytest.mark.parametrize("template", [TEXT_ALONE, VICUNA_V1])
def test_the_engines_prompt_is_trainings(template, tiny_checkpoint):
    engine = Engine.load(tiny_checkpoint, device="cpu")
    engine.processor.chat_template = template
    prompt = engine._prompt([user_turn("What is this?")], [Image.new("RGB", (64, 64))])
    talk = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]
    rendered = render(engine.processor.tokenizer, to_messages({"conversations": talk}), template)
    assert rendered.text.startswith(prompt) and "<image>\nWhat is this?" in prompt and "type" not in prompt
    assert rendered.spans[0][0] == len(prompt)
    engine.processor.chat_template = {"default": template, "other": ""}
    assert engine._prompt([user_turn("What is this?")], [Image.new("RGB", (64, 64))]) == prompt
    engine.processor.chat_template = "{{ raise_exception('no\npictures') }}"
    with pytest.raises(TemplateFailure, match="no pictures"):
        engine._prompt([user_turn("What is this?")], [Image.new("RGB", (64, 64))])
