"""DynamicViT in open_clip and its trainer."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from clip_helpers import SHORT

import llava_drip  # noqa: F401 - registers the models
from llava_drip.contrastive.model import BoundaryCLIP, encode_image_tokens, has_boundaries, patches_of, tower_of
from llava_drip.contrastive.train import train

MODEL = "DynamicViT-mini-8"
EXPECTED = {"DynamicViT-S-16": (196, 67, "ViT-S-16"), "DynamicViT-B-16": (196, 67, "ViT-B-16"), MODEL: (64, 31, None)}


@pytest.mark.parametrize("name", EXPECTED)
def test_config_builds_the_named_tower(name):
    patches, tokens, text = EXPECTED[name]
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta")
    tower = tower_of(model)
    assert has_boundaries(model) and patches_of(tower) == patches
    assert tower.token_counts(1, patches)[-1] == (tokens,) and tower.global_pool == "token"
    if text:
        ours, theirs = open_clip.get_model_config(name), open_clip.get_model_config(text)
        assert (ours["text_cfg"], ours["embed_dim"]) == (theirs["text_cfg"], theirs["embed_dim"])
        assert (tower.embed_dim, len(tower.blocks)) == (theirs["vision_cfg"]["width"], theirs["vision_cfg"]["layers"])


def test_the_contrastive_loss_and_the_ratio_loss_reach_the_predictors():
    torch.manual_seed(0)
    model = BoundaryCLIP.adopt(open_clip.create_model(MODEL, output_dict=True)).train()
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    texts = open_clip.get_tokenizer(MODEL)(["a cat", "two dogs on a lawn", "sky"])
    for entry in ("rate_loss", "image_features"):
        model.zero_grad()
        output = model(images, texts)
        (output[entry] * torch.randn_like(output[entry])).sum().backward()
        for predictor in tower_of(model).score_predictor:
            assert predictor.out_conv[4].weight.grad.abs().sum() > 0, entry
    assert output["num_tokens"].shape == (3,)
    features, tokens = encode_image_tokens(model.eval(), images)
    torch.testing.assert_close(features, model.encode_image(images, normalize=True))
    assert tokens.lengths.tolist() == [31] * 3


def test_an_epoch_of_training(data, tmp_path):
    flags = [f"--model={MODEL}", f"--train-data={data}/train-{{0..1}}.tar", "--train-num-samples=48", "--batch-size=8"]
    folder = train([*flags, *SHORT, "--epochs=1", f"--logs={tmp_path}", "--name=run"])
    run = json.loads((folder / "run.json").read_text())
    assert run["flags"]["boundary_loss_weight"] == 2.0  # the paper's
    row = json.loads((folder / "epochs.jsonl").read_text().splitlines()[-1])
    assert row["compression_eval"] == pytest.approx(64 / 31) and 1 < row["compression"] < 64
    assert row["boundary_loss"] > 0
    again = open_clip.create_model(f"local-dir:{folder}").eval()
    assert tower_of(again).forward_features(torch.zeros(1, 3, 64, 64)).lengths.tolist() == [31]
