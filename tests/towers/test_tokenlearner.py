"""TokenLearner: the authors' outputs to 1e-5, the ViT around it, and budgets that it cannot follow."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import group_parameters
from torch import Tensor

from llava_drip.assistant import build_assistant
from llava_drip.classification.model import build
from llava_drip.contrastive import CONFIGS
from llava_drip.contrastive.arguments import is_tower
from llava_drip.contrastive.model import has_boundaries, tower_of
from llava_drip.towers import TokenFuser, TokenLearner, TokenLearnerViT
from llava_drip.towers.contract import check_budget
from llava_drip.towers.io import load_tower
from llava_drip.towers.tokenlearner import load_scenic_params

GOLDEN = load_file(Path(__file__).parent / "golden" / "tokenlearner_golden.safetensors")
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
LAYOUTS = {
    "1.1": {},
    "1.0": {"version": "1.0", "insert_at": 1},
    "at the start": {"insert_at": 0, "num_tokens": 3},
    "fuser": {"use_fuser": True},
    "fuser, 1.0": {"use_fuser": True, "version": "1.0", "insert_at": 3},
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def golden(module: str) -> dict[str, Tensor]:
    """The golden file's flax parameters of a module: path → array."""
    start = f"{module}.params."
    return {name.removeprefix(start): value for name, value in GOLDEN.items() if name.startswith(start)}


def make(layout: str = "1.1", **arguments) -> TokenLearnerViT:
    """A small tower whose parameters are all random: zeros and ones would hide a wrong place."""
    torch.manual_seed(0)
    tower = timm.create_model("tokenlearner_tiny_patch16_224", **{**TINY, **LAYOUTS[layout], **arguments}).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter == 1))
    return tower


def pictures(n: int = 3, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


# The modules


@pytest.mark.parametrize(
    "name, module",
    [
        ("v10", TokenLearner(32, 8, version="1.0")),
        ("v11", TokenLearner(32, 8, version="1.1", bottleneck_dim=24)),
        ("fuser", TokenFuser(32, 8, bottleneck_dim=24)),
    ],
)
def test_outputs_are_the_authors_own(name, module):
    load_scenic_params(module, golden(name))
    patches = GOLDEN["input_bhwc"]
    with torch.no_grad():
        got = module(GOLDEN["v11.output"], patches.flatten(1, 2)) if name == "fuser" else module(patches)
    torch.testing.assert_close(got, GOLDEN[f"{name}.output"], atol=1e-5, rtol=0)
    # flax also gives paths as tuples, under the collection's name
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.reset_parameters()
    load_scenic_params(module, {("params", *path.split("/")): value.numpy() for path, value in golden(name).items()})
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_tokens_are_sums_of_patches_weighted_by_the_maps(version):
    torch.manual_seed(0)
    module, x = TokenLearner(16, 4, version=version), torch.randn(2, 5, 5, 16)
    tokens, maps = module(x, return_maps=True)
    assert tokens.shape == (2, 4, 16) and maps.shape == (2, 4, 5, 5) and (maps > 0).all()
    torch.testing.assert_close(tokens, torch.einsum("bshw,bhwd->bsd", maps, x))
    torch.testing.assert_close(module(x.flatten(1, 2)), tokens)
    if version == "1.1":
        torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 4))
        return
    mean = TokenLearner(16, 4, version=version, sum_pooling=False)
    mean.load_state_dict(module.state_dict())
    torch.testing.assert_close(mean(x), tokens / 25)


def test_a_new_fuser_adds_nothing_to_the_patches_and_learns():
    torch.manual_seed(0)
    fuser, tokens, patches = TokenFuser(16, 4), torch.randn(2, 4, 16), torch.randn(2, 9, 16)
    added = fuser(tokens, patches)
    assert added.shape == patches.shape and not added.any()
    (added * torch.randn_like(added)).sum().backward()
    assert fuser.mix.weight.grad.abs().sum() > 0 and torch.isfinite(fuser.mix.weight.grad).all()


def test_what_a_module_cannot_be_is_refused():
    for arguments, message in [
        ({"version": "2.0"}, "version must be one of"),
        ({"num_tokens": 0}, "num_tokens must be a whole number, at least 1, got 0"),
        ({"bottleneck_dim": 2.5}, "bottleneck_dim must be a whole number"),
        ({"sum_pooling": False}, 'sum_pooling belongs to version="1.0"'),
        ({"version": "1.0", "dropout": 0.1}, 'dropout belongs to version="1.1"'),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenLearner(**{"dim": 8, "num_tokens": 4, **arguments})
    with pytest.raises(ValueError, match="7 patches make no square"):
        TokenLearner(8, 4)(torch.zeros(1, 7, 8))


# The ViT


def dense_blocks(tower: TokenLearnerViT) -> torch.nn.ModuleList:
    """timm's own blocks, with the tower's weights."""
    dense = timm.models.VisionTransformer(**TINY, class_token=False, global_pool="avg", act_layer="gelu_tanh")
    dense.blocks.load_state_dict(tower.blocks.state_dict())
    return dense.eval().blocks


@every_layout
def test_the_vit_is_dense_blocks_with_token_learners_between_them(layout):
    tower, x = make(layout), pictures()
    blocks, B, N = dense_blocks(tower), 3, 16
    with torch.no_grad():
        h = tower.patch_embed(x) + tower.pos_embed
        maps = None
        for i, block in enumerate(blocks):
            patches = h
            if i == tower.insert_at or (i > tower.insert_at and tower.use_fuser):
                h, maps = tower.token_learners[i - tower.insert_at](patches, return_maps=True)
            h = block(h)
            if i >= tower.insert_at and tower.use_fuser:
                h = patches + tower.token_fusers[i - tower.insert_at](h, patches)
        t = tower.forward_features(x)
        torch.testing.assert_close(t.values.view(B, -1, 24), tower.norm(h))
        torch.testing.assert_close(tower(x), tower.head(tower.norm(h).mean(1)))
    torch.testing.assert_close(t.token_maps, maps)
    assert t.token_maps.shape == (B, tower.num_tokens, 4, 4) and t.token_maps.dtype == torch.float32
    assert t.lengths.tolist() == [N if tower.use_fuser else tower.num_tokens] * B
    if tower.use_fuser:  # each token is a patch again
        assert torch.equal(t.segments, torch.arange(N).expand(B, N))
    else:
        assert t.segments is None


@every_layout
@pytest.mark.parametrize("class_token", [False, True])
def test_later_blocks_see_the_learned_tokens_only(layout, class_token):
    tower, seen = make(layout, class_token=class_token), []
    for block in tower.blocks:
        block.norm1.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0]) // 3 - class_token))
    tower(pictures())
    assert seen == [16] * tower.insert_at + [tower.num_tokens] * (4 - tower.insert_at)


@every_layout
def test_an_image_is_answered_the_same_whatever_its_batch(layout):
    tower, x = make(layout), pictures(8)
    with torch.no_grad():
        whole = tower(x)
        assert torch.equal(whole, tower(x))
        for i in range(0, 8, 2):
            torch.testing.assert_close(tower(x[i : i + 2]), whole[i : i + 2], atol=1e-5, rtol=1e-5)


@every_layout
def test_every_parameter_learns_and_has_a_layer(layout):
    tower = make(layout).train()
    tower(pictures()).square().sum().backward()
    still = [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # What is the same for all patches cannot change a softmax over the patches: the last bias of version 1.1's maps.
    assert all(name.endswith("token_masking.fc2.bias") and name.startswith("token_learners") for name in still), still
    groups = {
        name: layer
        for layer, names in group_parameters(tower, tower.group_matcher(), reverse=False).items()
        for name in names
    }
    assert set(groups) == {name for name, _ in tower.named_parameters()}
    for i in range(len(tower.token_learners)):
        assert groups[f"token_learners.{i}.norm.weight"] == groups[f"blocks.{tower.insert_at + i}.norm1.weight"]


def test_layers():
    tower, x = make(), pictures()  # four blocks, TokenLearner after two
    for layer in (-1, -2, -3):
        assert tower.forward_features(x, layer=layer).lengths.tolist() == [8] * 3
    with pytest.raises(ValueError, match="layer -4 lies before TokenLearner, which follows block 2"):
        tower.forward_features(x, layer=-4)
    fused = make("fuser")
    assert fused.forward_features(x, layer=-4).token_maps is None  # before the first of them
    assert fused.forward_features(x, layer=-2).token_maps.shape == (3, 8, 4, 4)


def test_what_a_tower_cannot_be_is_refused():
    for arguments, message in [
        ({"insert_at": 4}, "insert_at must be between 0 and depth - 1 = 3, got 4"),
        ({"insert_at": 1.5}, "insert_at must be between 0 and depth - 1 = 3, got 1.5"),
        ({"num_tokens": 0}, "num_tokens must be a whole number"),
        ({"mean_over": "patches"}, "mean_over='patches': learned tokens stand for no patches"),
        ({"use_fuser": True, "class_token": True, "global_pool": "token"}, "would not use the last TokenFuser"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**arguments)
    with pytest.raises(ValueError, match="would not use the last TokenFuser"):
        make("fuser", class_token=True).reset_classifier(2, global_pool="token")


# Budgets, names, configurations


def test_a_budget_is_refused_wherever_one_can_be_asked_for(tiny_language_model, tmp_path):
    with pytest.raises(
        ValueError,
        match="compression=4.0: tokenlearner_tiny_patch16_224 has no adjustable token budget: .*choose num_tokens",
    ):
        make(compression=4.0)
    with pytest.raises(ValueError, match="choose num_tokens"):
        load_tower("tokenlearner_mini_patch8_64", compression=4.0)
    with pytest.raises(ValueError, match="choose num_tokens"):  # train_imagenet.py --compression
        build("tokenlearner_mini_patch8_64", {"compression": 4.0}, num_classes=10)
    hint = "has no adjustable token budget: it makes 8 tokens of every image; choose num_tokens when the tower is made"
    with pytest.raises(ValueError, match=f"tokenlearner_mini_patch8_64 {hint}"):
        build_assistant(str(tiny_language_model), "tokenlearner_mini_patch8_64", compression=4.0)
    model, _ = build_assistant(str(tiny_language_model), "tokenlearner_mini_patch8_64")
    with pytest.raises(ValueError, match=hint):  # what the engine, the chat page and the benchmark call
        model.set_compression(4.0)
    with pytest.raises(ValueError, match="x has no adjustable token budget: with use_fuser it gives all patches back"):
        check_budget(make("fuser"), "x")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("TokenLearner-*.json")), ids=lambda path: path.stem)
def test_open_clip_builds_the_named_tower(path):
    with torch.device("meta"):
        model = open_clip.create_model(path.stem, device="meta")
    tower = tower_of(model)
    assert isinstance(tower, TokenLearnerViT) and is_tower(path.stem) and not has_boundaries(model)
    assert (tower.num_tokens, tower.insert_at) == (8, len(tower.blocks) // 2)
    assert f"patch{tower.patch_embed.patch_size[0]}" in tower.pretrained_cfg["architecture"]
    assert model.visual.image_size == tower.patch_embed.img_size
    if "-B-" in path.stem:  # beside the DRIP of that size: the same text tower
        ours, drips = (open_clip.get_model_config(name) for name in (path.stem, f"DRIP-{path.stem[13:]}-4x"))
        assert (ours["text_cfg"], ours["embed_dim"]) == (drips["text_cfg"], drips["embed_dim"])


def test_names():
    names = {f"tokenlearner_{size}_patch{p}_224" for size in ("tiny", "small", "base", "large") for p in (32, 16)}
    assert set(timm.list_models("tokenlearner_*")) == names | {"tokenlearner_mini_patch8_64"}
    with torch.device("meta"):
        large = timm.create_model("tokenlearner_large_patch16_224", num_tokens=16)
    assert (large.num_tokens, large.insert_at, len(large.blocks)) == (16, 12, 24)
