"""Point 2 of what must hold for DRIP: boundaries trained by a task fall on real edges far more often than chance.

Two tests. In the first only the task can teach the predictor which differences are edges: the features it sees are frozen and
most differences in them mean nothing. It compares with a run whose gradient from the task is cut, and with no training.
In the second, on pictures of the demo's world with nothing frozen, boundaries begin on edges (the predictor starts with weights
that favour differences), and what is tested is that training leaves them there. Runs with another start, or five times the
learning rate for the predictor, lost them: docs/results/boundaries.md.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from llava_drip.world.edges import BoundaryScores, score_boundaries, true_boundaries
from llava_drip.world.scenes import COLOURS, QUADRANTS, SHAPES, render, scene_at

GRID = (8, 8)
HUES, HUES_IN_A_PICTURE = 8, 3
LONGEST_RUN = 7  # so runs of four patches on average: a tower at 4x can have one token for each


def ribbons(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Runs of patches of one hue, in scan order, each patch also light or dark by a coin.

    Brightness changes at half of all places and says nothing about the labels. Two hues in one token look like a third.

    Returns: pixels [count, 3, 64, 64], the hues there are [count, HUES] 0/1, where they change [count, 63].
    """
    rng = np.random.default_rng(seed)
    hue, labels = np.zeros((count, 64), dtype=int), np.zeros((count, HUES), dtype=np.float32)
    for picture, label in zip(hue, labels):
        palette, start, last = rng.choice(HUES, HUES_IN_A_PICTURE, replace=False), 0, -1
        while start < len(picture):
            last, run = rng.choice(palette[palette != last]), rng.integers(1, LONGEST_RUN + 1)
            picture[start : start + run] = last
            start += run
        label[picture] = 1
    angle, light = 2 * np.pi * hue / HUES, rng.choice([-1.0, 1.0], hue.shape)
    patches = np.stack([np.cos(angle), np.sin(angle), light], 1).reshape(count, 3, *GRID)
    pixels = patches.repeat(8, 2).repeat(8, 3) + 0.1 * rng.standard_normal((count, 3, 64, 64))
    return torch.from_numpy(pixels).float(), torch.from_numpy(labels), hue[:, 1:] != hue[:, :-1]


def ribbon_tower(seed: int, start: str) -> nn.Module:
    """Pools before its first block; frozen up to there, so that features cannot learn to hide brightness instead."""
    torch.manual_seed(seed)
    shape = {"depth": 2, "pool_after": 0, "num_classes": HUES, "position_scale": 0.2}
    drip = timm.create_model("drip_mini_patch8_64_4x", **shape)
    drip.patch_embed.requires_grad_(False)
    drip.pos_embed.requires_grad_(False)
    if start == "neutral":  # weights of either sign: no difference is preferred
        for layer in (drip.boundary_predictor.fc1, drip.boundary_predictor.fc2):
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.constant_(drip.boundary_predictor.fc2.bias, math.log(1 / 3))
    return drip


def ribbon_scores(drip: nn.Module, seed: int) -> BoundaryScores:
    """On ribbons not trained on, at 16 tokens each."""
    x, _, edges = ribbons(seed + 1000, 256)
    drip.eval().set_compression(4.0)
    with torch.no_grad():
        segments = drip.forward_features(x).segments
    drip.train().set_compression(None)
    return score_boundaries((segments[:, 1:] != segments[:, :-1]).numpy(), edges)


@pytest.mark.parametrize("seed, start", [(0, "default"), (1, "neutral")])
def test_the_tasks_gradient_finds_edges(seed, start):
    x, y, _ = ribbons(seed, 1024)
    untrained, scores = ribbon_scores(ribbon_tower(seed, start), seed), {}
    for gradient in ("whole", "cut"):
        drip = ribbon_tower(seed, start)
        if gradient == "cut":  # the task sees the same samples, but the predictor hears of the rate loss only
            sample = drip.boundary_predictor.sample
            drip.boundary_predictor.sample = lambda logits, sample=sample: [part.detach() for part in sample(logits)]
        train(drip, x, y, steps=100, batch=32, learning_rate=5e-3)
        scores[gradient] = ribbon_scores(drip, seed)
    f1 = {"untrained": untrained.f1, **{name: score.f1 for name, score in scores.items()}}
    print(f"seed {seed}, {start} start: F1", {name: round(value, 3) for name, value in f1.items()}, untrained.chance_f1)
    assert f1["whole"] > max(f1["untrained"], f1["cut"]) + 0.15
    assert f1["whole"] > 2 * scores["whole"].chance_f1


def train(drip: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, batch: int, learning_rate: float) -> None:
    """Say which labels hold, beside the rate loss."""
    parameters = [parameter for parameter in drip.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (batch,))
        tokens = drip.forward_features(x[rows])
        loss = F.binary_cross_entropy_with_logits(drip.forward_head(tokens), y[rows]) + tokens.rate_loss.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def pictures_and_labels(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Pixels [count, 3, 64, 64], what is where [count, labels] 0/1, and where objects begin and end [count, 63]."""
    images, labels, edges = [], [], []
    for i in range(count):
        scene = scene_at(seed, "train", i)
        pixels, mask = render(scene)
        label = np.zeros((len(QUADRANTS), len(COLOURS) + len(SHAPES)), dtype=np.float32)
        for thing in scene.objects:
            place = QUADRANTS.index(thing.quadrant)
            label[place, list(COLOURS).index(thing.colour)] = label[place, len(COLOURS) + SHAPES.index(thing.shape)] = 1
        images.append(pixels)
        labels.append(label.ravel())
        edges.append(true_boundaries(mask, GRID))
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x, torch.from_numpy(np.stack(labels)), np.stack(edges)


def boundaries_of(drip, x: torch.Tensor, edges: np.ndarray) -> BoundaryScores:
    """How the boundaries of eval agree with the edges, at about as many tokens as asked for."""
    drip.eval()
    with torch.no_grad():
        tokens = drip.forward_features(x)
    drip.train()
    assert tokens.lengths.float().mean().item() == pytest.approx(16, rel=0.15)
    return score_boundaries((tokens.segments[:, 1:] != tokens.segments[:, :-1]).numpy(), edges)


@pytest.mark.parametrize("seed", [0, 1])
def test_training_on_pictures_leaves_boundaries_on_edges(seed):
    x, y, edges = pictures_and_labels(seed, 1024)
    torch.manual_seed(seed)
    shape = {"embed_dim": 96, "depth": 4, "num_heads": 3, "pool_after": 1, "num_classes": y.shape[1]}
    drip = timm.create_model("drip_mini_patch8_64_4x", **shape)
    before = boundaries_of(drip, x[-256:], edges[-256:])
    train(drip, x[:-256], y[:-256], steps=240, batch=64, learning_rate=2e-3)
    scores = boundaries_of(drip, x[-256:], edges[-256:])  # pictures not trained on
    print(f"seed {seed}: F1 {before.f1:.3f} untrained, {scores.f1:.3f} trained, chance {scores.chance_f1:.3f}")
    assert scores.f1 > 1.5 * scores.chance_f1
