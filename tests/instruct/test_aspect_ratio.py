"""--image_aspect_ratio pad: the whole picture within a square, in training, in the result and where it is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from llava_drip.assistant.processing import LlavaDripProcessor, aspect_ratio_of, image_processor_for, view
from llava_drip.instruct.arguments import parse
from llava_drip.instruct.parts import load_parts, resolve
from llava_drip.instruct.stage import run_stage

from .conftest import common

VISION = {"image_size": 64, "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


def striped(width: int, height: int) -> Image.Image:
    """Red at its left end, blue at its right, green between: a centre crop of a wide one loses both ends."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[..., 1] = 255
    picture[:, : width // 8] = (255, 0, 0)
    picture[:, -(width // 8) :] = (0, 0, 255)
    return Image.fromarray(picture)


def pixels_of(image_processor, picture: Image.Image) -> torch.Tensor:
    """[64, 64, 3], as colours again."""
    pixels = image_processor([picture], return_tensors="pt")["pixel_values"][0].permute(1, 2, 0)
    return pixels * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)


@pytest.mark.parametrize("size", [(256, 128), (128, 256), (128, 128), (255, 100)])
def test_what_the_tower_sees_is_what_is_shown(size):
    for ratio in ("square", "pad"):
        image_processor = image_processor_for(VISION, ratio)
        shown = view(striped(*size), image_processor)
        assert shown.width == shown.height == (max if ratio == "pad" else min)(size)
        assert (pixels_of(image_processor, striped(*size)) - pixels_of(image_processor, shown)).abs().max() < 0.05


def test_both_ends_of_a_wide_picture_are_seen():
    seen = {ratio: pixels_of(image_processor_for(VISION, ratio), striped(256, 128)) for ratio in ("square", "pad")}
    row = seen["pad"][32]
    assert row[2].argmax() == 0 and row[-3].argmax() == 2 and row[32].argmax() == 1
    assert torch.allclose(seen["pad"][4], torch.tensor(VISION["mean"]), atol=0.01), "padding has the mean colour"
    assert (seen["square"][..., 1] > 0.9).all(), "the centre alone, which is green"


def test_a_stage_takes_it_and_its_result_keeps_it(tiny_checkpoint, tiny_world, tmp_path):
    output = tmp_path / "out"
    argv = ["--model_name_or_path", tiny_checkpoint, "--data_path", tiny_world.instruct_train, "--output_dir", output]
    argv += ["--image_folder", tiny_world.images, *common(4, 1)]
    run_stage("finetune", list(map(str, [*argv, "--image_aspect_ratio", "pad"])))
    assert aspect_ratio_of(LlavaDripProcessor.from_pretrained(tiny_checkpoint).image_processor) == "square"
    kept = LlavaDripProcessor.from_pretrained(output).image_processor
    assert aspect_ratio_of(kept) == "pad"
    wide = striped(256, 128)
    assert torch.equal(
        pixels_of(kept, wide),
        pixels_of(image_processor_for(AutoConfig.from_pretrained(output).vision_config, "pad"), wide),
    )
    argv[1] = output
    for given, ratio in (([], "pad"), (["--image_aspect_ratio", "square"], "square")):
        model_args, data_args = parsed(*argv, *given)
        model_args, _ = resolve("finetune", model_args, data_args)
        assert model_args.image_aspect_ratio == ratio
        assert aspect_ratio_of(load_parts("finetune", model_args)[1].image_processor) == ratio


def parsed(*argv: object):
    return parse(list(map(str, argv)), "finetune.py", "")[:2]


def test_another_word_is_refused(tiny_checkpoint, tmp_path, capsys):
    flags = ["--data_path", "x", "--output_dir", tmp_path, "--image_aspect_ratio", "anyres"]
    with pytest.raises(SystemExit):
        parsed("--model_name_or_path", tiny_checkpoint, *flags)
    assert "--image_aspect_ratio must be one of square, pad, got anyres" in capsys.readouterr().err
