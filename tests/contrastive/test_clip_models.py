"""The DRIP-* models in open_clip, and what they answer in training."""

from __future__ import annotations

import open_clip
import pytest
import torch

import llava_drip  # noqa: F401 - registers the models
from llava_drip.contrastive import CONFIGS
from llava_drip.contrastive.model import BoundaryCLIP, encode_image_tokens, has_boundaries, patches_of, tower_of

EXPECTED = {  # patches, compression
    **{f"DRIP-B-32-{rate}x": (49, rate) for rate in (2, 4, 10)},
    **{f"DRIP-B-16-{rate}x": (196, rate) for rate in (2, 4, 10)},
    "DRIP-mini-8-1x": (64, 1),
    "DRIP-mini-8-4x": (64, 4),
}


def test_every_config_is_expected():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(EXPECTED)
    assert set(EXPECTED) <= set(open_clip.list_models())


@pytest.mark.parametrize("name", EXPECTED)
def test_config_builds_the_named_tower(name):
    patches, rate = EXPECTED[name]
    with torch.device("meta"):  # shapes only: B/16 has 86 million weights
        model = open_clip.create_model(name, device="meta")
    tower = tower_of(model)
    assert (patches_of(tower), tower.compression) == (patches, rate)
    assert has_boundaries(model) == (rate > 1)
    assert model.visual.image_size[0] == tower.patch_embed.img_size[0]
    if "-B-" in name:  # the text tower of open_clip's ViT-B-32
        theirs, ours = open_clip.get_model_config("ViT-B-32"), open_clip.get_model_config(name)
        assert (ours["text_cfg"], ours["embed_dim"]) == (theirs["text_cfg"], theirs["embed_dim"])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BoundaryCLIP.adopt(open_clip.create_model("DRIP-mini-8-4x", output_dict=True))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    texts = open_clip.get_tokenizer("DRIP-mini-8-4x")(["a cat", "two dogs on a lawn", "sky"])
    return torch.randn(3, 3, 64, 64, generator=generator), texts


def test_training_output_has_per_image_entries(model, batch):
    output = model.train()(*batch)
    assert set(output) == {"image_features", "text_features", "logit_scale", "rate_loss", "num_tokens"}
    assert output["rate_loss"].shape == output["num_tokens"].shape == (3,)
    assert ((output["num_tokens"] >= 1) & (output["num_tokens"] <= 64)).all()
    assert torch.isfinite(output["rate_loss"]).all()
    for key in ("image_features", "text_features"):
        torch.testing.assert_close(output[key].norm(dim=-1), torch.ones(3))
    torch.manual_seed(3)
    trained = model(*batch)["image_features"]
    torch.manual_seed(3)  # the same noise
    torch.testing.assert_close(trained, model.encode_image(batch[0], normalize=True))


def test_rate_loss_and_task_reach_the_predictor(model, batch):
    for entry in ("rate_loss", "image_features"):
        model.zero_grad()
        output = model.train()(*batch)[entry]
        (output * torch.randn_like(output)).sum().backward()
        gradient = tower_of(model).boundary_predictor.fc1.weight.grad
        assert gradient.abs().sum() > 0, entry


def test_eval_output_is_stock(model, batch):
    stock = open_clip.create_model("DRIP-mini-8-4x", output_dict=True)
    stock.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        ours, theirs = model.eval()(*batch), stock.eval()(*batch)
    assert type(stock) is open_clip.CustomTextCLIP
    assert list(ours) == list(theirs)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key])
    features, tokens = encode_image_tokens(model, batch[0])
    torch.testing.assert_close(features, theirs["image_features"])
    assert len(tokens) == 3


def test_adopt_refuses_another_class():
    config = open_clip.get_model_config("DRIP-mini-8-4x")
    del config["custom_text"]
    with pytest.raises(ValueError, match="custom_text"):
        BoundaryCLIP.adopt(open_clip.CLIP(**config))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP"])  # open_clip's own tower, and timm's
def test_stock_models_have_no_boundaries(name):
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta")
    assert tower_of(model) is None and not has_boundaries(model)
