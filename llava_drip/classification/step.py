"""One optimizer step of classification, and the running sums of an epoch."""

from __future__ import annotations

from argparse import Namespace

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn


class Objective(nn.Module):
    """Cross-entropy with timm's mixup, CutMix and label smoothing, plus the boundary-rate loss."""

    def __init__(self, args: Namespace, num_classes: int):
        super().__init__()
        self.num_classes, self.rate_loss_weight = num_classes, args.rate_loss_weight
        self.mixup = None
        if args.mixup or args.cutmix:
            self.mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)
            self.cross_entropy = SoftTargetCrossEntropy()
        elif args.smoothing:
            self.cross_entropy = LabelSmoothingCrossEntropy(args.smoothing)
        else:
            self.cross_entropy = nn.CrossEntropyLoss()

    def mix(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed pictures and soft labels [B, classes], or both as they are. Mixes within the pictures of a rank."""
        return (pixels, labels) if self.mixup is None else self.mixup(pixels, labels)

    def forward(self, logits: Tensor, targets: Tensor, rate_loss: Tensor | None) -> dict[str, Tensor]:
        """{"loss", "task_loss", and "rate_loss" (unweighted) for towers that have one}: means over the batch, fp32."""
        task = self.cross_entropy(logits.float(), targets)
        if rate_loss is None:
            return {"loss": task, "task_loss": task}
        rate = rate_loss.mean()
        return {"loss": task + self.rate_loss_weight * rate, "task_loss": task, "rate_loss": rate}


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    batches: list[tuple[Tensor, Tensor]],
    clip_grad: float | None,
) -> dict[str, Tensor]:
    """One update from the gradients of all `batches` (as many as accumulate). Returns the means of this rank's losses."""
    total: dict[str, Tensor] = {}
    for pixels, labels in batches:
        pixels, labels = (value.to(accelerator.device, non_blocking=True) for value in (pixels, labels))
        pixels, targets = objective.mix(pixels, labels)
        with accelerator.accumulate(model):
            with accelerator.autocast():
                logits, rate_loss, lengths = model(pixels)
            losses = objective(logits, targets, rate_loss)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients and clip_grad is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        if lengths is not None:
            losses["train_tokens"] = lengths.float().mean()
        for name, value in losses.items():
            total[name] = total.get(name, 0) + value.detach().float() / len(batches)
    return total


class Sums:
    """Running sums of an epoch's losses; on the device until they are asked for."""

    def __init__(self, steps: int = 0, sums: dict[str, float] | None = None):
        self.steps, self.sums = steps, dict(sums or {})

    def add(self, losses: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()

    def state(self, accelerator: Accelerator) -> dict:
        """As JSON would hold it, the mean over ranks (a collective): each goes on from it."""
        return {
            "steps": self.steps,
            "sums": {name: mean * self.steps for name, mean in self.means(accelerator).items()},
        }

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Over the steps of the epoch and all ranks (a collective)."""
        names = sorted(self.sums)
        values = torch.tensor(
            [float(self.sums[name]) for name in names], dtype=torch.float64, device=accelerator.device
        )
        return dict(zip(names, accelerator.reduce(values / max(1, self.steps), "mean").tolist()))
