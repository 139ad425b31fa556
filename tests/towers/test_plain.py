"""The plain ViT as a tower: timm's, open_clip's and Hugging Face's weights by name and directory, wherever a tower is named.

Every checkpoint is made here, in each library's own format, with random weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from tower_helpers import shake
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, CLIPVisionModelWithProjection

from llava_drip.assistant.build import build_assistant
from llava_drip.classification.arguments import parse
from llava_drip.classification.model import Classifier, build, create
from llava_drip.contrastive.model import encode_image_tokens, has_boundaries, tower_of
from llava_drip.towers.directories import tower_directory
from llava_drip.towers.io import describe_tower, load_tower, save_tower
from llava_drip.towers.plain import PLAIN_PRESETS
from llava_drip.towers.pretrained import is_pretrained_name
from llava_drip.towers.vit import PackedVisionTransformer

VISION = {"image_size": 64, "patch_size": 16, "width": 96, "layers": 3, "head_width": 32}
TEXT = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 100, "context_length": 8}
HF_VISION = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 4}
HF_VISION |= {"image_size": 64, "patch_size": 16, "projection_dim": 24}


def pictures(n: int = 2, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def write_timm(directory: Path) -> nn.Module:
    model = shake(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5))
    save_for_hf(model, directory, model_args={"img_size": 64, "depth": 3}, safe_serialization=True)
    return model


def write_open_clip(directory: Path) -> nn.Module:
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}
    model = shake(open_clip.model.CLIP(**config))
    preprocessing = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear"}
    directory.mkdir(parents=True)
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    return model


def write_hf(directory: Path) -> nn.Module:
    model = shake(CLIPVisionModelWithProjection(CLIPVisionConfig(**HF_VISION)))
    model.save_pretrained(directory)
    return model


FORMATS = {
    "timm": (write_timm, 5, lambda model: model),
    "open_clip": (write_open_clip, 24, lambda model: model.encode_image),
    "hf": (write_hf, 24, lambda model: lambda x: model(pixel_values=x).image_embeds),
}
every_format = pytest.mark.parametrize("kind", FORMATS)


@pytest.mark.parametrize("name", PLAIN_PRESETS)
def test_presets_are_timms_own(name):
    with torch.device("meta"):
        tower = timm.create_model(name, depth=2, num_classes=3)
        other = name.removeprefix("plain_")
        theirs = timm.create_model(other, depth=2, num_classes=3) if timm.is_model(other) else None
    assert type(tower) is PackedVisionTransformer and tower.has_class_token and tower.global_pool == "token"
    assert tower.patch_embed.img_size == tower.default_cfg["input_size"][1:]
    if theirs is not None:
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (tower, theirs)]
        assert shapes[0] == shapes[1]


def test_timms_weights_load_strictly_and_answer_the_same():
    theirs = shake(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3))
    tower = timm.create_model("plain_vit_tiny_patch16_224", img_size=64, depth=3).eval()
    tower.load_state_dict(theirs.state_dict(), strict=True)
    x = pictures()
    tokens = tower.forward_features(x)
    assert tokens.lengths.tolist() == [16, 16] and tokens.segments[0].tolist() == list(range(16))
    torch.testing.assert_close(tower(x), theirs(x), atol=1e-5, rtol=1e-5)
    features = theirs.forward_features(x)  # class token first
    torch.testing.assert_close(tokens.values.view(2, 16, -1), features[:, 1:], atol=1e-5, rtol=1e-5)
    inner = theirs.get_intermediate_layers(x, n=[1])[0]  # the penultimate of three
    torch.testing.assert_close(tower.forward_features(x, layer=-2).values.view(2, 16, -1), inner, atol=1e-5, rtol=1e-5)


@every_format
@torch.no_grad()
def test_a_directory_of_another_library(kind, tmp_path):
    write, outputs, answer = FORMATS[kind]
    model = write(tmp_path / kind)
    assert tower_directory(str(tmp_path / kind)) == tmp_path / kind
    tower = load_tower(str(tmp_path / kind), num_classes=outputs)
    assert type(tower) is PackedVisionTransformer and not tower.training
    torch.testing.assert_close(tower(pictures()), answer(model)(pictures()), atol=1e-4, rtol=1e-4)
    bare = load_tower(tmp_path / kind)
    assert bare.num_classes == 0 and bare(pictures()).shape == (2, tower.num_features)
    anew = load_tower(str(tmp_path / kind), num_classes=3, img_size=96, drop_path_rate=0.1)
    assert anew(pictures(size=96)).shape == (2, 3) and anew.patch_embed.grid_size == (6, 6)

    config = bare.pretrained_cfg  # saved as a tower it needs no other library
    save_tower(bare, tmp_path / "tower", config["mean"], config["std"])
    again = load_tower(str(tmp_path / "tower")).eval()
    assert torch.equal(again(pictures()), bare(pictures()))
    for described in map(describe_tower, (again, bare)):
        assert described["architecture"] == config["architecture"] and described["image_size"] == 64
        assert described["mean"] == list(config["mean"]) and described["std"] == list(config["std"])
    if kind == "open_clip":
        assert config["mean"] == (0.5, 0.4, 0.3) and config["interpolation"] == "bilinear"


def test_names(tmp_path):
    write_hf(tmp_path / "someone" / "clip")
    for name in ("open_clip:ViT-B-32/x", "hf-hub:a/b", "ViT-B-32/laion2b_s34b_b79k", "openai/clip-vit-large-patch14"):
        assert is_pretrained_name(name)
    for name in ("vit_base_patch16_224.augreg_in21k", "drip_mini_patch8_64_4x", "no_such_tower", "/no/such/place"):
        assert not is_pretrained_name(name)
    assert is_pretrained_name(str(tmp_path / "someone" / "clip"))
    assert not is_pretrained_name(str(tmp_path / "someone"))


@pytest.mark.slow
def test_open_clip_name_and_file(tmp_path):
    """The true ViT-B-32 by open_clip's name, with a file of weights in the place of a tag (600 MB; about 10 s)."""
    model = open_clip.create_model("ViT-B-32").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    tower = load_tower(f"ViT-B-32/{tmp_path}/weights.pt", num_classes=512)
    assert tower.pretrained_cfg["architecture"] == "plain_vit_base_patch32_224"
    assert tower.model_args == {"pre_norm": True, "norm_eps": 1e-5}
    with torch.no_grad():
        x = pictures(1, 224)
        torch.testing.assert_close(tower(x), model.encode_image(x), atol=1e-4, rtol=1e-3)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the Hub with someone/clip in it, and no network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return write_open_clip(repository / "snapshots" / "abc")


@torch.no_grad()
def test_a_repository_of_the_hub(hub):
    for name in ("hf-hub:someone/clip", "someone/clip"):
        tower = load_tower(name, num_classes=24)
        torch.testing.assert_close(tower(pictures()), hub.encode_image(pictures()), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="^someone/nothing: neither a directory .* cannot be reached"):
        load_tower("someone/nothing")


def test_timms_names_are_pretrained():
    """Their weights are the point: never random ones without a word."""
    with pytest.raises(ValueError, match="vit_base_patch16_224.augreg_in21k: cannot be loaded by timm"):
        load_tower("vit_base_patch16_224.augreg_in21k")
    with pytest.raises(ValueError, match="vit_tiny_patch16_224.nonsense: cannot be loaded by timm: .*nonsense"):
        load_tower("vit_tiny_patch16_224.nonsense")
    assert type(load_tower("vit_tiny_patch16_224", any_model=True)) is timm.models.vision_transformer.VisionTransformer


def test_what_the_original_decides_and_what_is_no_plain_vit(tmp_path):
    write_hf(tmp_path / "hf")
    for name, value in {"depth": 2, "compression": 4.0}.items():
        with pytest.raises(ValueError, match=f"hf: .*{name}"):
            load_tower(str(tmp_path / "hf"), **{name: value})
    model = timm.create_model("vit_small_patch16_18x2_224", depth=1)
    save_for_hf(model, tmp_path / "parallel", model_args={"depth": 1}, safe_serialization=True)
    with pytest.raises(ValueError, match="parallel: its blocks are ParallelThingsBlocks"):
        load_tower(str(tmp_path / "parallel"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ValueError, match="is of model_type 'siglip'"):
        load_tower(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="norm_eps and norm_layer"):
        timm.create_model("plain_vit_tiny_patch16_224", norm_eps=1e-5, norm_layer=nn.LayerNorm)


def test_the_python_block_of_the_guide_runs(repository, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (repository / "docs/guides/towers/plain.md").read_text(), re.S)
    write_hf(tmp_path / "clip")
    names = {"images": pictures(size=336)}
    exec(compile(block.replace("path/to/clip", str(tmp_path / "clip")), "plain.md", "exec"), names)
    assert names["tokens"].lengths.tolist() == [441, 441]


# Where a tower is named


@every_format
def test_in_the_assistant(kind, tiny_language_model, tmp_path):
    FORMATS[kind][0](tmp_path / kind)
    torch.manual_seed(0)
    model, processor = build_assistant(str(tiny_language_model), str(tmp_path / kind))
    pixels = pictures()
    with torch.no_grad():
        tokens = model.eval().encode_images(pixels)
    assert tokens.lengths.tolist() == [16, 16]
    assert processor.image_processor.image_mean == tuple(model.vision_tower.pretrained_cfg["mean"])
    model.save_pretrained(tmp_path / "assistant")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "assistant").eval()
    with torch.no_grad():
        torch.testing.assert_close(again.encode_images(pixels).values, tokens.values)


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("kind", ["open_clip", "hf"])
def test_in_the_imagenet_program(kind, freeze, tmp_path):
    FORMATS[kind][0](tmp_path / kind)
    model = build(str(tmp_path / kind), {}, 7)
    assert type(model) is PackedVisionTransformer
    classifier = Classifier(model, freeze_backbone=freeze).train()
    logits, rate_loss, lengths = classifier(pictures())
    assert logits.shape == (2, 7) and rate_loss is None and lengths.tolist() == [16, 16]
    logits.square().mean().backward()
    learning = {name for name, p in classifier.named_parameters() if p.grad is not None}
    assert learning == (
        {"model.head.weight", "model.head.bias"} if freeze else set(dict(classifier.named_parameters()))
    )


@pytest.mark.parametrize("name", ["Plain-ViT-B-32", "Plain-ViT-B-16", "Plain-ViT-mini-8"])
def test_in_a_clip(name):
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta")
    tower = tower_of(model)
    assert type(tower) is PackedVisionTransformer and tower.global_pool == "token" and not has_boundaries(model)
    assert model.visual.image_size == tower.patch_embed.img_size
    if "mini" in name:
        model = open_clip.create_model(name).train()
        features, tokens = encode_image_tokens(model, pictures())
        assert tokens.lengths.tolist() == [64, 64]
        torch.testing.assert_close(features, model.encode_image(pictures(), normalize=True))
        features[0, 0].backward()
        assert all(p.grad is not None for name, p in tower_of(model).named_parameters())


def test_flags_that_contradict_such_a_name(tmp_path):
    write_hf(tmp_path / "hf")
    for model, what in ((tmp_path / "hf", "a directory"), ("ViT-B-32/openai", "a pretrained model")):
        argv = [f"--model={model}", "--pretrained", "--train-data=none", f"--output={tmp_path}/run"]
        with pytest.raises(ValueError, match=f"--pretrained: --model .* is {what} with weights of its own"):
            create(parse(argv, "train_imagenet.py", "help"), 7)


def test_a_mistyped_folder_is_not_sought_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="runs/typo: neither a tower directory nor"):
        load_tower("runs/typo")
