"""An assistant whose tower drops patches."""

from __future__ import annotations

import pytest
import timm
import torch
from transformers import AutoModelForImageTextToText

from llava_drip.assistant.build import build_assistant
from llava_drip.engine import Engine
from llava_drip.towers.io import save_tower


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("dynamicvit_mini_patch8_64", num_classes=0)
    return save_tower(model, tmp_path_factory.mktemp("dynamicvit"), (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("compression, tokens", [(None, 31), (4.0, 16)])
def test_it_gives_as_many_tokens_as_are_asked_for(tiny_language_model, tower, rows, tmp_path, compression, tokens):
    torch.manual_seed(0)
    model, processor = build_assistant(
        str(tiny_language_model), str(tower), segment_positions=True, compression=compression
    )
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = processor(text=rows[0], images=rows[1], padding=True, return_tensors="pt")
    with torch.no_grad():
        visual = again.encode_images(inputs["pixel_values"])
        assert set(visual.lengths.tolist()) == {tokens}
        assert torch.equal(visual.values, model.encode_images(inputs["pixel_values"]).values)
        answer = again.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[0] == len(rows[0])
    engine = Engine.load(str(tmp_path), "cpu", "float32", 8.0)
    count, segments, grid = engine.segments(rows[1][0][0])
    assert count == 8 and grid == (8, 8) and int((segments >= 0).sum()) == 8


def test_a_layer_before_the_last_dropping_is_refused(tiny_language_model, tower):
    with pytest.raises(ValueError, match="gives layers -3 to -1, from the end"):
        build_assistant(str(tiny_language_model), str(tower), vision_feature_layer=-4)
