"""Defects measured in published DRIP and token-pooling code, each shown absent; one test a defect, for every rule that could
have it."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from llava_drip.assistant import load_assistant
from llava_drip.towers.drip import Drip
from llava_drip.towers.rules import RULES

LEARNED = sorted(name for name, rule in RULES.items() if rule.samples)
SHAPE = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 10,
    "pool_after": 1,
}
every_rule = pytest.mark.parametrize("boundary", sorted(RULES))


def tower(**kwargs) -> Drip:
    torch.manual_seed(0)
    drip = timm.create_model("drip_tiny_patch16_224", **{**SHAPE, **kwargs})
    nn.init.normal_(drip.head.weight, std=0.5)
    return drip


def pictures(n: int) -> Tensor:
    """Of different contrast, so that they differ in tokens."""
    noise = torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return noise.cumsum(3) * torch.linspace(0.1, 1, n)[:, None, None, None]


@pytest.mark.parametrize("boundary", LEARNED)
def test_boundaries_are_not_integers_to_the_task(boundary):
    drip = tower(boundary=boundary).train()
    drip(pictures(4)).square().mean().backward()  # without the rate loss
    moved = [name for name, p in drip.boundary_predictor.named_parameters() if p.grad is not None and p.grad.any()]
    assert set(moved) == {name for name, _ in drip.boundary_predictor.named_parameters()}


@every_rule
def test_no_noise_in_eval(boundary):
    drip = tower(boundary=boundary).eval()
    logits = torch.stack([drip(pictures(2)) for _ in range(10)])
    assert logits.std(0).max() == 0


@every_rule
def test_nothing_depends_on_batch_mates(boundary):
    drip, x = tower(boundary=boundary).eval(), pictures(4)
    alone, together = drip.forward_features(x[:1]), drip.forward_features(x)
    assert alone.lengths[0] == together.lengths[0] and torch.equal(alone.segments[0], together.segments[0])
    torch.testing.assert_close(drip(x[:1])[0], drip(x)[0], atol=1e-5, rtol=0)


@every_rule
def test_no_token_behind_the_last_boundary_is_dropped(boundary):
    """Boundaries end 16 patches before the image does; those of the longest image too have to be in some token."""
    drip = tower(boundary=boundary).eval()
    ends = torch.zeros(2, 64, dtype=torch.bool)
    ends[0, :48], ends[1, 10] = True, True
    x = pictures(2)
    tokens = drip.forward_features(x, ends=ends)
    assert tokens.lengths.tolist() == [49, 2] and (tokens.segments[:, 48:] == tokens.lengths[:, None] - 1).all()
    changed = x.clone()
    changed[:, :, 56:] += 1  # the last row of patches
    assert (drip.forward_features(changed, ends=ends).values - tokens.values).abs().max() > 1e-3


@every_rule
def test_no_padding_enters_the_final_mean(boundary):
    drip = tower(boundary=boundary, global_pool="avg").eval()
    drip.set_compression(torch.tensor([2.0, 16.0]))
    tokens = drip.forward_features(pictures(2))
    assert tokens.lengths.tolist() == [32, 4]
    sizes = [row.bincount().float() for row in tokens.segments]
    by_hand = torch.stack([drip.fc_norm(n @ values / 64) for n, values in zip(sizes, tokens.split())])
    torch.testing.assert_close(drip.forward_head(tokens, pre_logits=True), by_hand)


@every_rule
def test_the_place_of_a_segment_is_not_lost(boundary):
    """An even picture, cut into equal segments: nothing but place tells their tokens apart."""
    for own in ({}, {"relative": "rotary"}):
        drip = tower(boundary=boundary, **own).eval()
        ends = torch.zeros(1, 64, dtype=torch.bool)
        ends[0, [15, 31, 47]] = True
        values = drip.forward_features(torch.zeros(1, 3, 64, 64), ends=ends).values
        apart = torch.cdist(values, values) + torch.eye(4)
        assert apart.min() > 1e-3


@every_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_nan_in_half_precision(boundary, dtype):
    """Clamps and logarithms that are 0 in half precision: all certain, all uncertain, no and every boundary."""
    drip = tower(boundary=boundary).to(dtype)
    x = pictures(3).to(dtype)
    for mode in (True, False):
        drip.train(mode)
        for scale in (0.0, 1.0, 1e3):
            tokens = drip.forward_features(x * scale)
            loss = drip.forward_head(tokens).float().square().mean() + tokens.rate_loss.mean()
            assert torch.isfinite(tokens.values).all() and torch.isfinite(loss)
            if mode and scale <= 1:
                loss.backward()
                assert all(torch.isfinite(p.grad).all() for p in drip.parameters() if p.grad is not None)
                drip.zero_grad()


@every_rule
def test_without_a_boundary_pictures_still_differ(boundary):
    drip = tower(boundary=boundary).eval()
    tokens = drip.forward_features(pictures(3), ends=torch.zeros(3, 64, dtype=torch.bool))
    assert tokens.lengths.tolist() == [1, 1, 1]
    logits = drip.forward_head(tokens)
    assert torch.pdist(logits).min() > 1e-2


def test_the_assistants_tower_does_not_train_unasked(tiny_checkpoint):
    """Loaded for answers the tower is in eval; so are the boundaries: the same picture gives the same features each time."""
    model, processor = load_assistant(str(tiny_checkpoint))
    assert not model.vision_tower.training
    first, second = (model.vision_tower.forward_features(pictures(2)) for _ in range(2))
    assert torch.equal(first.values, second.values)


@every_rule
def test_batch_and_tokens_are_not_swapped(boundary):
    """Three pictures of which one changes: the tokens of the others, and only theirs, stay as they were."""
    drip, x = tower(boundary=boundary).eval(), pictures(3)
    drip.set_compression(4.0)
    before = drip.forward_features(x)
    x[1] = torch.randn_like(x[1])
    after = drip.forward_features(x)
    for image, (old, new) in enumerate(zip(before.split(), after.split())):
        assert old.shape == (16, 96)
        assert torch.allclose(old, new, atol=1e-6) == (image != 1)
    padded, mask = after.to_padded()
    assert padded.shape == (3, 16, 96) and mask.shape == (3, 16)


@pytest.mark.parametrize("boundary", LEARNED)
def test_evals_rate_is_trainings_though_no_probability_reaches_one_half(boundary):
    """A threshold of 1/2 would keep one token of 64."""
    drip = tower(boundary=boundary)
    level = drip.boundary_predictor.fc2.bias if boundary == "gumbel" else drip.boundary_predictor.bias
    with torch.no_grad():
        level.fill_(-1.0 if boundary == "gumbel" else -4.5)
        x = pictures(64)
        evaluated, drawn = (drip.train(mode).forward_features(x) for mode in (False, True))
    inner = evaluated.boundary_probs[:, :-1]
    assert inner.quantile(0.9) < 0.5 and inner.mean() > 0.03
    assert evaluated.lengths.float().mean().item() == pytest.approx(drawn.lengths.float().mean().item(), rel=0.1)
