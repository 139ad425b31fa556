"""Where the time of a training step goes. Hooks mark when the projector begins and ends, in both directions; the tower is what
comes before, the language model what lies between, the optimizer what comes after."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from llava_drip.measure.speed import synchronize

PARTS = ("tower", "projector", "language model", "optimizer")
# What a step is made of, in the order of its marks. Of the embedding and its gradient the language model gets the time.
_SPANS = ("tower", "projector", "language model", "projector", "optimizer")


class StepClock:
    """Seconds of a step and of its parts. On a GPU the marks are events in its queue, for which nothing waits."""

    def __init__(self, projector: nn.Module, device: torch.device):
        self.device, self.on_cuda = device, device.type == "cuda"
        self.marks: list[float | torch.cuda.Event] = []
        self.start = 0.0
        projector.register_forward_pre_hook(lambda *_: self.mark())
        projector.register_forward_hook(self._after_projector)

    def begin(self) -> None:
        synchronize(self.device)
        self.marks.clear()
        self.start = time.perf_counter()
        self.mark()

    def mark(self) -> None:
        if not self.on_cuda:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def _after_projector(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.mark()
        if output.requires_grad:
            output.register_hook(lambda _: self.mark())

    def end(self) -> tuple[float, dict[str, float]]:
        """Seconds of the step; of each part, 0 for all where the step did not come to its end."""
        self.mark()
        synchronize(self.device)
        seconds, parts = time.perf_counter() - self.start, dict.fromkeys(PARTS, 0.0)
        assert len(self.marks) == len(_SPANS) + 1, f"{len(self.marks)} marks in a step"
        for name, begin, end in zip(_SPANS, self.marks[:-1], self.marks[1:], strict=True):
            parts[name] += begin.elapsed_time(end) / 1000 if self.on_cuda else end - begin
        return seconds, parts
