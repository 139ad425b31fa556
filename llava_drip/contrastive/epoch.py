"""An epoch's figures, over all ranks: losses, tokens of an image, step time; and the line that tells them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from llava_drip.training.meters import StepClock, TokenHistogram, describe
from llava_drip.training.skips import Skips


def over_ranks(values: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    """The sum (or other reduction) of every rank's tensor; a collective."""
    values = values.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, op)
    return values


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Means of scalars that every rank has under the same names; a collective, and the one place that waits for a GPU."""
    if not values:
        return {}
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    names = sorted(values)
    means = over_ranks(torch.stack([values[name] for name in names])) / ranks
    return dict(zip(names, means.tolist()))


class EpochMeters:
    """Running figures of an epoch, complete up to the last `end_step`. Nothing waits for a GPU before a mean is asked for.

    Losses are float64 sums of the trainer's own values. Each rank's is a mean over its own part of the batch (or, gathered, the
    whole batch's), so that the mean over ranks is the global loss.
    """

    def __init__(self, device: torch.device | str, loss_calls: int = 1, patches: int | None = None):
        """loss_calls: in one optimizer step (--accum-freq). patches: of one image, where the model counts tokens."""
        self.device, self.loss_calls, self.steps = torch.device(device), loss_calls, 0
        self.sums: dict[str, Tensor] = {}
        self.current: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}  # losses of the step that has ended
        self.tokens = self.window = None
        if patches is not None:
            self.tokens, self.window = (TokenHistogram(patches, self.device) for _ in range(2))
        self.window_start, self.clock = 0, StepClock()

    def add_losses(self, losses: dict[str, Tensor]) -> None:
        """The entries of one loss call; their sum counts as "loss"."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        for name, value in (*losses.items(), ("loss", sum(losses.values()))):
            value = value.detach().to(dtype) / self.loss_calls
            self.current[name] = self.current[name] + value if name in self.current else value

    def add_tokens(self, num_tokens: Tensor) -> None:
        """num_tokens: [B] int64, of one loss call."""
        self.tokens.add(num_tokens)
        self.window.add(num_tokens)

    def end_step(self) -> None:
        for name, value in self.current.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.last, self.current = self.current, {}
        self.steps += 1
        self.clock.tick()

    def take_window(self) -> tuple[int, dict[str, float] | None]:
        """(steps, TokenHistogram.summary) since the last call; a collective."""
        steps, self.window_start = self.steps - self.window_start, self.steps
        found = self.window.summary()
        self.window = TokenHistogram(self.window.patches, self.device)
        return steps, found

    def state(self) -> dict:
        """What `resume` takes, of all ranks (a collective), in plain numbers."""
        tokens = None if self.tokens is None else over_ranks(self.tokens.counts).tolist()
        return {"steps": self.steps, "sums": mean_over_ranks(self.sums), "tokens": tokens}

    def resume(self, state: dict) -> None:
        self.steps = self.window_start = state["steps"]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = {
            name: torch.tensor(value, dtype=dtype, device=self.device) for name, value in state["sums"].items()
        }
        first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        if self.tokens is not None and state["tokens"] is not None and first:  # counted once
            self.tokens.counts += torch.tensor(state["tokens"], device=self.device)

    def summary(self, images: int) -> dict:
        """The epoch's row of epochs.jsonl, but for who it is and its learning rate; a collective.

        images: of an optimizer step over all ranks.
        """
        row = {name: total / self.steps for name, total in mean_over_ranks(self.sums).items()}
        row |= self.clock.cost(self.device)
        row["images_per_second"] = images / row["step_seconds"]
        if self.tokens is not None:
            row |= self.tokens.summary() or {}
        return row


def line(row: dict) -> str:
    """An epoch's row for a person: one line."""
    losses = [f"{name.removesuffix('_loss')} {row[name]:.4f}" for name in sorted(row) if name.endswith("_loss")]
    parts = [f"loss {row['loss']:.4f}" + (f" ({', '.join(losses)})" if len(losses) > 1 else "")]
    for name, where in (("zero_shot", ""), ("imagenet", " on --imagenet-val")):
        if f"{name}_top1" in row:
            parts.append(f"zero-shot{where} top-1 {row[f'{name}_top1']:.1%}, top-5 {row[f'{name}_top5']:.1%}")
    if "evaluation_error" in row:
        parts.append(f"evaluation failed ({row['evaluation_error']})")
    for way in ("image_to_text", "text_to_image"):
        if f"{way}_R@1" in row:
            recalls = " / ".join(f"{100 * row[f'{way}_R@{k}']:.1f}" for k in (1, 5, 10))
            parts.append(f"{way.replace('_', '-')} R@1/5/10 {recalls}%")
    parts.append(describe(row))
    if "compression_eval" in row:
        parts.append(f"in eval mode {row['compression_eval']:.2f}")
    skips = Skips(row["skipped"]["counts"], row["skipped"]["examples"])
    parts.append(str(skips) + "".join(f"; {example}" for example in skips.examples))
    return f"Epoch {row['epoch']} (step {row['step']}): {', '.join(parts)}"
