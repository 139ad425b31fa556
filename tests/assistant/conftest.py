"""An assistant with random weights whose tower gives different pictures different numbers of tokens."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor


def picture(seed: int, size: int = 80) -> Image.Image:
    """Left part noise, right part flat; how much of each depends on the seed."""
    pixels = torch.full((size, size, 3), 128, dtype=torch.uint8)
    width = 10 + 12 * seed % size
    generator = torch.Generator().manual_seed(seed)
    pixels[:, :width] = torch.randint(256, (size, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def assistant(tiny_checkpoint):
    """Model (eval, fp32) and processor."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).eval()
    torch.manual_seed(0)
    nn.init.normal_(model.vision_tower.boundary_predictor.fc2.weight, std=3.0)  # opinions, so that token counts differ
    return model, AutoProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture
def rows() -> tuple[list[str], list[list[Image.Image]]]:
    """Prompts with 1, 0, 2 and 1 pictures, of different lengths."""
    text = [
        "USER: <image>\nWhat color is the circle? ASSISTANT:",
        "USER: Describe. ASSISTANT:",
        "USER: <image>\n<image>\nWhich of the two is larger, the first or the second? ASSISTANT:",
        "USER: <image>\nWhat? ASSISTANT:",
    ]
    return text, [[picture(1)], [], [picture(2), picture(5)], [picture(4)]]
