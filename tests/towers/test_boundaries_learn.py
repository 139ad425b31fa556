"""Point 2 of what must hold for DRIP: boundaries trained by a task fall on real edges far more often than chance.

They begin so (the predictor starts with weights that favour differences); what is tested is that training leaves them there.
Runs with another start, or five times this learning rate for the predictor, lost them: docs/results/boundaries.md.
"""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from llava_drip.world.edges import BoundaryScores, score_boundaries, true_boundaries
from llava_drip.world.scenes import COLOURS, QUADRANTS, SHAPES, render, scene_at

GRID, STEPS, BATCH, LEARNING_RATE = (8, 8), 240, 64, 2e-3


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
def test_boundaries_trained_by_a_task_find_edges(seed):
    x, y, edges = pictures_and_labels(seed, 1024)
    torch.manual_seed(seed)
    shape = {"embed_dim": 96, "depth": 4, "num_heads": 3, "pool_after": 1, "num_classes": y.shape[1]}
    drip = timm.create_model("drip_mini_patch8_64_4x", **shape)
    before = boundaries_of(drip, x[-256:], edges[-256:])
    optimizer = torch.optim.AdamW(drip.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        rows = torch.randint(0, len(x) - 256, (BATCH,))
        tokens = drip.forward_features(x[rows])
        loss = F.binary_cross_entropy_with_logits(drip.forward_head(tokens), y[rows]) + tokens.rate_loss.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    scores = boundaries_of(drip, x[-256:], edges[-256:])  # pictures not trained on
    print(f"seed {seed}: F1 {before.f1:.3f} untrained, {scores.f1:.3f} trained, chance {scores.chance_f1:.3f}")
    assert scores.f1 > 1.5 * scores.chance_f1
