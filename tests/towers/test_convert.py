"""Dense ViTs of timm, open_clip and Hugging Face as DRIPs: equal at compression 1, rebuilt from disk; refused if no plain ViT.

Every checkpoint is made here, in each library's own format, with random weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from dense_models import TEXT, VISION, hf_model, small_clip
from safetensors.torch import save_file
from timm.data.constants import OPENAI_CLIP_MEAN
from timm.models import save_for_hf
from torch import nn
from tower_helpers import shake
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from llava_drip.towers.convert import convert, is_projection
from llava_drip.towers.io import load_tower, save_tower


def pixels(tower: nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *tower.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_original(tower: nn.Module, original, tolerance: float = 1e-5) -> None:
    """At compression 1 the outputs are those of `original`, and at the tower's own they are not."""
    x = pixels(tower)
    theirs = original(x)
    assert not torch.allclose(tower(x), theirs, atol=1e-3)
    tower.set_compression(1.0)
    assert (tower(x) - theirs).abs().max() <= tolerance * theirs.abs().max()
    tower.set_compression(None)


@torch.no_grad()
def assert_rebuilt(tower: nn.Module, directory: Path) -> None:
    """save_tower, load_tower: the same tower and preprocessing."""
    config = tower.pretrained_cfg
    save_tower(tower, directory, config["mean"], config["std"])
    back = load_tower(directory, num_classes=tower.num_classes).eval()
    assert torch.equal(back(pixels(tower)), tower(pixels(tower)))
    for name in ("mean", "std", "input_size"):
        assert list(back.pretrained_cfg[name]) == list(config[name]), name
    for name in ("interpolation", "crop_pct"):
        assert back.pretrained_cfg[name] == config[name], name
    assert load_tower(directory).num_classes == 0


# timm

TIMM = {
    "class token": ("vit_tiny_patch16_224", {"depth": 3}, {}),
    "mean, registers": (
        "vit_tiny_patch16_224",
        {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
        {"depth": 3},
    ),
    "CLIP": ("vit_base_patch32_clip_quickgelu_224", {"embed_dim": 96, "num_heads": 3}, {"depth": 3}),
    "layer scale": ("deit3_small_patch16_224", {"embed_dim": 96, "num_heads": 3}, {"depth": 3}),
    "norm of queries and keys": ("vit_tiny_patch16_224", {"qk_norm": True, "qkv_bias": False}, {"depth": 3}),
    "no final norm, tanh": ("vit_tiny_patch16_224", {"final_norm": False, "act_layer": "gelu_tanh"}, {"depth": 3}),
    "narrow MLP": ("vit_tiny_patch16_224", {"mlp_ratio": 1.2345}, {"depth": 3}),
    "wide picture": ("vit_tiny_patch16_224", {"img_size": (32, 64), "patch_size": (8, 16)}, {"depth": 3}),
}


@pytest.mark.parametrize("kind", TIMM)
def test_timm(kind, tmp_path):
    name, arguments, more = TIMM[kind]
    model = shake(timm.create_model(name, **{"img_size": 64, **arguments, **more}, num_classes=7))
    tower = convert(model, compression=3.0, pool_after=1)
    assert tower.num_classes == 7 and not is_projection(tower.head)
    assert_original(tower, model)
    assert_rebuilt(tower, tmp_path)


def test_the_entry_point_is_the_nearest(tmp_path):
    """Full sizes on the meta device would not run; arguments tell what differs."""
    tower = convert(timm.create_model("vit_tiny_patch16_224", num_classes=3))
    assert tower.pretrained_cfg["architecture"] == "drip_tiny_patch16_224"
    assert tower.model_args == {"class_token": True, "global_pool": "token", "compression": 4.0}
    assert tower.pretrained_cfg["mean"] == (0.5, 0.5, 0.5) and tower.pretrained_cfg["crop_pct"] == 0.9


def test_timm_directory(tmp_path):
    model = shake(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5))
    save_for_hf(model, tmp_path, model_args={"img_size": 64, "depth": 3}, safe_serialization=True)
    assert_original(convert(tmp_path), model)


def test_drip_arguments_and_another_size():
    model = shake(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=5))
    options = {"compression": (2.0, 2.0), "pool_after": (1, 2), "scan": "hilbert", "elastic": (2.0, 8.0)}
    tower = convert(model, **options)
    assert tower.compression == 4.0 and tower.scan == "hilbert" and tower.elastic == (2.0, 8.0)
    assert_original(tower, model)
    larger = convert(model, **options, img_size=96)
    assert larger.patch_embed.grid_size == (6, 6) and larger(pixels(larger)).shape == (2, 5)
    same = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=5)
    same.load_state_dict(model.state_dict())
    same.set_input_size((96, 96))  # timm's own interpolation
    assert_original(larger, same.eval(), tolerance=1e-4)


# open_clip

OPEN_CLIP = {
    "GELU": ({}, {}),
    "QuickGELU": ({}, {"quick_gelu": True}),
    "layer scale": ({"ls_init_value": 0.1}, {}),
    "mean": ({"pool_type": "avg", "final_ln_after_pool": True}, {}),
}


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_open_clip(kind, tmp_path):
    vision, options = OPEN_CLIP[kind]
    model = small_clip(vision, **options)
    tower = convert(model)
    assert tower.num_classes == 24 and is_projection(tower.head)
    assert_original(tower, model.encode_image)
    assert_rebuilt(tower, tmp_path)


def write_open_clip(directory: Path, model: nn.Module, config: dict) -> None:
    preprocessing = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear"}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")


def test_open_clip_directory(tmp_path):
    model = small_clip(quick_gelu=True)
    write_open_clip(tmp_path, model, {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True})
    tower = convert(str(tmp_path))
    assert_original(tower, model.encode_image)
    assert tower.pretrained_cfg["mean"] == (0.5, 0.4, 0.3) and tower.pretrained_cfg["interpolation"] == "bilinear"
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded by open_clip"):
        convert(str(tmp_path))


def test_open_clip_name_and_file(tmp_path):
    """The true ViT-B-32, by name and a file of weights as --pretrained takes it (600 MB; about 15 s)."""
    model = shake(open_clip.create_model("ViT-B-32"))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    tower = convert(f"open_clip:ViT-B-32/{tmp_path}/weights.pt")
    assert tower.pretrained_cfg["architecture"] == "drip_base_patch32_224" and tower.num_classes == 512
    assert_original(tower, model.encode_image, tolerance=1e-4)


def test_open_clip_around_a_timm_model():
    """CLIPs of this package, and open_clip's ViTs of timm: a trunk and a projection."""
    model = shake(open_clip.create_model("DRIP-mini-8-1x"))
    tower = convert(model, compression=4.0)
    assert tower.pretrained_cfg["architecture"] == "drip_mini_patch8_64_4x" and is_projection(tower.head)
    assert_original(tower, model.encode_image)


# Hugging Face


def embedding(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(model, CLIPModel):
        return model.get_image_features(pixel_values=x).pooler_output
    out = model(pixel_values=x)
    return out.image_embeds if isinstance(model, CLIPVisionModelWithProjection) else out.pooler_output


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind, outputs", [(CLIPModel, 40), (CLIPVisionModelWithProjection, 24), (CLIPVisionModel, 0)])
def test_hugging_face_directory(kind, outputs, act, tmp_path):
    model = hf_model(kind, hidden_act=act)
    model.save_pretrained(tmp_path / "hf")
    tower = convert(tmp_path / "hf")
    assert tower.num_classes == outputs
    assert_original(tower, lambda x: embedding(model, x))
    assert_original(convert(model), lambda x: embedding(model, x))
    assert_rebuilt(tower, tmp_path / "tower")


def test_hugging_face_preprocessing_and_half_precision(tmp_path):
    model = hf_model(CLIPVisionModelWithProjection)
    model.half().save_pretrained(tmp_path)
    size = {"shortest_edge": 80}
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], size=size, crop_size=64, resample=2).save_pretrained(tmp_path)
    tower = convert(tmp_path)
    assert tower.pretrained_cfg["mean"] == (0.1, 0.2, 0.3) and tower.pretrained_cfg["crop_pct"] == 0.8
    assert tower.pretrained_cfg["interpolation"] == "bilinear"
    assert {p.dtype for p in tower.parameters()} == {torch.float32}
    assert_original(tower, lambda x: embedding(model.float(), x))


def test_hugging_face_preprocessing_that_is_damaged_or_says_little(tmp_path):
    hf_model(CLIPVisionModelWithProjection).save_pretrained(tmp_path)
    assert convert(tmp_path).pretrained_cfg["mean"] == OPENAI_CLIP_MEAN, "no file: CLIP's own"
    file = tmp_path / "preprocessor_config.json"
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], size={"shortest_edge": 64}).save_pretrained(tmp_path)
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "crop_size": None, "do_center_crop": False}))
    config = convert(tmp_path).pretrained_cfg
    assert config["mean"] == (0.1, 0.2, 0.3) and config["crop_pct"] == 1.0
    for damaged in ("{", "[]", json.dumps({**saved, "image_mean": "grey"})):
        file.write_text(damaged)
        with pytest.raises(ValueError, match="preprocessor_config.json: cannot be read"):
            convert(tmp_path)


@pytest.mark.slow
def test_hugging_face_large(tmp_path):
    """The shape of CLIP ViT-L/14 (1.2 GB; about 25 s)."""
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    model = CLIPVisionModelWithProjection(config).eval()
    tower = convert(model)
    assert tower.pretrained_cfg["architecture"] == "drip_large_patch14_224" and tower.num_classes == 768
    with torch.no_grad():
        x = pixels(tower, batch=1)
        theirs = embedding(model, x)
        tower.set_compression(1.0)
        assert (tower(x) - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.slow
def test_large_at_336():
    """ViT-L/14 at 336 px is another entry point; three of its blocks."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "num_attention_heads": 16}
    tower = convert(CLIPVisionModel(CLIPVisionConfig(**shape, patch_size=14, image_size=336)), pool_after=1)
    assert tower.pretrained_cfg["architecture"] == "drip_large_patch14_336" and tower.patch_embed.grid_size == (24, 24)


def test_the_hub(tmp_path, repository):
    """hf-hub:ID of the local cache, with the Hub out of reach: in open_clip's format, Hugging Face's and timm's."""
    models = {"open": small_clip(), "hf": hf_model(CLIPVisionModelWithProjection)}
    models["timm"] = shake(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5))
    for name in models:
        repository = tmp_path / "hub" / f"models--someone--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("abc")
        snapshot = repository / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        if name == "open":
            write_open_clip(snapshot, models[name], {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT})
        elif name == "hf":
            models[name].save_pretrained(snapshot)
        else:
            save_for_hf(models[name], snapshot, model_args={"img_size": 64, "depth": 3}, safe_serialization=True)
        save_file(models[name].state_dict(), tmp_path / f"{name}.safetensors")
    code = """
import sys, torch
from pathlib import Path
from llava_drip.towers.convert import convert
from llava_drip.towers.io import save_tower
for name in ("open", "hf", "timm"):
    tower = convert(f"hf-hub:someone/{name}")
    save_tower(tower, Path(sys.argv[1], name), tower.pretrained_cfg["mean"], tower.pretrained_cfg["std"])
try:
    convert("hf-hub:someone/nothing")
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "towers")],
        cwd=repository, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "hf-hub:someone/nothing: not in the cache, and the Hub cannot be reached" in done.stdout
    for name, model in models.items():
        original = {"open": lambda m: m.encode_image, "hf": lambda m: lambda x: embedding(m, x)}.get(name, lambda m: m)(
            model
        )
        outputs = {"open": 24, "hf": 24, "timm": 5}[name]
        assert_original(load_tower(tmp_path / "towers" / name, num_classes=outputs).eval(), original)


# Towers of this package


def test_a_dense_tower_becomes_a_4x_one(tmp_path):
    dense = shake(timm.create_model("drip_mini_patch8_64_1x", num_classes=6))
    save_tower(dense, tmp_path / "run" / "best", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    tower = convert(tmp_path / "run", compression=4.0)
    assert tower.pretrained_cfg["architecture"] == "drip_mini_patch8_64_4x" and tower.compression == 4.0
    assert tower.pretrained_cfg["mean"] == (0.1, 0.2, 0.3) and tower.global_pool == "avg"
    assert_original(tower, dense)
    fresh = timm.create_model("drip_mini_patch8_64_4x").boundary_predictor
    # Not those of compression 1, where a boundary is all but certain everywhere.
    assert torch.equal(tower.boundary_predictor.fc2.bias, fresh.fc2.bias)
    assert_rebuilt(tower, tmp_path / "tower")


def test_the_name_says_no_other_rate():
    dense = shake(timm.create_model("drip_mini_patch8_64_1x", num_classes=6))
    for compression, name in ((10.0, "drip_mini_patch8_64_10x"), (3.0, "drip_mini_patch8_64")):
        tower = convert(dense, compression=compression)
        assert tower.pretrained_cfg["architecture"] == name and tower.compression == compression
        assert tower.pool_after == 1 and "compression" in tower.model_args
    from_scratch = timm.create_model("drip_base_patch32_224_1x_rope", num_classes=6, depth=1, pool_after=1)
    tower = convert(from_scratch, compression=3.0, pool_after=1)
    assert tower.pretrained_cfg["architecture"] == "drip_base_patch32_224_rope" and tower.relative == "rotary"


def test_a_budget_asked_for_is_kept_whole():
    dense = shake(timm.create_model("drip_mini_patch8_64_1x", num_classes=6))
    tower = convert(dense, budget=4, over="batch")
    assert float(tower.budget) == 4.0 and tower.over == "batch"


def test_its_own_arguments_stay(tmp_path):
    """What makes the dense tower another ViT than timm's is kept, what belongs to boundaries is not."""
    dense = shake(
        timm.create_model("drip_mini_patch8_64_1x", num_classes=6, img_size=32, relative="rotary", scan="hilbert")
    )
    save_tower(dense, tmp_path / "dense", (0.5,) * 3, (0.5,) * 3)
    tower = convert(tmp_path / "dense", compression=2.0)
    assert tower.relative == "rotary" and tower.scan == "raster" and tower.patch_embed.img_size == (32, 32)
    assert_original(tower, dense)


OF_BOUNDARIES = {
    "boundary": "similarity",
    "rate_loss": "interval",
    "rate_interval": (0.5, 1.5),
    "sampling": "gumbel",
    "mean_over": "tokens",
    "detail_weight": 0.5,
    "blend": 0.5,
    "scan": "hilbert",
    "size_bias": False,
    "predictor_dim": 8,
    "pool_after": 3,
}


@pytest.mark.parametrize("boundary", ["gumbel", "entropy"])
def test_what_a_dense_tower_records_of_boundaries_is_left_behind(boundary, tmp_path):
    """Some of it would be refused beside another rule, or rate loss, of the new tower."""
    dense = timm.create_model("drip_mini_patch8_64_1x", num_classes=6, position_scale=0.5, **OF_BOUNDARIES)
    save_tower(shake(dense), tmp_path / "dense", (0.5,) * 3, (0.5,) * 3)
    tower = convert(tmp_path / "dense", compression=4.0, boundary=boundary)
    kept = set(tower.model_args) & set(OF_BOUNDARIES)
    assert kept == {"boundary"} and tower.model_args["position_scale"] == 0.5
    assert tower.size_bias and tower.mean_over == "patches" and tower.scan == "raster" and tower.pool_after == 1
    assert_original(tower, dense)


def test_a_4x_tower_is_refused(tmp_path):
    save_tower(timm.create_model("drip_mini_patch8_64_4x"), tmp_path, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="pools already, at compression 4.0"):
        convert(tmp_path)
