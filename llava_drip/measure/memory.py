"""Peak memory of a tower's pass: torch's own on a GPU, a process's resident memory on a CPU.

On a CPU torch keeps no account, and a process that has held more once may go on holding it. So each figure comes from a process
of its own, which has imported the libraries and done nothing else: what its resident memory rises to in two passes, over what it
was before the tower was made.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

import psutil
import torch

from llava_drip.measure.speed import FAILURES, Pass, Setting, synchronize
from llava_drip.measure.subjects import Subject
from llava_drip.training.meters import peak_memory_gib, reset_peak_memory


def peak_on_cpu(
    subject: Subject, setting: Setting, num_classes: int, img_size: int | None = None, spread: float = 0.25
) -> float:
    """GiB: weights, activations, gradients. Threads are as many as this process has.

    Raises:
        RuntimeError: the process was killed (out of memory, say) or failed, with what it said.
    """
    work = partial(_two_passes, subject, setting, num_classes, img_size, spread)
    return rise_in_fresh_process(work, f"{subject.label}: its memory at {setting}")


def _two_passes(
    subject: Subject, setting: Setting, num_classes: int, img_size: int | None, spread: float
) -> Callable[[], float]:
    one = Pass(subject.make(num_classes, img_size), setting, spread)

    def run() -> float:
        reset_peak_memory()  # making it, or reading its file, may have taken more
        one()
        one()
        return peak_memory_gib()

    return run


def rise_in_fresh_process(prepare: partial[Callable[[], float]], what: str) -> float:
    """GiB that resident memory rises to over a process which has imported the libraries and done nothing else.

    Args:
        prepare: makes what is measured, in that process, and returns what runs it and tells the peak (peak_memory_gib). A
            functools.partial of a module's function: it has to be picklable.
        what: for messages.
    Raises:
        RuntimeError: the process was killed (out of memory, say) or failed (speed.FAILURES), with what it said.
        AssertionError: a mistake of this package.
    """
    context = multiprocessing.get_context("forkserver")  # imports the libraries once, and runs nothing
    context.set_forkserver_preload([__name__, prepare.func.__module__])  # if it is not there yet
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer_rise, args=(there, prepare, torch.get_num_threads()))
    process.start()
    there.close()
    try:
        rise, error, expected = here.recv()
    except EOFError:
        rise, error, expected = None, "", True
    process.join()
    if rise is None:
        kind = RuntimeError if expected else AssertionError
        raise kind(f"{what}: {error or f'its process ended with exit code {process.exitcode} (out of memory?)'}")
    return rise


def _answer_rise(answer: Connection, prepare: partial[Callable[[], float]], threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        before = psutil.Process().memory_info().rss
        run = prepare()
        answer.send((run() - before / 2**30, None, True))
    except Exception as error:
        answer.send((None, f"{type(error).__name__}: {error}", isinstance(error, FAILURES)))


def peak_on_cuda(one: Pass) -> float:
    """GiB that torch.cuda.max_memory_allocated counts during a pass, of which what lay there before is only the tower's own
    weights."""
    device = one.setting.device
    synchronize(device)
    own = {value.data_ptr(): value.nbytes for value in [*one.model.parameters(), *one.model.buffers(), one.x]}
    others = torch.cuda.memory_allocated(device) - sum(own.values())
    torch.cuda.reset_peak_memory_stats(device)
    one()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - others) / 2**30
