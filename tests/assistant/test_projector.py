"""The projector with and without segment positions."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava_drip.assistant.build import build_assistant
from llava_drip.assistant.projector import PLACE_DIM, Projector, segment_places
from llava_drip.tokens import TokenBatch


def test_a_place_is_the_mean_of_its_patches():
    patches = segment_places(TokenBatch(torch.zeros(6, 1), torch.tensor([6])), (2, 3))
    assert patches.shape == (6, PLACE_DIM) and len(patches.unique(dim=0)) == 6
    larger = segment_places(TokenBatch(torch.zeros(12, 1), torch.tensor([12])), (3, 4))
    assert torch.allclose(larger.mean(0), torch.zeros(PLACE_DIM), atol=1e-6)
    assert torch.allclose(larger.std(0, correction=0), torch.full((PLACE_DIM,), 1.5))
    row = segment_places(TokenBatch(torch.zeros(3, 1), torch.tensor([3])), (1, 3))  # all at one y
    assert row.isfinite().all() and len(row.unique(dim=0)) == 3
    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 4, 4]])
    pooled = segment_places(TokenBatch(torch.zeros(8, 1), torch.tensor([3, 5]), segments), (2, 3))
    expected = [patches[:3].mean(0), patches[3:5].mean(0), patches[5], *patches[:4], patches[4:].mean(0)]
    assert torch.allclose(pooled, torch.stack(expected))


def test_dropped_patches_are_in_no_place():
    patches = segment_places(TokenBatch(torch.zeros(6, 1), torch.tensor([6])), (2, 3))
    segments = torch.tensor([[-1, 0, 1, -1, 2, -1], [0, -1, 0, -1, -1, -1]])
    places = segment_places(TokenBatch(torch.zeros(4, 1), torch.tensor([3, 1]), segments), (2, 3))
    assert torch.allclose(places, torch.stack([*patches[[1, 2, 4]], patches[[0, 2]].mean(0)]))


def test_tokens_that_lie_nowhere_are_refused():
    with pytest.raises(ValueError, match="segment_positions needs a tower"):
        segment_places(TokenBatch(torch.zeros(4, 1), torch.tensor([4])), (2, 3))
    # Twelve tokens in all, as of two dense images, but not six of each.
    with pytest.raises(ValueError, match="image 0 has 5 tokens for 6 patches"):
        segment_places(TokenBatch(torch.zeros(12, 1), torch.tensor([5, 7])), (2, 3))


@pytest.mark.parametrize("kind, names", [("linear", {"0"}), ("mlp2x_gelu", {"0", "2"})])
def test_parameters_have_llavas_names(kind, names):
    own = set(Projector(kind, 5, 7).state_dict())
    assert own == {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    assert set(Projector(kind, 5, 7, True).state_dict()) == own | {"position.weight", "position.bias"}


def test_an_assistant_with_segment_positions(tiny_language_model, tiny_tower, rows, tmp_path):
    torch.manual_seed(0)
    model, processor = build_assistant(str(tiny_language_model), str(tiny_tower), segment_positions=True)
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert again.config.segment_positions
    inputs = processor(text=rows[0], images=rows[1], padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = model.encode_images(inputs["pixel_values"])
        assert torch.equal(again.encode_images(inputs["pixel_values"]).values, whole.values)
        for pixels, tokens in zip(inputs["pixel_values"], whole.split()):
            alone = model.encode_images(pixels[None])
            assert torch.allclose(alone.values, tokens, atol=1e-5)
        model.multi_modal_projector.position.weight.zero_()
        assert not torch.allclose(model.encode_images(inputs["pixel_values"]).values, whole.values, atol=1e-3)
