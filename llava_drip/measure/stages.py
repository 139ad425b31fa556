"""Wall-clock seconds and peak memory of the stages of a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch


@dataclass
class Stage:
    """seconds: wall clock. host_gib: most resident memory of this process and its children. device_gib: most CUDA memory."""

    name: str
    seconds: float
    host_gib: float
    device_gib: float | None


@dataclass
class StageLog:
    """Collects stages; memory is sampled ten times a second in a thread, CUDA's peak too, which the trainers begin anew with
    each step."""

    stages: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the body as one stage, also when it fails."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        peak, device, done = [_resident_bytes()], [0], threading.Event()

        def look() -> None:
            peak[0] = max(peak[0], _resident_bytes())
            if torch.cuda.is_available():
                device[0] = max(device[0], torch.cuda.max_memory_allocated())

        def watch() -> None:
            while not done.wait(0.1):
                look()

        thread = threading.Thread(target=watch, daemon=True)
        start = time.perf_counter()
        thread.start()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            done.set()
            thread.join()
            look()
            on_device = device[0] / 2**30 if torch.cuda.is_available() else None
            self.stages.append(Stage(name, seconds, peak[0] / 2**30, on_device))

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def host_gib(self) -> float:
        return max((stage.host_gib for stage in self.stages), default=0.0)


def _resident_bytes() -> int:
    """Resident memory of this process and its children; shared pages count for each that maps them."""
    total, me = 0, psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
