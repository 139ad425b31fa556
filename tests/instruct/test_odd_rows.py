"""Rows as they come: pictures of every make, several in a row, none at all. Trained on, or refused with a clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from llava_drip.instruct.data import Collator, ConversationDataset, load_records
from llava_drip.instruct.rows import NamingCollator, ReadableRows
from llava_drip.instruct.stage import run_stage
from llava_drip.instruct.templates import VICUNA_V1

from .conftest import common, losses

SIDE = 64  # the tower's: pixels reach it as they are
RED, BLUE, GREY, WHITE = (255, 0, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255)


def halves(mode: str, left: object, right: object) -> Image.Image:
    image = Image.new(mode, (SIDE, SIDE), left)
    image.paste(right, (SIDE // 2, 0, SIDE, SIDE))
    return image


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees: what is left in the file is at the top
    halves("RGB", RED, BLUE).save(path, exif=exif, quality=95)


def palette(path: Path) -> None:
    image = halves("P", 0, 1)
    image.putpalette([*RED, *BLUE])
    image.save(path, transparency=1)


def animated(path: Path) -> None:
    first, second = halves("RGB", RED, BLUE), halves("RGB", BLUE, RED)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=[second], duration=100, **lossless)


# file → how it is written; what a quarter of the way from the upper left corner, and three quarters, must be
MAKES = {
    "grey.png": (lambda path: halves("L", 0, 128).save(path), (0, 0, 0), GREY),
    "bits.png": (lambda path: halves("1", 0, 1).save(path), (0, 0, 0), WHITE),
    "deep.png": (lambda path: halves("I;16", 0, 128 * 257).save(path), (0, 0, 0), GREY),
    "cmyk.jpg": (lambda path: halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)).save(path, quality=95), RED, BLUE),
    "rotated.jpg": (rotated, RED, BLUE),
    "palette.png": (palette, RED, WHITE),
    "alpha.png": (lambda path: halves("RGBA", (*RED, 255), (*BLUE, 0)).save(path), RED, WHITE),
    "animated.gif": (animated, RED, BLUE),
    "animated.webp": (animated, RED, BLUE),
}


def row(question: str, *images: str) -> dict:
    turns = [{"from": "human", "value": "<image>\n" * len(images) + question}, {"from": "gpt", "value": "It is so."}]
    return {
        "conversations": turns,
        **({"image": list(images)} if len(images) > 1 else {"image": images[0]} if images else {}),
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, (write, *_) in MAKES.items():
        write(folder / name)
    Image.new("RGB", (10_000, 10), RED).save(folder / "strip.png")
    Image.new("RGB", (1000, 10), RED).save(folder / "thin.png")
    Image.new("RGB", (1, 1), RED).save(folder / "dot.png")
    return folder


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return AutoProcessor.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize("name", MAKES)
def test_the_pixels_of_a_picture_of_any_make(pictures, processor, name):
    _, first, second = MAKES[name]
    item = ReadableRows(ConversationDataset([row("What?", name)], processor, VICUNA_V1, pictures))[0]
    assert item["pixel_values"].shape == (1, 3, SIDE, SIDE)
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{key}")) for key in ("mean", "std"))
    seen = [(item["pixel_values"][0, :, at, at] * std + mean) * 255 for at in (SIDE // 4, 3 * SIDE // 4)]
    for pixel, colour in zip(seen, (first, second), strict=True):
        torch.testing.assert_close(pixel, torch.tensor(colour).float(), atol=3, rtol=0)
    if name == "rotated.jpg":  # the other diagonal tells a turned picture from one that lies
        assert item["pixel_values"][0, 0, SIDE // 4, -SIDE // 4] > item["pixel_values"][0, 0, -SIDE // 4, SIDE // 4]


def train(checkpoint: Path, rows: list[dict], folder: Path, tmp_path: Path, batch: int, *flags: str) -> list[float]:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    argv = ["--model_name_or_path", checkpoint, "--data_path", path, "--image_folder", folder]
    argv += ["--output_dir", tmp_path / "out", *common(batch, len(rows) // batch), *flags]
    run_stage("finetune", list(map(str, [*argv, "--train_sampling_strategy", "sequential"])))
    return losses(tmp_path / "out")


def test_a_step_with_all_of_them(tiny_checkpoint, pictures, tmp_path):
    """With text alone, two pictures in a row, three in two turns, a thin strip, and one pixel; then text alone."""
    turns = row("Which?", "grey.png", "cmyk.jpg")
    turns["image"].append("dot.png")
    turns["conversations"] += [{"from": "human", "value": "And <image>?"}, {"from": "gpt", "value": "Red."}]
    rows = [row("What is it?", name) for name in MAKES]
    rows += [row("Both?", "rotated.jpg", "deep.png"), turns, row("Thin?", "thin.png"), row("Small?", "dot.png")]
    texts = [row("No picture?") for _ in rows]
    seen = train(tiny_checkpoint, [*rows, row("No picture?"), *texts, row("And?")], pictures, tmp_path, len(rows) + 1)
    assert len(seen) == 2 and all(0 < loss < 20 for loss in seen)


def test_a_strip_of_10000_by_10_pixels_is_left_out_or_refused(tiny_checkpoint, pictures, tmp_path, capsys):
    rows = [row("What?", "strip.png"), row("What?", "grey.png")]
    assert len(train(tiny_checkpoint, rows, pictures, tmp_path, 2)) == 1
    wrong = f"{pictures}/strip.png: 10000 x 10 is too thin a strip; 200:1 is allowed"
    assert f"bad image: {wrong}; row 1 takes the place of row 0" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"--max_bad_images 0 allows: {wrong}"):
        train(tiny_checkpoint, rows, pictures, tmp_path, 2, "--max_bad_images", "0")


def test_two_pictures_keep_their_order_in_a_batch(pictures, processor, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("?", "cmyk.jpg", "grey.png"), row("?"), row("?", "animated.gif")]))
    rows = ReadableRows(ConversationDataset(load_records(path, pictures), processor, VICUNA_V1, pictures))
    batch = NamingCollator(Collator(0))([rows[i] for i in range(3)])
    assert batch["row_names"] == ["row 0", "row 1", "row 2"] and batch["bad_rows"] == []
    alone = [rows[0]["pixel_values"][0], rows[0]["pixel_values"][1], rows[2]["pixel_values"][0]]
    assert torch.equal(batch["pixel_values"], torch.stack(alone))
    placeholders = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert placeholders.tolist() == [2, 0, 1]
