"""SIGTERM and Ctrl-C: a checkpoint at the end of the step, by all ranks, and an exit code that says so."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from transformers import TrainerCallback

from llava_drip.cli import end_progress_bars
from llava_drip.instruct.ranks import largest, rank_and_ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes on what the terminal or the job system sent to its processes already: deepspeed's answers Ctrl-C with
# SIGTERM, torchrun passes on either.
ONE_PRESS = 2.0  # seconds


class Stopped(SystemExit):
    """A run that a signal ended after its checkpoint was written. Exit code 128 + signal: 143 for SIGTERM, 130 for SIGINT."""


class StopSignals(TrainerCallback):
    """Saves and stops where a signal has come, to any rank; within `caught`. A second one ends the process at once."""

    def __init__(self):
        self.received, self.since = 0, 0.0
        self.agreed = 0  # on all ranks

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Takes the signals. The main thread calls it, the only one that Python lets do so."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self.since = number, time.monotonic()
            text = "saving at the end of this step, or the next; another one ends the run at once"
            # Not print: the program may be within one.
            os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())
        elif time.monotonic() - self.since > ONE_PRESS:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)  # a third needs no help of Python's
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def votes(self) -> list[bool]:
        """Which of SIGNALS has come to this rank."""
        return [self.received == number for number in SIGNALS]

    def count(self, votes: list[float]) -> None:
        """votes: their sums over the ranks, in a step that is being made. At its end all ranks save, or none."""
        self.agreed = next((number for number, ranks in zip(SIGNALS, votes, strict=True) if ranks), 0)

    def on_step_end(self, args, state, control, **kwargs):
        if rank_and_ranks()[1] == 1:  # nobody else has to know what came since the votes
            self.agreed = self.received
        if self.agreed:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        """The checkpoint is whole on this rank. Also of one that was due anyway, while the signal came."""
        self.agreed = largest(max(self.agreed, self.received), args.device)  # and no rank leaves before all are here
        if not self.agreed:
            return
        if state.is_world_process_zero:
            end_progress_bars()
            name = f"checkpoint-{state.global_step} is written to {args.output_dir}"
            how = "the same command with --resume_from_checkpoint latest goes on from it"
            if args.save_only_model:
                how = "it holds the model alone (--save_only_model true), so it cannot be resumed from"
            print(f"{signal.Signals(self.agreed).name}: {name}; {how}", flush=True)
        raise Stopped(128 + self.agreed)


def spare_worker() -> None:
    """In a data worker: outlive a signal that went to the whole process group, or from a launcher to every process below it.

    The step that is being made, and the checkpoint after it, must not fail for want of a worker. The first SIGTERM is passed
    over; its parent sends a second to a worker that does not end. A worker whose parent is gone ends by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@atexit.register
def end_workers() -> None:
    """At exit Python sends each worker one SIGTERM, which spare_worker passes over, and waits for it: for ever, where an error
    keeps the loader, which would have sent the second. Workers only read, and may go at once."""
    # torch's handler would take a killed worker for one that crashed, and raise within whatever exit comes to next.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
