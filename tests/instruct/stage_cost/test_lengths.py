"""Lengths of samples: of conversations as training encodes them, of lists; what cannot be read is named."""

from __future__ import annotations

import json

import pytest

from llava_drip.assistant import LlavaDripProcessor
from llava_drip.instruct.data import ConversationDataset, load_records
from llava_drip.instruct.stage_cost.lengths import Sample, read_samples
from llava_drip.instruct.templates import PLAIN, VICUNA_V1


@pytest.mark.parametrize("stage, template", [("pretrain", PLAIN), ("finetune", VICUNA_V1)])
def test_conversations_are_as_long_as_in_training(stage, template, tiny_world, tiny_language_model, tiny_checkpoint):
    path = tiny_world.caption_train if stage == "pretrain" else tiny_world.instruct_train
    processor = LlavaDripProcessor.from_pretrained(tiny_checkpoint)
    dataset = ConversationDataset(load_records(path, tiny_world.images), processor, template, tiny_world.images)
    samples = read_samples(path, stage, tiny_language_model)  # its tokenizer has no <image>
    assert len(samples) == len(dataset)
    for sample, item in zip(samples[:5], (dataset[i] for i in range(5)), strict=True):
        assert sample.images == len(item["pixel_values"]) == 1
        assert sample.text == len(item["input_ids"]) - 1 and sample.learned == int((item["labels"] != -100).sum())


def test_a_list_of_lengths_needs_no_tokenizer(tmp_path):
    path = tmp_path / "lengths.json"
    path.write_text('[{"text": 61, "learned": 35, "images": 1}, {"text": 9, "learned": 8, "images": 0}]')
    assert read_samples(path, "finetune") == (Sample(61, 35, 1), Sample(9, 8, 0))


def test_what_is_longer_than_the_model_reads_is_cut():
    assert Sample(100, 60, 1).cut(positions=128, image_tokens=64) == Sample(64, 24, 1)
    assert Sample(30, 20, 1).cut(positions=128, image_tokens=64) == Sample(30, 20, 1)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": 9, "learned": 0, "images": 1}], "row 0: learned must be at least 1"),
        ([{"text": 9, "learned": 9, "images": 0}], "something must stand before it"),
        ([{"text": 4, "learned": 5, "images": 9}], "at most text"),
        ([{"text": 4, "learned": 2, "images": 1}, {"text": 4}], r"row 1: must be \{\"text\": \.\., \"learned\""),
        ([{"text": 4, "learned": 2.5, "images": 1}], "whole numbers of at least 0"),
        ([{"text": 4, "learned": 2, "images": True}], "whole numbers of at least 0"),
        ([{"conversations": [{"from": "gpt", "value": "Hi."}]}], "row 0 turn 0 is from 'gpt'"),
        (
            [{"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hi."}]}],
            "need --tokenizer DIR",
        ),
    ],
)
def test_mistakes(rows, message, tmp_path):
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=message) as caught:
        read_samples(path, "finetune")
    assert "lengths.json" in str(caught.value)


def test_files_that_are_none(tmp_path, tiny_world):
    (tmp_path / "cut.json").write_text('[{"text": 61, "lea')
    for name, message in (
        ("cut.json", "--lengths .*cut.json: not valid JSON"),
        ("none.json", r"no such data file \(--lengths\)"),
    ):
        with pytest.raises(ValueError, match=message):
            read_samples(tmp_path / name, "finetune")
    with pytest.raises(ValueError, match="--tokenizer .*: cannot be loaded"):
        read_samples(tiny_world.instruct_train, "finetune", tmp_path)
