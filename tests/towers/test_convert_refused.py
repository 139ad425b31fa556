"""What cannot be made a DRIP, and mistakes: refused in a line that names them; and the program."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import open_clip
import pytest
import timm
from dense_models import TEXT, hf_model, small_clip
from safetensors.torch import load_file, save_file
from torch import nn
from tower_helpers import shake
from transformers import CLIPVisionModelWithProjection

from llava_drip.towers.convert import convert
from llava_drip.towers.io import load_tower


def no_vit(what: str) -> nn.Module:
    if what == "ResNet CLIP":
        vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
        return open_clip.model.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=TEXT)
    if what == "CoCa":
        return small_clip({"attentional_pool": True, "attn_pooler_heads": 2})
    if what == "own epsilons":
        model = timm.create_model("vit_tiny_patch16_224", depth=1)
        model.norm.eps = 1e-3
        return model
    options = {"depth": 1} if what.startswith(("vit", "deit")) else {}
    return timm.create_model(what, **options)


NO_VITS = {
    "ResNet CLIP": "its image tower is a ModifiedResNet, no ViT",
    "CoCa": "ends in attention pooling",
    "resnet18": "ResNet: no plain ViT",
    "vit_base_patch16_siglip_224": "global_pool is 'map'",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos: no plain ViT",
    "deit_tiny_distilled_patch16_224": "VisionTransformerDistilled is another architecture",
    "vit_giant_patch14_dinov2": "its MLP is a",
    "own epsilons": "epsilons of their own",
    "vit_small_patch16_18x2_224": "its blocks are ParallelThingsBlocks",
}


@pytest.mark.parametrize("what", NO_VITS)
def test_what_is_no_plain_vit(what):
    with pytest.raises(ValueError, match=NO_VITS[what]):
        convert(no_vit(what))


def test_what_nobody_has_thought_of_is_found_by_its_outputs():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5)
    model.pos_drop = nn.Tanh()
    with pytest.raises(ValueError, match="its outputs differ by .* of the largest"):
        convert(shake(model))


def test_arguments_that_the_source_decides():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5)
    for name, value in {"embed_dim": 5, "class_token": False, "num_classes": 3, "relative": "rotary"}.items():
        with pytest.raises(ValueError, match=f"{name}={value!r}: the dense original decides it"):
            convert(model, **{name: value})
    with pytest.raises(ValueError, match="pretrained=True: the dense original decides it"):
        convert(model, pretrained=True)
    for name in ("nonsense", "source", "dense", "model_name"):
        with pytest.raises(ValueError, match=name):
            convert(model, **{name: 1})
    with pytest.raises(ValueError, match="compression must be .*at least 1"):
        convert(model, compression=0.5)


def test_names_that_mean_nothing(tmp_path):
    wrong = {
        "no/such/place": "neither a directory .* nor|neither a directory",
        str(tmp_path): "no model: config.json .* is missing",
        "open_clip:ViT-B-32": "name the weights too, open_clip:ViT-B-32/TAG; TAG is one of openai",
        "open_clip:ViT-B-32/nonsense": "cannot be loaded by open_clip: .*nonsense",
        "vit_base_patch16_224.nonsense": "cannot be loaded by timm: .*nonsense",
        "drip_mini_patch8_64_1x": "cannot be loaded by timm: No pretrained weights",
    }
    for name, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            convert(name)


def test_damaged_directories(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        convert(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ValueError, match="is of model_type 'siglip'; of Hugging Face's models clip and"):
        convert(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    with pytest.raises(ValueError, match="cannot be loaded by timm"):
        convert(tmp_path)


def test_weights_that_are_missing_are_named(tmp_path):
    hf_model(CLIPVisionModelWithProjection).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (lost,) = [name for name in state if name.endswith("layers.1.mlp.fc1.weight")]
    save_file(
        {name: value for name, value in state.items() if name != lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"weights missing, or of another shape: .*layers\.1\.mlp\.fc1\.weight"):
        convert(tmp_path)


@pytest.mark.slow
def test_the_program(tmp_path, repository):
    hf_model(CLIPVisionModelWithProjection).save_pretrained(tmp_path / "hf")

    def convert_tower(*flags: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "scripts/convert_tower.py", str(tmp_path / "hf"), *flags]
        return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=120)

    flags = [f"--output={tmp_path}/tower", "--compression=3", "--pool-after=1", "--model-kwargs", "scan=serpentine"]
    done = convert_tower(*flags)
    assert done.returncode == 0, done.stderr[-2000:]
    tower = load_tower(tmp_path / "tower", num_classes=24)
    assert tower.compression == 3.0 and tower.pool_after == 1 and tower.scan == "serpentine"
    again = convert_tower(*flags)
    assert again.returncode == 1 and "exists already" in again.stderr and "Traceback" not in again.stderr
    twice = convert_tower(*flags, "compression=2")
    assert twice.returncode == 1 and "compression has a flag of its own" in twice.stderr
