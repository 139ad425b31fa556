"""What a small tower is asked about scenes of the world, to measure whether its boundaries serve it.

patches     what each patch shows: background or an object of which colour; read from the token that the patch went into
            (TokenBatch.unpool). A token that reaches over an object's edge is wrong about some of its patches, so the task needs
            good boundaries.
quadrants   which colours and shapes lie in which quadrant; read from the mean over tokens, as classifiers and CLIP read a tower.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_drip.tokens import TokenBatch
from llava_drip.towers.vit import PackedVisionTransformer
from llava_drip.world.labelled import PATCH_CLASSES, QUADRANT_LABELS, LabelledScenes
from llava_drip.world.scenes import COLOURS, QUADRANTS


class SceneTask(nn.Module, ABC):
    """A linear layer on a tower without classifier. `metric` names what `score` gives, in 0 .. 1."""

    metric: str

    @abstractmethod
    def loss(self, tower: PackedVisionTransformer, tokens: TokenBatch, scenes: LabelledScenes, rows: Tensor) -> Tensor:
        """Scalar. tokens: of scenes number `rows` [B] int64."""

    @abstractmethod
    def score(self, tower: PackedVisionTransformer, tokens: TokenBatch, scenes: LabelledScenes, rows: Tensor) -> float:
        """The metric over these scenes."""


class PatchTask(SceneTask):
    metric = "mean IoU"

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, len(PATCH_CLASSES))

    def loss(self, tower: PackedVisionTransformer, tokens: TokenBatch, scenes: LabelledScenes, rows: Tensor) -> Tensor:
        logits = self.head(self.norm(tokens.unpool()))  # [B, N, classes]
        return F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(scenes.patch_class)[rows].flatten())

    def score(self, tower: PackedVisionTransformer, tokens: TokenBatch, scenes: LabelledScenes, rows: Tensor) -> float:
        """Intersection over union, mean over classes that there are."""
        said = self.head(self.norm(tokens.unpool())).argmax(-1)
        true = torch.from_numpy(scenes.patch_class)[rows]
        classes = true.unique().tolist()
        shares = [((said == c) & (true == c)).sum() / ((said == c) | (true == c)).sum() for c in classes]
        return torch.stack(shares).mean().item()


class QuadrantTask(SceneTask):
    metric = "colour and shape right"

    def __init__(self, dim: int):
        super().__init__()
        self.head = nn.Linear(dim, len(QUADRANTS) * len(QUADRANT_LABELS))

    def _logits(self, tower: PackedVisionTransformer, tokens: TokenBatch) -> Tensor:
        return self.head(tower.forward_head(tokens)).unflatten(-1, (len(QUADRANTS), len(QUADRANT_LABELS)))

    def loss(self, tower: PackedVisionTransformer, tokens: TokenBatch, scenes: LabelledScenes, rows: Tensor) -> Tensor:
        labels = torch.from_numpy(scenes.in_quadrant)[rows]
        return F.binary_cross_entropy_with_logits(self._logits(tower, tokens), labels)

    def score(self, tower: PackedVisionTransformer, tokens: TokenBatch, scenes: LabelledScenes, rows: Tensor) -> float:
        """Share of objects whose colour and shape both get the highest logit of their quadrant (by chance 1 / 18)."""
        logits, labels = self._logits(tower, tokens), torch.from_numpy(scenes.in_quadrant)[rows]
        right = [
            (logits[..., part].argmax(-1) == labels[..., part].argmax(-1))
            for part in (slice(len(COLOURS)), slice(len(COLOURS), None))
        ]
        return (right[0] & right[1])[labels.sum(-1) > 0].float().mean().item()


TASKS: dict[str, type[SceneTask]] = {"patches": PatchTask, "quadrants": QuadrantTask}
