"""What an epoch cost: tokens of an image, seconds of a step, peak memory."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


class TokenHistogram:
    """How many images got how many tokens. Stays on the device: nothing waits for a GPU until `summary`."""

    def __init__(self, patches: int, device: torch.device | str):
        """patches: of one image, the most tokens it can get."""
        self.patches = patches
        self.counts = torch.zeros(patches + 1, dtype=torch.int64, device=device)

    def add(self, num_tokens: Tensor) -> None:
        """num_tokens: [B] int64, tokens of each image."""
        # Not bincount, which waits for a GPU to learn its length.
        self.counts.index_add_(0, num_tokens, torch.ones_like(num_tokens))

    def summary(self, over_ranks: bool = True) -> dict[str, float] | None:
        """Over all ranks (a collective) or of this one; None before any image. Compression is patches per token.

        {"tokens": mean, "compression": patches / mean tokens, "compression_p5", "compression_p95": percentiles over images, each
        the compression of an image (NumPy's "inverted_cdf")}
        """
        counts = self.counts.clone()
        if over_ranks and dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        images = int(counts.sum())
        if images == 0:
            return None
        mean = float((counts * torch.arange(len(counts), device=counts.device)).sum()) / images
        # The images with most tokens have the lowest compression: percentiles are counted from there.
        upto = counts.flip(0).cumsum(0).cpu()
        places = torch.tensor([-(-images * percent // 100) for percent in (5, 95)])
        most, fewest = (self.patches - torch.searchsorted(upto, places)).tolist()
        return {
            "tokens": mean,
            "compression": self.patches / mean,
            "compression_p5": self.patches / max(1, most),
            "compression_p95": self.patches / max(1, fewest),
        }


class StepClock:
    """Wall-clock seconds of each step, from the end of the one before (waiting for data counts), and its peak memory
    (peak_memory_gib).

    It begins a new peak when it is made, and with each step: meanwhile ask `cost` for the highest, not peak_memory_gib.
    """

    def __init__(self):
        self.seconds: list[float] = []
        self.memory: list[float] = []  # GiB
        self.highest = 0.0
        self.last = time.perf_counter()
        reset_peak_memory()

    def restart(self) -> None:
        """The next step begins now (after an evaluation, a checkpoint)."""
        self._end_peak()
        self.last = time.perf_counter()

    def tick(self) -> None:
        """A step ends."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.memory.append(self._end_peak())
        self.last = now

    def _end_peak(self) -> float:
        peak = peak_memory_gib()
        self.highest = max(self.highest, peak)
        reset_peak_memory()
        return peak

    def median(self) -> float:
        """Median step of those so far; NaN before any."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    def cost(self, device: torch.device | str) -> dict[str, float]:
        """What the steps so far cost (a collective); NaN before any. Memory in GiB, the highest of all ranks.

        {"step_seconds": median, "mean_step_seconds", "peak_memory_gib": since the clock was made, what came between steps
        included, "mean_peak_memory_gib": mean over steps of each one's peak}
        """
        mean_seconds, mean_memory = (
            statistics.fmean(values) if values else float("nan") for values in (self.seconds, self.memory)
        )
        memory = torch.tensor([max(self.highest, peak_memory_gib()), mean_memory], device=device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(memory, dist.ReduceOp.MAX)
        highest, mean_memory = memory.tolist()
        return {
            "step_seconds": self.median(),
            "mean_step_seconds": mean_seconds,
            "peak_memory_gib": highest,
            "mean_peak_memory_gib": mean_memory,
        }


def reset_peak_memory() -> None:
    """Begin a new peak: of CUDA's allocator, or of this process's resident memory where the system allows that."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not Linux, or a locked-down container: the peak is then that of the whole run
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib() -> float:
    """Peak since reset_peak_memory: torch.cuda.max_memory_allocated where this process uses a GPU, else its resident memory
    (data workers not counted)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def describe(record: dict) -> str:
    """The part of an epoch's line that every trainer writes, from its record."""
    parts = []
    if record.get("compression") is not None:
        low, high = record["compression_p5"], record["compression_p95"]
        parts.append(f"compression {record['compression']:.2f} ({low:.2f} .. {high:.2f})")
    step, peak = f"step {record['step_seconds']:.3f} s", f"peak memory {record['peak_memory_gib']:.2f} GiB"
    if "mean_step_seconds" in record:
        step += f" (mean {record['mean_step_seconds']:.3f})"
        peak += f" (mean of steps {record['mean_peak_memory_gib']:.2f})"
    parts += [step, peak]
    return ", ".join(parts)
