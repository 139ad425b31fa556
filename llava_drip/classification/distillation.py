"""Distillation of a DRIP from the dense tower that it was converted from: what scripts/distill_tower.py trains.

The student is the dense tower with boundaries (towers/convert.py), the teacher the same at compression 1, and what is learned are
the teacher's own features: its pooled embedding, its head's outputs, and its patches, of which each token of the student is to be
the mean over its segment. No label is needed. Blocks before pooling, the patch embedding and the head stay the teacher's.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from llava_drip.classification.distill_arguments import TRAINED
from llava_drip.classification.model import Classifier
from llava_drip.tokens import Packing, TokenBatch
from llava_drip.towers import Drip
from llava_drip.towers.convert import is_projection
from llava_drip.towers.scan import in_raster_order, scan_order
from llava_drip.towers.vit import split_prefix


class Distiller(Classifier):
    """pixels [B, 3, h, w] → (features, rate loss [B] or None, tokens [B] int64).

    features: of student and teacher, {"pooled", "teacher_pooled"} [B, D]; {"output", "teacher_output"} [B, classes], where the
    tower has a head; {"tokens", "teacher_tokens"} [T, D], the student's tokens and the means of the teacher's over their
    segments; and {"sizes"} [T], their patches.

    State dict: model.* (the student), teacher.* (frozen; without the blocks that both share).
    """

    def __init__(
        self,
        tower: Drip,
        trained: str = "late",
        patch_layer: int | None = None,
        labelled: bool = False,
        name: str = "",
    ):
        """
        Args:
            tower: as converted. At compression 1 it is the teacher.
            trained: "late" (blocks after pooling, last norm, boundary predictor), "all" (the blocks before and the embedding
                too), or "boundaries" (the predictor alone). The head is frozen always.
            patch_layer: whose patches are compared: None for what comes out of the last norm (or, with mean pooling, of the last
                block), -1, -2, ... for blocks, as in forward_features; not before pooling.
            labelled: whether pictures to evaluate bear the labels that the head classifies.
        """
        super().__init__(tower, name=name)
        assert trained in TRAINED and not tower.is_dense
        self.frozen = True  # something always is: the teacher
        self.trained, self.labelled, self.patch_layer = trained, labelled, patch_layer
        if patch_layer is not None and tower.blocks_until(patch_layer) <= tower.pool_depths[-1]:
            raise ValueError(f"layer {patch_layer} lies before pooling, which follows block {tower.pool_depths[-1]}")
        self.classifies = tower.num_classes > 0 and not is_projection(tower.head)
        self.teacher = copy.deepcopy(tower).requires_grad_(False)
        self.teacher.set_compression(1.0)
        self.shared = 0 if trained == "all" else tower.pool_depths[0]
        for i in range(self.shared):  # frozen: the student's own are the teacher's
            self.teacher.blocks[i] = nn.Identity()
        tower.requires_grad_(False)
        for module in self._learning():
            module.requires_grad_(True)
        tower.get_classifier().requires_grad_(False)

    def _learning(self) -> list[nn.Module]:
        tower = self.model
        late = [*tower.blocks[tower.pool_depths[0] :], tower.norm, tower.fc_norm, *tower.boundary_predictors]
        return {"late": late, "all": [tower], "boundaries": tower.boundary_predictors}[self.trained]

    @property
    def has_boundary_loss(self) -> bool:
        return self.model.has_boundary_loss

    @property
    def measures(self) -> tuple[str, ...]:
        """similarity: cosine of the student's embedding and the teacher's (a CLIP's projected one, else the pooled features)."""
        return ("top1", "top5", "similarity", "teacher_top1") if self.labelled else ("similarity",)

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        self.teacher.eval()
        if mode:  # what is frozen neither drops paths nor draws
            self.model.eval()
            self.model.training = True
            for module in self._learning():
                module.train()
            self.model.get_classifier().eval()
        return self

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
        student, teacher, layer = self.model, self.teacher, self.patch_layer
        early = student.blocks[self.shared - 1] if self.shared else None
        inner = (None, None) if layer is None else (student.blocks[layer], teacher.blocks[layer])
        with _calls(early) as begun, _calls(inner[0]) as ours, _calls(inner[1]) as theirs:
            tokens = student.forward_features(x)
            with torch.no_grad():
                target = self._teach(x, *begun)
        features = {}
        for prefix, tower, its in (("", student, tokens), ("teacher_", teacher, target)):
            features[f"{prefix}pooled"] = pooled = tower.forward_head(its, pre_logits=True)
            if tower.num_classes:
                features[f"{prefix}output"] = tower.get_classifier()(pooled)
        patches = target.values
        features["tokens"] = tokens.values
        if layer is not None:
            features["tokens"], patches = (
                split_prefix(values, packing, student.num_prefix_tokens)[1] for values, packing, *_ in (ours, theirs)
            )
        scan, grid = student.scan, student.patch_embed.grid_size
        order = None if scan == "raster" else scan_order(scan, *grid).to(patches.device)
        patches = in_raster_order(patches.unflatten(0, (len(tokens), -1)), order)
        features["teacher_tokens"], features["sizes"] = tokens.means_of(patches), tokens.sizes
        rate_loss = tokens.rate_loss if self.training and self.has_boundary_loss else None
        return features, rate_loss, tokens.lengths

    def _teach(
        self, x: Tensor, values: Tensor | None = None, packing: Packing | None = None, *relative: Any
    ) -> TokenBatch:
        """The teacher's tokens, in the order of the scan, from pixels or from what the shared blocks made of them."""
        if values is None:
            return self.teacher.forward_features(x)
        depth = len(self.teacher.blocks)
        values = self.teacher.run_blocks(values.detach(), packing, self.shared, depth, *relative)
        return self.teacher.to_tokens(values, packing, None, None)

    def measure(self, features: dict[str, Tensor], labels: Tensor) -> Tensor:
        """[len(measures)] fp32 sums over a batch."""
        kind = "output" if self.model.num_classes and not self.classifies else "pooled"
        similar = F.cosine_similarity(features[kind].float(), features[f"teacher_{kind}"].float(), dim=-1).sum()
        if not self.labelled:
            return similar[None]
        top1, top5, _ = super().measure(features["output"], labels)
        teacher_top1, *_ = super().measure(features["teacher_output"], labels)
        return torch.stack([top1, top5, similar, teacher_top1])


@contextmanager
def _calls(block: nn.Module | None) -> Iterator[list]:
    """Within it, each call of a block leaves here [its output, its arguments but the first]; nothing where there is no block."""
    found: list[Any] = []

    def keep(block: nn.Module, arguments: tuple, output: Tensor) -> None:
        found[:] = [output, *arguments[1:]]

    hook = None if block is None else block.register_forward_hook(keep)
    try:
        yield found
    finally:
        if hook is not None:
            hook.remove()


class DistillationLoss(nn.Module):
    """Weighted sum of

    embedding   1 - cosine of the pooled features (before the head)
    output      of a classifier's head: KL(teacher || student) at a temperature, times its square (Hinton, Vinyals, Dean, 2015);
                of a CLIP's projection: 1 - cosine
    patches     1 - cosine of each token and the mean of the teacher's patches over its segment, mean over patches
    rate        the boundaries' own: the rate loss plus the student's detail_weight times the detail loss; of the entropy rule its
                head's cross-entropy
    """

    def __init__(self, args: Namespace, distiller: Distiller):
        super().__init__()
        has_output = distiller.model.num_classes > 0
        self.weights = {
            "embedding": args.embedding_loss_weight,
            "output": args.output_loss_weight if has_output else 0.0,
            "patches": args.patch_loss_weight,
            "rate": args.rate_loss_weight,
        }
        if not any(self.weights[name] for name in ("embedding", "output", "patches")):
            without = "" if has_output else ", and a teacher without head has no outputs"
            raise ValueError(
                "--embedding-loss-weight, --output-loss-weight, --patch-loss-weight: one of them must be above 0"
                f"{without}"
            )
        self.classifies, self.temperature = distiller.classifies, args.temperature
        self.mixup = Mixup(args.mixup, args.cutmix, num_classes=1) if args.mixup or args.cutmix else None

    def mix(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed pictures; the teacher sees the same (Beyer et al., CVPR 2022). Labels are not looked at."""
        return pixels if self.mixup is None else self.mixup(pixels, torch.zeros_like(labels))[0], labels

    def forward(self, features: dict[str, Tensor], targets: Tensor, rate_loss: Tensor | None) -> dict[str, Tensor]:
        """{"loss", and each part unweighted: "embedding_loss", ...}: means over the batch, fp32."""
        f = {name: value.float() for name, value in features.items()}
        parts = {"embedding": _apart(f["pooled"], f["teacher_pooled"]).mean()}
        if self.weights["output"] and self.classifies:
            ours, theirs = (f[name].div(self.temperature).log_softmax(1) for name in ("output", "teacher_output"))
            parts["output"] = self.temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        elif self.weights["output"]:
            parts["output"] = _apart(f["output"], f["teacher_output"]).mean()
        parts["patches"] = (_apart(f["tokens"], f["teacher_tokens"]) * f["sizes"]).sum() / f["sizes"].sum()
        if rate_loss is not None:
            parts["rate"] = rate_loss.mean()
        loss = sum(self.weights[name] * part for name, part in parts.items())
        return {"loss": loss, **{f"{name}_loss": part for name, part in parts.items()}}


def _apart(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 - cosine of each pair of rows: 0 .. 2."""
    return 1 - F.cosine_similarity(ours, theirs, dim=-1)
