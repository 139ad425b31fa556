"""How many tokens an image got: the mean over a window of training steps, and over an epoch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class TokenCount:
    """Running count of images and their tokens. Stays on the device: nothing waits for the GPU until `mean`."""

    def __init__(self, device: torch.device | str):
        self.totals = torch.zeros(2, dtype=torch.int64, device=device)

    def add(self, num_tokens: Tensor) -> None:
        """num_tokens: [B] int64, tokens of each image."""
        self.totals[0] += num_tokens.numel()
        self.totals[1] += num_tokens.sum()

    def mean(self) -> float:
        """Tokens per image over all ranks (NaN before any). A collective: every rank calls it at the same step."""
        totals = self.totals.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        images, tokens = totals.tolist()
        return tokens / images if images else float("nan")


class CompressionMeter:
    """Follows one training epoch through the calls of its loss, and reports at the steps at which the trainer logs.

    Args:
        device: of the token counts.
        accum_freq: loss calls in one optimizer step.
        log_every: the trainer's --log-every-n-steps.
        steps: optimizer steps of the epoch.
        report: called on every rank with (step in the epoch, steps in the window, mean tokens per image of the window).
    """

    def __init__(
        self,
        device: torch.device | str,
        accum_freq: int,
        log_every: int,
        steps: int,
        report: Callable[[int, int, float], None],
    ):
        self.accum_freq, self.log_every, self.steps, self.report = accum_freq, log_every, steps, report
        self.window, self.epoch = TokenCount(device), TokenCount(device)
        self.calls = self.window_start = 0

    def __call__(self, num_tokens: Tensor) -> None:
        """num_tokens: [B] int64 of one loss call."""
        self.window.add(num_tokens)
        self.epoch.add(num_tokens)
        self.calls += 1
        if self.calls % self.accum_freq:
            return
        done = self.calls // self.accum_freq
        if (done - 1) % self.log_every == 0 or done == self.steps:  # the trainer's own condition
            self.report(done - 1, done - self.window_start, self.window.mean())
            self.window, self.window_start = TokenCount(self.window.totals.device), done
