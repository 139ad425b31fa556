"""One suite for all towers: what timm's users and the rest of this package expect of each, whatever it is inside.

Every preset runs once at its own width, patch and picture size, two blocks deep; what depends on the kind of tower and not on
its size runs on one small tower of each kind.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import llava_drip  # noqa: F401
from llava_drip.tokens import TokenBatch
from llava_drip.towers.contract import lacks_of_tower
from llava_drip.towers.io import load_tower, save_tower

FAMILIES = {  # timm's pattern → arguments that make it two blocks deep
    "drip_*": {"depth": 2, "pool_after": 1},
    "tokenlearner_*": {"depth": 2, "insert_at": 1},
    "plain_vit_*": {"depth": 2},
    "dynamicvit_*": {"depth": 2, "pruning_loc": (1,), "token_ratio": (0.5,)},
    "senatra_*": {"depths": (1, 1, 1, 2)},  # two blocks in its last stage
}
PRESETS = sorted((name, pattern) for pattern in FAMILIES for name in timm.list_models(pattern))
DRIP = {
    "model_name": "drip_tiny_patch16_224",
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 2,
}
TOKENLEARNER = {**DRIP, "model_name": "tokenlearner_tiny_patch16_224", "insert_at": 2}
DYNAMIC = {
    **DRIP,
    "model_name": "dynamicvit_tiny_patch16_224",
    "depth": 4,
    "pruning_loc": (1, 2),
    "token_ratio": (0.7, 0.4),
}
KINDS = {
    "drip": {**DRIP},
    "drip, similarity, hilbert": {**DRIP, "boundary": "similarity", "scan": "hilbert"},
    "drip, entropy": {**DRIP, "boundary": "entropy"},
    "drip, uniform": {**DRIP, "boundary": "uniform"},
    "drip, rotary, sizes": {**DRIP, "relative": "rotary", "size_bias": True},
    "drip, two depths, class token": {
        **DRIP,
        "compression": (2.0, 2.0),
        "pool_after": (1, 2),
        "class_token": True,
        "global_pool": "token",
    },
    "drip, elastic": {**DRIP, "elastic": (2.0, 10.0)},
    "dense": {**DRIP, "compression": 1.0},
    "tokenlearner": {**TOKENLEARNER},
    "tokenlearner, 1.0, class token": {
        **TOKENLEARNER,
        "version": "1.0",
        "class_token": True,
        "global_pool": "token",
    },
    "tokenlearner, fuser": {**TOKENLEARNER, "use_fuser": True, "insert_at": 1},
    "plain": {**DRIP, "model_name": "plain_vit_tiny_patch16_224"},
    "dynamicvit": {**DYNAMIC},
    "dynamicvit, mean, registers": {**DYNAMIC, "global_pool": "avg", "reg_tokens": 2},
    # compiling takes its time with the number of operations
    "senatra": {"model_name": "senatra_mini_64", "depths": (1, 1, 2), "num_heads": (1, 2, 4), "iterations": 1},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, num_classes: int = 7, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(**{**KINDS[kind], "num_classes": num_classes, **kwargs})


def pictures(n: int, size: int | tuple[int, int] = 64) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def patches(tower: nn.Module, height: int = 64, width: int = 64) -> int:
    patch = tower.patch_embed.patch_size
    return height // patch[0] * (width // patch[1])


def check_tokens(tokens: TokenBatch, tower: nn.Module, B: int, N: int) -> None:
    assert isinstance(tokens, TokenBatch) and len(tokens) == B
    assert (
        tokens.values.shape == (int(tokens.lengths.sum()), tower.num_features) and tokens.lengths.dtype == torch.int64
    )
    assert tokens.rate_loss.shape == (B,) and tokens.rate_loss.dtype == torch.float32
    if tokens.segments is not None:  # tokens that are sets of patches
        assert tokens.segments.shape == (B, N) and tokens.segments.dtype == torch.int64
        assert (tokens.segments < tokens.lengths[:, None]).all()
        if not hasattr(tower, "forward_segmentation"):  # of soft maps: a token may be no patch's largest
            assert torch.equal(tokens.segments.amax(1) + 1, tokens.lengths)
        assert tokens.unpool().shape == (B, N, tower.num_features)
    prefix = tower.num_prefix_tokens
    assert (tokens.prefix is None) if prefix == 0 else tokens.prefix.shape == (B, prefix, tower.num_features)
    assert torch.isfinite(tokens.values).all()


@pytest.mark.parametrize("name, pattern", PRESETS, ids=[name for name, _ in PRESETS])
def test_every_preset_trains_and_evaluates(name, pattern, one_thread):
    torch.manual_seed(0)
    tower = timm.create_model(name, num_classes=5, **FAMILIES[pattern])
    assert not lacks_of_tower(tower)
    config = tower.pretrained_cfg
    assert config["architecture"] == name and config["input_size"][1:] == tower.patch_embed.img_size
    x, N = pictures(1, tower.patch_embed.img_size), tower.patch_embed.num_patches
    tokens = tower.train().forward_features(x)
    check_tokens(tokens, tower, 1, N)
    (tower.forward_head(tokens).square().mean() + tokens.rate_loss.mean()).backward()
    unused = [name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused or getattr(tower, "is_dense", False), unused
    assert all(torch.isfinite(p.grad).all() for p in tower.parameters() if p.grad is not None)
    with torch.no_grad():
        tokens = tower.eval().forward_features(x)
    check_tokens(tokens, tower, 1, N)
    assert tower.forward_head(tokens).shape == (1, 5) and (tokens.rate_loss == 0).all()


@every_kind
def test_saved_and_loaded_it_answers_the_same(kind, tmp_path):
    tower = make(kind).eval()
    with torch.no_grad():  # buffers too must come from the file
        for value in [*tower.parameters(), *(b for b in tower.buffers() if b.is_floating_point())]:
            value.copy_(torch.randn_like(value) * 0.1)
    save_tower(tower, tmp_path, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for again in (
        load_tower(str(tmp_path), num_classes=7),
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7),
    ):
        assert type(again) is type(tower)
        torch.testing.assert_close(again.eval()(pictures(3)), tower(pictures(3)))


@every_kind
def test_half_precision(kind):
    tower, x = make(kind).eval(), pictures(4)
    tokens = tower.bfloat16().forward_features(x.bfloat16())
    check_tokens(tokens, tower, 4, patches(tower))
    assert tokens.values.dtype == torch.bfloat16 and torch.isfinite(tower.forward_head(tokens)).all()
    tower = make(kind).train()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = tower.forward_features(x)
        loss = tower.forward_head(tokens).float().square().mean() + tokens.rate_loss.mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in tower.parameters() if p.grad is not None)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        halved = tower.eval()(x).float()
    assert (halved - tower(x)).abs().max() < 0.1 * tower(x).abs().max() + 0.02


# Of each family what does most: compiling takes its time.
COMPILED = ["drip, two depths, class token", "drip, entropy", "tokenlearner, fuser", "plain", "dynamicvit", "senatra"]
SHORT = pytest.param("drip", {"depth": 2, "pool_after": 1}, id="drip, two blocks", marks=pytest.mark.slow)


@pytest.mark.parametrize("kind, more", [SHORT, *(pytest.param(kind, {}, marks=pytest.mark.slow) for kind in COMPILED)])
def test_compiled_it_answers_the_same(kind, more):
    """Lengths are read back on the host, so there are graph breaks; there must be no error, whatever batch and counts come
    next. What dynamo makes of the code is run as it is: compiling it further is torch's own."""
    torch._dynamo.reset()
    tower = make(kind, **more).eval()
    compiled = torch.compile(copy.deepcopy(tower), backend="eager")
    with torch.no_grad():
        for n in (4, 3):
            torch.testing.assert_close(compiled(pictures(n)), tower(pictures(n)), atol=1e-5, rtol=1e-4)
    gradients = []
    for backend in (None, "eager"):
        model = make(kind, **more).train()
        torch.manual_seed(2)
        run = model if backend is None else torch.compile(model, backend=backend)
        run(pictures(4)).square().mean().backward()
        gradients.append(model.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_compiled_it_takes_batches_of_any_lengths():
    """Compiled frames look at no image's length: there is no end of compiling anew."""
    torch._dynamo.reset()
    tower = make("drip", depth=2, pool_after=1, class_token=True, global_pool="token").eval()
    nn.init.normal_(tower.boundary_predictor.fc1.weight, std=0.02)  # pictures of different counts
    nn.init.normal_(tower.boundary_predictor.fc2.weight, std=2.0)
    compiled, seen = torch.compile(copy.deepcopy(tower), backend="eager"), set()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(20):
            x = torch.randn(4, 3, 64, 64, generator=generator)
            tokens = tower.forward_features(x)
            torch.testing.assert_close(compiled(x), tower.forward_head(tokens), atol=1e-5, rtol=1e-4)
            seen.add(tuple(tokens.lengths.tolist()))
    assert len(seen) > 8, "more than one recompilation for each would be allowed"


@pytest.mark.slow
def test_compiled_by_inductor_it_answers_the_same():
    torch._dynamo.reset()
    tower = make("drip", depth=1, pool_after=0).eval()  # half a minute of compiling, for deeper ones more
    with torch.no_grad():
        got = torch.compile(copy.deepcopy(tower))(pictures(2))
        torch.testing.assert_close(got, tower(pictures(2)), atol=1e-4, rtol=1e-4)


@every_kind
def test_gradient_checkpointing_changes_no_gradient(kind):
    gradients = []
    for checkpointing in (False, True):
        tower = make(kind).train()
        tower.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        tokens = tower.forward_features(pictures(3))
        (tower.forward_head(tokens).square().mean() + tokens.rate_loss.mean()).backward()
        gradients.append({name: p.grad for name, p in tower.named_parameters()})
    torch.testing.assert_close(*gradients)


@every_kind
def test_the_classifier_can_be_replaced(kind):
    tower = make(kind).eval()
    before = tower.forward_head(tower.forward_features(pictures(2)), pre_logits=True)
    tower.reset_classifier(3)
    assert tower(pictures(2)).shape == (2, 3) and tower.num_classes == 3
    tower.reset_classifier(0)
    torch.testing.assert_close(tower(pictures(2)), before)
    assert tower.get_classifier() is tower.head


@every_kind
def test_inner_features(kind):
    tower = make(kind).eval()
    whole = tower.forward_features(pictures(2))
    pooled = 0 if getattr(tower, "is_dense", False) else getattr(tower, "pool_depths", (0,))[-1]
    for layer in (-1, -2):
        if pooled > 3 + layer + 1:
            with pytest.raises(ValueError, match="before"):
                tower.forward_features(pictures(2), layer=layer)
            continue
        inner = tower.forward_features(pictures(2), layer=layer)
        check_tokens(inner, tower, 2, patches(tower))
        assert torch.equal(inner.lengths, whole.lengths)
        assert whole.segments is None or torch.equal(inner.segments, whole.segments)
    with pytest.raises(ValueError, match="layer"):
        tower.forward_features(pictures(2), layer=-9)


@pytest.mark.parametrize("kind", ["drip", "plain", "dynamicvit", "tokenlearner"])
def test_timms_feature_maps_are_refused(kind):
    tower = make(kind)
    for ask in (
        lambda: make(kind, features_only=True),
        lambda: tower.prune_intermediate_layers([1]),
        lambda: tower.forward_intermediates(pictures(1)),
    ):
        with pytest.raises(ValueError, match=r"TokenBatch has no \[B, C, H, W\] form; use forward_features"):
            ask()


@every_kind
@pytest.mark.parametrize("size", [32, 96, (48, 80)])
def test_other_picture_sizes_by_interpolated_positions(kind, size):
    height, width = (size, size) if isinstance(size, int) else size
    free = make(kind, dynamic_img_size=True).eval()
    N = patches(free, height, width)
    tokens = free.forward_features(pictures(2, size))
    check_tokens(tokens, free, 2, N)
    torch.testing.assert_close(free(pictures(2)), make(kind).eval()(pictures(2)), msg="its own size is as before")
    fixed = make(kind).eval()
    fixed.set_input_size((height, width))
    check_tokens(fixed.forward_features(pictures(2, size)), fixed, 2, N)
    with pytest.raises(AssertionError, match="doesn't match model"):
        fixed.forward_features(pictures(2))


@every_kind
def test_it_can_be_copied_and_its_shapes_do_not_leak(kind):
    tower = make(kind)
    twin = copy.deepcopy(tower).eval()
    torch.testing.assert_close(twin(pictures(2)), tower.eval()(pictures(2)))
    with torch.inference_mode():
        tower(pictures(2))
    tower.train()(pictures(2)).sum().backward()  # nothing made in inference mode was kept
