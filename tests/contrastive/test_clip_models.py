"""The DRIP-* models in open_clip, and what they answer in training."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch

import llava_drip  # noqa: F401 - registers the models
from llava_drip.contrastive import CONFIGS
from llava_drip.contrastive.arguments import is_tower, parse
from llava_drip.contrastive.checkpoint import find_checkpoint
from llava_drip.contrastive.model import BoundaryCLIP, encode_image_tokens, has_boundaries, patches_of, tower_of

PATCHES = {"B-32": 49, "B-16": 196, "mini-8": 64}
EXPECTED = {  # patches, compression, dense blocks and those on pooled tokens
    **{f"DRIP-{size}-{rate}x": (PATCHES[size], rate, (2, 10)) for size in ("B-32", "B-16") for rate in (1, 2, 4, 10)},
    **{f"DRIP-{size}-{rate}x-4+8": (PATCHES[size], rate, (4, 8)) for size in ("B-32", "B-16") for rate in (2, 4, 10)},
    **{f"DRIP-mini-8-{rate}x": (PATCHES["mini-8"], rate, (1, 3)) for rate in (1, 2, 4, 10)},
    **{f"DRIP-{size}-elastic": (PATCHES[size], 4, (2, 10)) for size in ("B-32", "B-16")},
    "DRIP-mini-8-elastic": (PATCHES["mini-8"], 4, (1, 3)),
}
EXPECTED |= {
    f"{name}-rope": entry for name, entry in EXPECTED.items() if "-B-" in name and not name.endswith("4+8")
}  # for training from scratch


def test_every_config_is_expected():
    assert {path.stem for path in CONFIGS.glob("DRIP-*.json")} == set(EXPECTED)
    assert {path.stem for path in CONFIGS.glob("*.json")} <= set(open_clip.list_models())


@pytest.mark.parametrize("name", EXPECTED)
def test_config_builds_the_named_tower(name):
    patches, rate, blocks = EXPECTED[name]
    with torch.device("meta"):  # shapes only: B/16 has 86 million weights
        model = open_clip.create_model(name, device="meta")
    tower = tower_of(model)
    assert (patches_of(tower), tower.compression) == (patches, rate)
    assert (tower.pool_after, len(tower.blocks) - tower.pool_after) == blocks
    assert has_boundaries(model) == (rate > 1)
    tower.set_compression(1.0)  # as a saved budget may say
    assert not has_boundaries(model)
    assert tower.elastic == ((1.0, 10.0) if "-elastic" in name else None)
    rope = name.endswith("-rope")
    assert (tower.relative == "rotary", isinstance(tower.blocks[0].attn.q_norm, torch.nn.LayerNorm)) == (rope, rope)
    assert model.visual.image_size[0] == tower.patch_embed.img_size[0]
    if "-B-" in name:  # the text tower of open_clip's ViT-B-32 and 16
        ours = open_clip.get_model_config(name)
        for other in ("ViT-B-32", "ViT-B-16"):
            theirs = open_clip.get_model_config(other)
            assert (ours["text_cfg"], ours["embed_dim"]) == (theirs["text_cfg"], theirs["embed_dim"])


@pytest.mark.parametrize("name", EXPECTED)
def test_tokens_of_the_named_tower(name):
    """Fewer after as many blocks as the name says, and as many as are asked for."""
    patches, rate, (dense, _) = EXPECTED[name]
    timm_name = open_clip.get_model_config(name)["vision_cfg"]["timm_model_name"]
    torch.manual_seed(0)
    tower = timm.create_model(timm_name, num_classes=0, embed_dim=48, num_heads=3).eval()  # narrow: quick
    seen = []
    for block in tower.blocks:
        block.norm1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))
    images = torch.randn(4, 3, *tower.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        deciding = int(tower.forward_features(images).lengths.sum())
        assert deciding == 4 * patches if rate == 1 else 4 <= deciding < 4 * patches
        for asked in (rate, 7.0):
            seen.clear()
            tower.set_compression(asked)
            assert tower.forward_features(images).lengths.tolist() == [round(patches / asked)] * 4
            assert seen == [4 * patches] * dense + [4 * round(patches / asked)] * (len(tower.blocks) - dense)


@pytest.mark.parametrize("name, tokens, patches", [("SeNaTra-T", 49, 3136), ("SeNaTra-mini", 16, 1024)])
def test_senatra_in_a_clip(name, tokens, patches):
    """Built as named; it has no boundaries, so open_clip's own model and loss train it, with a ViT's Adam."""
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    tower = tower_of(model)
    assert patches_of(tower) == patches and not has_boundaries(model)
    images = torch.randn(2, 3, *model.visual.image_size)
    with torch.no_grad():
        features, found = encode_image_tokens(model, images)
        torch.testing.assert_close(features, model.encode_image(images, normalize=True))
    assert found.lengths.tolist() == [tokens] * 2
    args = parse(["--model", name, "--train-data", "x.tar"])
    assert is_tower(name) and (args.beta2, args.eps) == (0.98, 1e-6)


def test_names_survive_flags_and_folders(tmp_path):
    """A "+" in a model's name: through the parser, and as part of a run's default name."""
    args = parse(["--model", "DRIP-B-16-4x-4+8", "--train-data", "x.tar"])
    assert args.model == "DRIP-B-16-4x-4+8" and is_tower(args.model)
    (tmp_path / "2026-model_DRIP-B-16-4x-4+8" / "checkpoints").mkdir(parents=True)
    checkpoint = tmp_path / "2026-model_DRIP-B-16-4x-4+8" / "checkpoints" / "epoch_3.pt"
    checkpoint.touch()
    assert find_checkpoint(checkpoint.parent.parent) == checkpoint


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
