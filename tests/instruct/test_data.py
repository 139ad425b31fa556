"""Conversation files: bad rows are named, good ones become ids, labels and pixels."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.conversation import PlainText, checked_turns
from llava_drip.instruct.data import Collator, ConversationDataset, load_records, to_messages
from llava_drip.instruct.templates import VICUNA_V1


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


GOOD = {"id": "a", "image": "a.png", "conversations": [human("<image>\nWhat is this?"), gpt("A cat.")]}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30), (200, 10, 10) if name == "a.png" else (0, 0, 255)).save(tmp_path / name)
    return tmp_path


def write(folder, rows, name: str = "chat.json"):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows))
    return path


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_good_rows(folder, name):
    rows = [
        GOOD,
        {"conversations": [{"from": "system", "value": "Be brief."}, human("Why?"), gpt("So."), human("?"), gpt("!")]},
        {"image": ["a.png", "b.png"], "conversations": [human("<image><image> Which is red?"), gpt("The first.")]},
    ]
    assert load_records(write(folder, rows, name), folder) == rows


BAD_ROWS = {
    "no object": ("just text", "a row must be an object"),
    "no conversations": ({"id": "x", "image": "a.png"}, "has no 'conversations'"),
    "empty": ({"conversations": []}, "has no 'conversations'"),
    "no list": ({"conversations": "hello"}, "has no 'conversations'"),
    "begins with gpt": ({"conversations": [gpt("hi")]}, "turn 0 is from 'gpt', expected 'human'"),
    "two questions": ({"conversations": [human("a"), human("b"), gpt("c")]}, "turn 1 is from 'human', expected 'gpt'"),
    "late system": ({"conversations": [human("a"), {"from": "system", "value": "b"}]}, "turn 1 is from 'system'"),
    "unknown role": ({"conversations": [{"from": "user", "value": "a"}, gpt("b")]}, "turn 0 is from 'user'"),
    "no answer": ({"conversations": [human("a")]}, "ends with a question"),
    "empty answer": ({"conversations": [human("a"), gpt("  ")]}, r"turn 1 \(gpt\) has no text"),
    "no value": ({"conversations": [{"from": "human"}, gpt("b")]}, r"turn 0 \(human\) has no text"),
    "system without text": (
        {"conversations": [{"from": "system"}, human("a"), gpt("b")]},
        r"turn 0 \(system\) has no text",
    ),
    "image is a number": ({**GOOD, "image": 5}, "'image' must be a file name or a list of file names, got 5"),
    "images of numbers": ({**GOOD, "image": ["a.png", 5]}, "'image' must be a file name or a list"),
    "turn is text": ({"conversations": ["a", "b"]}, "turn 0 is from None"),
    "placeholder in answer": ({"conversations": [human("a"), gpt("<image>")]}, "turn 1: <image> stands in an answer"),
    "no placeholder": ({"image": "a.png", "conversations": [human("a"), gpt("b")]}, "has 0 <image> and 1 images"),
    "no picture": ({"conversations": [human("<image> a"), gpt("b")]}, "has 1 <image> and 0 images"),
    "missing file": ({**GOOD, "image": "none.png"}, "image file 'none.png' not found in --image_folder"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named(folder, kind):
    row, message = BAD_ROWS[kind]
    path = write(folder, [GOOD, row])
    with pytest.raises(ValueError, match=message) as error:
        load_records(path, folder)
    assert str(error.value).startswith(f"{path}: row 1") and "\n" not in str(error.value)
    if isinstance(row, dict) and row.get("id") == "x":
        assert "(id 'x')" in str(error.value)


@pytest.mark.parametrize(
    "text, message", [("{", "not valid JSON"), ("[]", "non-empty list"), ('{"a": 1}', "non-empty list")]
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "chat.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_records(path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="none.json: no such data file"):
        load_records(tmp_path / "none.json")


def test_lines_end_at_a_newline_alone(folder):
    """A JSON string may hold U+2028 and U+0085 as they are, where str.splitlines cuts."""
    rows = [{"conversations": [human("One\u2028two\x85three?"), gpt("Yes.")]}, GOOD]
    path = folder / "chat.jsonl"
    path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert load_records(path, folder) == rows


def test_a_broken_line_is_named_by_its_place_in_the_file(folder):
    path = write(folder, [GOOD] * 7, "chat.jsonl")
    lines = path.read_text().split("\n")
    lines[1:1] = ["", "  "]  # blank lines count too
    for broken, message in (
        (lines[5][:-2] + "[", "line 6: not JSON ("),
        ("[1]", "line 6: not a JSON object"),
        ("\xff", "not UTF-8"),
    ):
        path.write_bytes("\n".join([*lines[:5], broken, *lines[6:]]).encode("latin-1"))
        with pytest.raises(ValueError) as error:
            load_records(path, folder)
        assert str(error.value).startswith(f"{path}: {message}") and "line 1 " not in str(error.value)


def test_messages_have_the_pictures_before_the_text():
    row = {
        "image": ["a", "b"],
        "conversations": [human("Compare <image> with\n<image>"), gpt("Same."), human("Why?"), gpt("So.")],
    }
    assert to_messages(row) == [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare  with"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Same."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
    ]


def test_items_and_batches(folder, tiny_checkpoint):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    rows = [
        GOOD,
        {"conversations": [human("Why?"), gpt("So it is.")]},
        {"image": ["b.png", "a.png"], "conversations": [human("<image><image>?"), gpt("Blue, red.")]},
    ]
    dataset = ConversationDataset(rows, processor, VICUNA_V1, folder)
    items = [dataset[i] for i in range(len(dataset))]
    assert [None if i["pixel_values"] is None else len(i["pixel_values"]) for i in items] == [1, None, 2]
    batch = Collator(pad_token_id=processor.tokenizer.pad_token_id)(items)
    lengths = [len(item["input_ids"]) for item in items]
    assert batch["input_ids"].shape == batch["labels"].shape == (3, max(lengths))
    for row, (item, n) in enumerate(zip(items, lengths)):
        assert torch.equal(batch["input_ids"][row, :n], item["input_ids"])
        assert torch.equal(batch["labels"][row, :n], item["labels"])
        assert (batch["input_ids"][row, n:] == processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][row, n:] == IGNORE_INDEX).all()
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (max(lengths) - n)
    means = batch["pixel_values"].mean((2, 3))  # red, blue, red: in the order of the placeholders
    assert [int(m.argmax()) for m in means] == [0, 2, 0]
    assert "pixel_values" not in Collator(0)([items[1]])


def test_cutting_keeps_the_beginning_and_never_a_picture(folder, tiny_checkpoint):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    row = {
        "image": "a.png",
        "conversations": [human("Tell me first, before the rest."), gpt("Yes."), human("<image>"), gpt("A cat.")],
    }
    whole = ConversationDataset([GOOD, row], processor, VICUNA_V1, folder)
    n = len(whole[0]["input_ids"])
    cut = ConversationDataset([GOOD, row], processor, VICUNA_V1, folder, max_length=n - 2)
    assert torch.equal(cut[0]["input_ids"], whole[0]["input_ids"][: n - 2])
    assert torch.equal(cut[0]["labels"], whole[0]["labels"][: n - 2])
    at = whole[1]["input_ids"].tolist().index(processor.image_token_id)
    with pytest.raises(
        ValueError, match=rf"row 1: an <image> is cut off by --model_max_length {at}, of which 1 <image>"
    ):
        ConversationDataset([GOOD, row], processor, VICUNA_V1, folder, max_length=at)[1]


def test_the_length_of_a_row_counts_the_tokens_that_its_images_may_take(folder, tiny_checkpoint):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    rows = [
        {"image": ["a.png", "b.png"], "conversations": [human("<image><image>?"), gpt("Both. " * 200)]},
        {"conversations": [human("?"), gpt("None. " * 200)]},
    ]
    dataset = ConversationDataset(rows, processor, VICUNA_V1, folder, max_length=300, image_tokens=64)
    assert [len(dataset[i]["input_ids"]) for i in (0, 1)] == [300 - 2 * 63, 300]
    small = ConversationDataset(rows, processor, VICUNA_V1, folder, max_length=100, image_tokens=64)
    with pytest.raises(ValueError, match="row 0: an <image> is cut off by .* 100, of which 2 <image> may take 128"):
        small[0]


def test_special_tokens_in_a_text_are_text(folder, tiny_checkpoint):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    tokenizer = processor.tokenizer
    row = {
        "conversations": [
            {"from": "system", "value": "<s>Be <pad>brief."},
            human("What does </s> mean?</s>"),
            gpt("</s> ends a turn, <<s>s> begins one."),
        ]
    }
    item = ConversationDataset([row], processor, VICUNA_V1, folder)[0]
    ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 == ids.count(tokenizer.eos_token_id)
    assert tokenizer.pad_token_id not in ids and ids[-1] == tokenizer.eos_token_id
    assert labels.count(tokenizer.eos_token_id) == 1 and labels[-1] == tokenizer.eos_token_id
    said = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert "< /s> ends a turn," in said and said.endswith("begins one.</s>")
    # What is learned is what a user's words become in inference.
    turns = checked_turns([{"role": "user", "content": "What does </s> mean?</s>"}], 0, PlainText(processor))
    assert turns[0]["content"][0]["text"] in tokenizer.decode(ids)
