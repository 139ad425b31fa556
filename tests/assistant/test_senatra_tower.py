"""An assistant that sees through a SeNaTra: 16 tokens an image, whatever the image."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_drip.assistant import build_assistant
from llava_drip.engine import Engine
from llava_drip.instruct.templates import VICUNA_V1

from .conftest import picture


@pytest.fixture(scope="module")
def directory(tiny_language_model, tmp_path_factory):
    torch.manual_seed(0)
    model, processor = build_assistant(
        str(tiny_language_model), "senatra_mini_64", segment_positions=True, chat_template=VICUNA_V1
    )
    path = tmp_path_factory.mktemp("senatra_assistant")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_it_learns_and_answers(directory, rows):
    model, processor = AutoModelForImageTextToText.from_pretrained(directory), AutoProcessor.from_pretrained(directory)
    text, images = rows
    batch = dict(processor(text=text, images=images, padding_side="right"))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.train().vision_tower.requires_grad_(True)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    unread = {id(p) for p in model.vision_tower.blocks[-1].parameters()}  # vision_feature_layer is -2
    for name, p in model.vision_tower.stages.named_parameters():
        assert (p.grad is None) == (id(p) in unread), name
        assert p.grad is None or torch.isfinite(p.grad).all(), name
    tokens = model.eval().encode_images(torch.randn(2, 3, 64, 64))
    assert tokens.lengths.tolist() == [16, 16]
    engine = Engine.load(directory, device="cpu")
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    (reply,) = engine.answer_batch([([{"role": "user", "content": content}], [picture(1)])], max_new_tokens=3)
    assert reply.usage.visual_tokens == 16 and reply.usage.patches == 1024
    count, segments, grid = engine.segments(picture(1))
    assert count == 16 and segments.shape == (1024,) and grid == (32, 32)


def test_a_budget_is_refused_by_name(directory, tiny_language_model):
    with pytest.raises(ValueError, match="senatra_mini_64 has no adjustable token budget"):
        AutoModelForImageTextToText.from_pretrained(directory).set_compression(4.0)
    with pytest.raises(ValueError, match="senatra_mini_64 has no adjustable token budget"):
        build_assistant(str(tiny_language_model), "senatra_mini_64", compression=4.0)
    with pytest.raises(ValueError, match="senatra_mini_64 gives layers -2 to -1"):
        build_assistant(str(tiny_language_model), "senatra_mini_64", vision_feature_layer=-3)
