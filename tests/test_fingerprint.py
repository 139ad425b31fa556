"""A fingerprint changes with what a model's answers depend on, and with nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llava_drip.fingerprint import fingerprint


@pytest.fixture
def copy(tiny_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def test_a_moved_model_stays_the_same(tiny_checkpoint, copy, tmp_path):
    assert fingerprint(copy) == fingerprint(str(tiny_checkpoint)) and len(fingerprint(copy)) == 16
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text("[]")
    other.write_text("[]")
    assert fingerprint(one) == fingerprint(other)
    other.write_text("[ ]")
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_byte_of_what_is_read_changes_it(tiny_checkpoint, copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    assert fingerprint(copy) != fingerprint(tiny_checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "merges.txt",
        "vocab.txt",
        "spiece.model",
        "model-00002-of-00002.safetensors",
        "additional_chat_templates/a.jinja",
    ],
)
def test_another_file_that_is_read_changes_it(tiny_checkpoint, copy, name):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("x")
    with_it = fingerprint(copy)
    assert with_it != fingerprint(tiny_checkpoint)
    (copy / name).write_text("y")
    assert fingerprint(copy) != with_it


OTHERS = ["trainer_state.json", "train_results.json", "training_args.bin", "optimizer.pt", "notes.txt", "README.md"]
OTHERS += [".partial/config.json", ".config.json", "checkpoint-1/model.safetensors", "runs/events.out", "train.log"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_read_does_not_count(tiny_checkpoint, copy, name):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("x")
    assert fingerprint(copy) == fingerprint(tiny_checkpoint)


def test_a_change_anywhere_in_a_large_file(tmp_path):
    """Such as the projector's weights amid those of a language model."""
    file = tmp_path / "model.safetensors"
    with file.open("wb") as data:
        data.truncate((1 << 26) + 12345)
    before = fingerprint(file), fingerprint(tmp_path)
    with file.open("r+b") as data:
        data.seek(12_345_678)
        data.write(b"x")
    assert fingerprint(file) != before[0] and fingerprint(tmp_path) != before[1]
