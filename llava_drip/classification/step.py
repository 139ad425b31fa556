"""One optimizer step of classification, and the running sums of an epoch."""

from __future__ import annotations

from argparse import Namespace

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from llava_drip.training.meters import TokenHistogram


class Objective(nn.Module):
    """Cross-entropy with timm's mixup, CutMix and label smoothing, plus the boundaries' own loss.

    rate_loss_weight is that of all that a Drip asks for its boundaries (TokenBatch.rate_loss): the rate loss plus the tower's
    detail_weight times the detail loss; of the entropy rule its head's cross-entropy.
    """

    def __init__(self, args: Namespace, num_classes: int):
        super().__init__()
        self.rate_loss_weight = args.rate_loss_weight
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
    tokens: TokenHistogram | None = None,
) -> dict[str, Tensor]:
    """One update from the gradients of all `batches` (as many as accumulate).

    Args:
        model: a model.Classifier as accelerate has wrapped it.
        clip_grad: norm over all gradients of the step, None for no limit.
        tokens: counts the tokens of each picture.
    Returns:
        The means of this rank's losses, on the device: nothing waits for a GPU.
    """
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
            if tokens is not None:
                tokens.add(lengths)
        for name, value in losses.items():
            total[name] = total.get(name, 0) + value.detach().float() / len(batches)
    return total


class Sums:
    """What an epoch has summed up: losses, and the tokens of its pictures. On the device until it is asked for."""

    def __init__(self, tokens: TokenHistogram | None = None):
        """tokens: where train_step counts them, for towers."""
        self.steps, self.sums, self.tokens = 0, {}, tokens

    def add(self, losses: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Over the steps of the epoch and all ranks (a collective)."""
        names = sorted(self.sums)
        values = torch.tensor(
            [float(self.sums[name]) for name in names], dtype=torch.float64, device=accelerator.device
        )
        return dict(zip(names, accelerator.reduce(values / max(1, self.steps), "mean").tolist()))

    def state(self, accelerator: Accelerator) -> dict:
        """As JSON would hold it, over all ranks (a collective)."""
        counts = None if self.tokens is None else accelerator.reduce(self.tokens.counts.clone(), "sum").tolist()
        sums = {name: mean * self.steps for name, mean in self.means(accelerator).items()}
        return {"steps": self.steps, "sums": sums, "tokens": counts}

    def resume(self, state: dict, main: bool) -> None:
        """Go on from `state`: sums are the mean over ranks, from which each goes on; what is counted, only one (`main`) keeps."""
        self.steps, self.sums = state["steps"], dict(state["sums"])
        if self.tokens is not None and main:
            self.tokens.counts.copy_(torch.tensor(state["tokens"]))
