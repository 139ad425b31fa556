"""The processor: pictures and placeholders row by row."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from llava_drip.assistant import LlavaDripProcessor

from .conftest import picture


def test_batch(assistant, rows):
    _, processor = assistant
    text, images = rows
    inputs = processor(text=text, images=images)
    assert inputs["pixel_values"].shape == (4, 3, 64, 64)
    per_row = ((inputs["input_ids"] == processor.image_token_id) & inputs["attention_mask"].bool()).sum(1)
    assert per_row.tolist() == [1, 0, 2, 1]
    assert (inputs["attention_mask"][:, -1] == 1).all(), "left padding"
    right = processor(text=text, images=images, padding_side="right")
    assert (right["attention_mask"][:, 0] == 1).all()
    flat = processor(text=text, images=[p for row in images for p in row])
    assert torch.equal(flat["pixel_values"], inputs["pixel_values"])


def test_one_row_one_picture(assistant):
    _, processor = assistant
    inputs = processor(text="<image> What?", images=picture(1))
    assert inputs["input_ids"].shape[0] == 1 and inputs["pixel_values"].shape[0] == 1


def test_text_alone_has_no_pixels(assistant):
    _, processor = assistant
    assert set(processor(text=["What?", "Why is it so?"])) == {"input_ids", "attention_mask"}


def test_pixels_are_normalised_with_the_towers_statistics(assistant):
    _, processor = assistant
    pixels = processor(text="<image>", images=picture(0))["pixel_values"]
    assert pixels.min() >= -1 and pixels.max() <= 1 and pixels.min() < -0.5  # mean and std 0.5


@pytest.mark.parametrize(
    "template", ["{{ bos_token }}{{ messages[0].content[0].text }}", "{{ messages[0].content[0].text }}"]
)
@pytest.mark.parametrize("adds", [True, False])
def test_the_start_mark_is_the_templates_affair(assistant, template, adds):
    """Whatever the tokenizer adds to a text by itself: transformers' own chat templates leave that out too."""
    _, processor = assistant
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token_id
    if adds:
        start = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
        tokenizer.backend_tokenizer.post_processor = start
    processor.chat_template = template
    messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    prompt = processor.apply_chat_template(messages, tokenize=False)
    expected = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=False)
    assert expected.count(bos) == ("bos_token" in template)
    assert processor(text=prompt)["input_ids"][0].tolist() == expected
    whole = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert torch.as_tensor(whole).flatten().tolist() == expected
    bare = processor(text="What?", add_special_tokens=True)["input_ids"][0].tolist()
    assert bare.count(bos) == adds


@pytest.mark.parametrize(
    "text, images, message",
    [
        (["<image> a", "b", "c"], [[1], [1], []], "row 1 has 0 <image> and 1 images"),
        (["<image> a", "<image> b"], [[1], []], "row 1 has 1 <image> and 0 images"),
        (["<image><image> a", "b"], [[1], []], "row 0 has 2 <image> and 1 images"),
        (["<image> a", "<image> b"], [1], "row 1 has 1 <image>"),
        (["a", "b"], [1], "row 1 has 0 <image>"),
        (["a", "<image> b"], None, "row 1 has 1 <image>"),
    ],
)
def test_a_wrong_number_of_pictures_names_the_row(assistant, text, images, message):
    _, processor = assistant

    def pictures(entry):
        return [picture(1) for _ in entry] if isinstance(entry, list) else picture(1)

    with pytest.raises(ValueError, match=message):
        processor(text=text, images=None if images is None else [pictures(entry) for entry in images])


@pytest.mark.parametrize(
    "shape, message",
    [
        ([[1, 1]], "images holds 1 lists and text 2 rows"),
        ([[1], [1], []], "images holds 3 lists and text 2 rows"),
        ([[1], 1], r"images\[1\] is one picture among lists"),
    ],
)
def test_lists_of_pictures_that_do_not_match_the_rows(assistant, shape, message):
    _, processor = assistant
    images = [[picture(1) for _ in row] if isinstance(row, list) else picture(1) for row in shape]
    with pytest.raises(ValueError, match=message):
        processor(text=["<image> a", "<image> b"], images=images)
    assert processor(text=["<image> a", "b"], images=[[picture(1)], None])["pixel_values"].shape[0] == 1


def test_a_tokenizer_without_the_placeholder_is_refused(tiny_tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(ValueError, match="has no <image> token"):
        LlavaDripProcessor(CLIPImageProcessor(), tiny_tokenizer)
