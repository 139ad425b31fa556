"""Folders of runs as the two trainers write them."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from run_folders import HALF, epoch, write_run
from safetensors.torch import save_file

from llava_drip.contrastive import register
from llava_drip.towers.io import save_tower


@pytest.fixture(scope="session")
def imagenet_run(tmp_path_factory) -> Path:
    """Three epochs; best/ is the second's, last/ the third's. A classifier of 10 classes."""
    folder = tmp_path_factory.mktemp("runs") / "drip_4x"
    model = "drip_mini_patch8_64_4x"
    rows = [epoch(1, top1=0.2, top5=0.6), epoch(2, top1=0.35, top5=0.8), epoch(3, top1=0.3, top5=0.75)]
    write_run(folder, "train_imagenet.py", model, rows)
    for seed, name in enumerate(("best", "last")):
        torch.manual_seed(seed)
        tower = timm.create_model(model, num_classes=10)
        torch.nn.init.normal_(tower.head.weight)  # zeros, to begin with
        save_tower(tower, folder / name, HALF, HALF)
    state = folder / "checkpoints" / "step-30"
    state.mkdir(parents=True)
    (state / "optimizer.bin").write_bytes(b"optimizer")
    return folder


@pytest.fixture(scope="session")
def clip_run(tmp_path_factory) -> Path:
    """Two epochs of a DRIP-mini-8-4x, in open_clip's layout with the tower beside it."""
    folder = tmp_path_factory.mktemp("logs") / "clip"
    rows = [epoch(number, zero_shot_top1=0.1 * number, zero_shot_top5=0.2 * number) for number in (1, 2)]
    write_run(folder, "train_clip.py", "DRIP-mini-8-4x", rows)
    register()
    torch.manual_seed(0)
    model = open_clip.create_model("DRIP-mini-8-4x", pretrained_text=False)
    config = {"model_cfg": open_clip.get_model_config("DRIP-mini-8-4x"), "preprocess_cfg": model.visual.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {name: value.clone() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    save_tower(model.visual.trunk, folder / "tower", HALF, HALF)
    (folder / "out.log").write_text("reading /secret/place\n")
    return folder
