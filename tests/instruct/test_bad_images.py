"""Pictures that cannot be read: another row takes their place, the same one each time; counted, named once, and not too many."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from llava_drip.instruct.bad_images import HANDFUL, NAMED, BadImages, BadRow
from llava_drip.instruct.data import ConversationDataset
from llava_drip.instruct.rows import ReadableRows
from llava_drip.instruct.stage import run_stage
from llava_drip.instruct.templates import VICUNA_V1

from .conftest import common, losses, parts

ROWS = 8  # of which 2 and 3 share a broken file, and 7 has another


@pytest.fixture
def damaged(tiny_world, tmp_path) -> tuple[Path, Path]:
    """A file of eight captions and its folder of pictures."""
    rows, folder = json.loads(tiny_world.caption_train.read_text())[:ROWS], tmp_path / "images"
    folder.mkdir()
    for row in rows:
        shutil.copy(tiny_world.images / row["image"], folder)
    (folder / rows[7]["image"]).write_bytes(b"")
    data = (folder / rows[2]["image"]).read_bytes()
    (folder / rows[2]["image"]).write_bytes(data[: len(data) // 2])
    rows[3]["image"] = rows[2]["image"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json", folder


def flags(damaged, language_model, tower, output, steps: int = 4) -> list[str]:
    """Four rows a step, in order: two steps an epoch."""
    argv = [*parts(language_model, tower, output), "--data_path", damaged[0], "--image_folder", damaged[1]]
    argv += [*common(4, steps), "--train_sampling_strategy", "sequential", "--dataloader_num_workers", 1]
    return list(map(str, argv))


def history(output: Path, key: str) -> list:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry.get(key) for entry in log if "loss" in entry]


def test_they_are_replaced_counted_and_named_once(damaged, tiny_language_model, tiny_tower, tmp_path, capsys):
    """Two epochs, and the same run in two parts."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    saving = ["--max_bad_images", "0.5", "--save_strategy", "steps", "--save_steps", "1"]
    run_stage("pretrain", [*flags(damaged, tiny_language_model, tiny_tower, whole), *saving])
    printed = capsys.readouterr().out
    assert history(whole, "bad_images") == [2, 3, 5, 6], "rows 2 and 3, row 7, and again"
    named = [line for line in printed.splitlines() if line.startswith("bad image: ")]
    assert len(named) == 2 and "truncated or corrupt" in named[0] and "the file is empty" in named[1]
    assert "row 4 (id " in named[0] and "takes the place of row 2" in named[0] and "row 0 (id " in named[1]
    assert "bad images: 6 of 16 rows, other rows took their places; 6 skipped (6 corrupt picture)" in printed

    shutil.copytree(whole / "checkpoint-3", halves / "checkpoint-3")
    again = ["--resume_from_checkpoint", "latest"]
    run_stage("pretrain", [*flags(damaged, tiny_language_model, tiny_tower, halves), *saving, *again])
    assert history(halves, "bad_images") == [2, 3, 5, 6] and losses(halves) == losses(whole)
    one, other = (load_file(output / "mm_projector.safetensors") for output in (whole, halves))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_first_one_stops_the_run_where_none_is_allowed(damaged, tiny_language_model, tiny_tower, tmp_path):
    argv = flags(damaged, tiny_language_model, tiny_tower, tmp_path / "out") + ["--max_bad_images", "0"]
    message = (
        r"2 of the 4 rows seen so far had a picture .* more than --max_bad_images 0 allows: .*images/train_.*png: trunc"
    )
    with pytest.raises(ValueError, match=message):
        run_stage("pretrain", argv)
    assert not (tmp_path / "out").exists()


def test_too_many_stop_the_run_and_its_log_stays(damaged, tiny_language_model, tiny_tower, tmp_path):
    """A handful is allowed, whatever their share of so few rows; the sixth is one too many."""
    argv = flags(damaged, tiny_language_model, tiny_tower, tmp_path / "out") + ["--report_to", "tensorboard"]
    with pytest.raises(
        ValueError, match="6 of the 16 rows seen so far .* more than --max_bad_images 0.01 allows: .*; "
    ):
        run_stage("pretrain", argv)
    assert list(tmp_path.glob("out/**/events*")) and not (tmp_path / "out" / "config.json").exists()


def test_a_file_that_has_gone_since_it_was_looked_for(damaged, tiny_checkpoint):
    data, folder = damaged
    records, processor = json.loads(data.read_text()), AutoProcessor.from_pretrained(tiny_checkpoint)
    rows = ReadableRows(ConversationDataset(records, processor, VICUNA_V1, folder))
    good = rows[1]
    assert good["bad"] is None and good["name"].startswith("row 1 (id ")
    (folder / records[0]["image"]).unlink()
    item = rows[0]
    assert torch.equal(item["pixel_values"], good["pixel_values"]) and item["name"] == good["name"]
    assert item["bad"].name.startswith("row 0") and item["bad"].message.endswith(".png: no such image file")
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"no usable sample: 8 skipped \(8 corrupt picture\); .*no such image file"):
        rows[0]


def test_a_mistake_that_is_no_picture_is_not_passed_over(damaged, tiny_checkpoint):
    records = json.loads(damaged[0].read_text())
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    rows = ReadableRows(ConversationDataset(records, processor, VICUNA_V1, damaged[1], max_length=3))
    with pytest.raises(ValueError, match="row 0 .*an <image> is cut off"):
        rows[0]


def bad_row(i: int) -> BadRow:
    return BadRow(f"row {i}", "corrupt picture", f"{i}.jpg: empty", f"row {i + 1}")


def test_the_share_is_of_the_rows_seen():
    counted = BadImages(0.01)
    for i in range(HANDFUL):
        counted.count(2, [bad_row(i)], 1)
    counted.count(10_000, [], 0)
    for i in range(96):
        counted.count(1, [bad_row(i)], 1)
    with pytest.raises(ValueError, match="102 of the 10,107 rows"):
        counted.count(1, [bad_row(0)], 1)


def test_names_in_the_log_have_an_end(capsys):
    counted = BadImages(1.0)
    for i in range(NAMED + 5):
        counted.count(1, [bad_row(i)], 1)
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == NAMED + 1 and lines[-1].startswith(f"more than {NAMED} bad images") and counted.total == NAMED + 5
    )


@pytest.mark.parametrize("share", ["-0.1", "1.5", "nan"])
def test_a_share_that_is_none(damaged, tiny_language_model, tiny_tower, tmp_path, share, capsys):
    argv = flags(damaged, tiny_language_model, tiny_tower, tmp_path / "out") + ["--max_bad_images", share]
    with pytest.raises(SystemExit):
        run_stage("pretrain", argv)
    assert "--max_bad_images must be at least 0 and at most 1" in capsys.readouterr().err
