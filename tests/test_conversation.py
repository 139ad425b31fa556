"""The engine writes a conversation as training did, whatever the template reads and the tokenizer adds."""

from __future__ import annotations

import pytest
from PIL import Image
from tokenizers.processors import TemplateProcessing

from llava_drip.assistant import modeling
from llava_drip.conversation import PlainText, TemplateFailure, checked_turns, user_turn
from llava_drip.engine import Engine
from llava_drip.instruct.data import encode_conversation, to_messages
from llava_drip.instruct.templates import PLAIN, VICUNA_V1, render
from llava_drip.scheduling import preparation

TEXT_ALONE = (
    "{%- for m in messages -%}{{ '[' + m.role + '] ' + m.content + '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[assistant] ' }}{%- endif -%}"
)
CHATML = (  # as many models have it: it writes no start mark
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]


@pytest.fixture
def engine(tiny_checkpoint) -> Engine:
    return Engine.load(tiny_checkpoint, device="cpu")


@pytest.mark.parametrize("template", [TEXT_ALONE, CHATML, VICUNA_V1])
def test_the_engines_prompt_is_trainings(template, engine):
    engine.processor.chat_template = template
    prompt = engine._prompt([user_turn("What is this?")], [Image.new("RGB", (64, 64))])
    rendered = render(engine.processor.tokenizer, to_messages({"conversations": TALK}), template)
    assert rendered.text.startswith(prompt) and "<image>\nWhat is this?" in prompt and "'type'" not in prompt
    assert rendered.spans[0][0] == len(prompt)
    engine.processor.chat_template = {"default": template, "other": ""}
    assert engine._prompt([user_turn("What is this?")], [Image.new("RGB", (64, 64))]) == prompt
    engine.processor.chat_template = "{{ raise_exception('no\npictures') }}"
    with pytest.raises(TemplateFailure, match="no pictures"):
        engine._prompt([user_turn("What is this?")], [Image.new("RGB", (64, 64))])


@pytest.mark.parametrize("template", [CHATML, PLAIN, VICUNA_V1])
@pytest.mark.parametrize("adds", [True, False], ids=["adds <s>", "adds nothing"])
def test_the_model_reads_the_ids_of_training(template, adds, engine, monkeypatch):
    tokenizer = engine.processor.tokenizer
    if adds:  # as LLaMA's does, by itself
        start = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = start
        assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    engine.processor.chat_template = template
    read = []
    expand, splice = modeling.expand_placeholders, preparation.splice
    # A batch's way, and a stream's.
    monkeypatch.setattr(modeling, "expand_placeholders", lambda ids, *rest: read.append(ids) or expand(ids, *rest))
    monkeypatch.setattr(
        preparation, "splice", lambda model, ids, *rest: read.append(ids[None]) or splice(model, ids, *rest)
    )
    request = ([user_turn("What is this?")], [Image.new("RGB", (64, 64))])
    engine.answer_batch([request], 1)
    list(engine.stream(*request, max_new_tokens=1))
    ids, labels = encode_conversation(engine.processor, to_messages({"conversations": TALK}), template)
    for prompt in (row.tolist() for batch in read for row in batch):
        assert ids[: len(prompt)] == prompt
        assert set(labels[: len(prompt)]) == {-100} and labels[len(prompt)] == ids[len(prompt)]
    assert len(read) == 2 and ids.count(tokenizer.bos_token_id) == (template != CHATML)


@pytest.mark.parametrize("template", [CHATML, VICUNA_V1])
def test_a_special_token_over_several_text_parts_is_only_text(template, engine):
    engine.processor.chat_template = template
    tokenizer = engine.processor.tokenizer
    special = [engine.processor.image_token, *tokenizer.all_special_tokens]
    counts = lambda text: [tokenizer(text, add_special_tokens=False)["input_ids"].count(i) for i in ids]  # noqa: E731
    ids = tokenizer.convert_tokens_to_ids(special)
    write = lambda parts: engine._prompt([{"role": "user", "content": parts}], [])  # noqa: E731
    expected = counts(write([{"type": "text", "text": "x"}]))
    for token in special:
        for cut in range(1, len(token)):
            for pieces in ((token[:cut], token[cut:]), (token[:cut], "", token[cut:]), tuple(token)):
                parts = [{"type": "text", "text": piece} for piece in pieces]
                assert counts(write(parts)) == expected, pieces
                assert [part["text"] for part in parts] == list(pieces), "the caller's own"


def test_a_special_token_with_space_around_is_taken_apart(engine):
    engine.processor.tokenizer.add_special_tokens({"additional_special_tokens": [" <far> "]})
    assert "<far>" not in PlainText(engine.processor)("a  <far>  b")


def test_text_parts_are_joined_around_pictures(engine):
    texts = [{"type": "text", "text": text} for text in ("a", "b", "c", "d")]
    content = [texts[0], texts[1], {"type": "image"}, texts[2], texts[3]]
    (turn,) = checked_turns([{"role": "user", "content": content}], 1, engine.plain)
    assert turn["content"] == [{"type": "text", "text": "ab"}, {"type": "image"}, {"type": "text", "text": "cd"}]
