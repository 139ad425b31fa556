"""A run's checkpoint as a CLIP and as its bare tower."""

from __future__ import annotations

import json
import os
import shutil

import open_clip
import pytest
import timm
import torch
from clip_helpers import MODEL

from llava_drip.contrastive.checkpoint import find_checkpoint, load_clip, load_clip_tower, load_tokenizer


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/epoch_1.pt"])
def test_tower_has_the_trained_weights(run, place):
    tower, info = load_clip_tower(run / place, MODEL)
    state = torch.load(run / "checkpoints" / "epoch_1.pt", weights_only=True)["state_dict"]
    prefix = "visual.trunk."
    torch.testing.assert_close(
        tower.state_dict(), {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    )
    assert not tower.training
    assert info["image_size"] == (64, 64)
    assert info["mean"] == list(open_clip.OPENAI_DATASET_MEAN) and info["std"] == list(open_clip.OPENAI_DATASET_STD)
    again = timm.create_model("drip_mini_patch8_64_4x", num_classes=0)
    again.load_state_dict(tower.state_dict())
    images = torch.randn(2, 3, *info["image_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = tower.forward_features(images)
        torch.testing.assert_close(tower(images), again.eval()(images))
    assert len(tokens) == 2 and (tokens.lengths >= 1).all()


def test_statistics_and_size_of_the_run_are_used(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["preprocess_cfg"].update(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    config["model_cfg"]["text_cfg"]["context_length"] = 32
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    _, info = load_clip_tower(copy, MODEL)
    assert (info["mean"], info["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    model, _ = load_clip(copy, MODEL)
    assert model.context_length == 32  # the text positions are resized, as open_clip does


def test_the_runs_configuration_names_the_model(run, tmp_path):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (named, transform), (found, its_transform) = load_clip(run, MODEL), load_clip(run)
    with torch.no_grad():
        torch.testing.assert_close(named.encode_image(images), found.encode_image(images))
    assert str(transform) == str(its_transform) and not found.training
    texts = ["a red square", "two blue ones"]
    tokens = load_tokenizer(run, found)(texts)
    assert torch.equal(tokens, load_tokenizer(run, named, MODEL)(texts)) and tokens.shape == (2, 32)
    copy = shutil.copytree(run / "checkpoints", tmp_path / "alone" / "checkpoints")
    with pytest.raises(ValueError, match=r"epoch_1.pt: no open_clip_config.json .*; name the model"):
        load_clip(copy.parent)
    for content, message in (("{}", "describes no model"), ("[]", "not a JSON object"), ("{", "not valid JSON")):
        (copy.parent / "open_clip_config.json").write_text(content)
        with pytest.raises(ValueError, match=f"open_clip_config.json: {message}"):
            load_clip(copy.parent)


def test_an_open_clip_folder_is_a_checkpoint(run, tmp_path):
    from safetensors.torch import save_file

    model, _ = load_clip(run)
    shutil.copy(run / "open_clip_config.json", tmp_path)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    again, _ = load_clip(tmp_path)
    torch.testing.assert_close(again.state_dict(), model.state_dict())


def test_newest_checkpoint_is_found(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("epoch_2.pt", "epoch_10.pt", "epoch_11.pt.partial"):
        (folder / name).touch()
    assert find_checkpoint(tmp_path).name == "epoch_10.pt"
    (folder / "epoch_latest.pt").touch()
    assert find_checkpoint(tmp_path).name == "epoch_latest.pt"
    os.utime(folder / "epoch_latest.pt", (0, 0))  # of before the run went on without --save-most-recent
    assert find_checkpoint(tmp_path).name == "epoch_10.pt"


def test_wrong_checkpoints_are_named(run, tmp_path):
    with pytest.raises(ValueError, match="none: no such checkpoint"):
        load_clip_tower(tmp_path / "none", MODEL)
    with pytest.raises(ValueError, match="no model 'DRIP-mini'"):
        load_clip_tower(run, "DRIP-mini")
    with pytest.raises(ValueError, match=r"epoch_1.pt: not a checkpoint of DRIP-B-32-4x"):
        load_clip_tower(run, "DRIP-B-32-4x")
    for content in (b"junk", b""):
        (tmp_path / "junk.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"junk.pt: not a checkpoint of") as error:
            load_clip_tower(tmp_path / "junk.pt", MODEL)
        assert "\n" not in str(error.value)
    state = torch.load(run / "checkpoints" / "epoch_1.pt", weights_only=True)["state_dict"]
    text_only = {name: value for name, value in state.items() if not name.startswith("visual.")}
    torch.save({"state_dict": text_only}, tmp_path / "text.pt")
    with pytest.raises(ValueError, match=r"text.pt: not a checkpoint of .*visual.trunk"):
        load_clip_tower(tmp_path / "text.pt", MODEL)
