"""Peak memory of a tower's pass: torch's own on a GPU, a process's resident memory on a CPU.

On a CPU torch keeps no account, and a process that has held more once may go on holding it. So each figure comes from a process
of its own, which has imported the libraries and done nothing else: what its resident memory rises to in two passes, over what it
was before the tower was made.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import psutil
import torch

from llava_drip.measure.speed import Pass, Setting, synchronize
from llava_drip.measure.subjects import Subject
from llava_drip.training.meters import peak_memory_gib, reset_peak_memory


def peak_on_cpu(
    subject: Subject, setting: Setting, num_classes: int, img_size: int | None = None, spread: float = 0.25
) -> float:
    """GiB: weights, activations, gradients. Threads are as many as this process has.

    Raises:
        RuntimeError: the process was killed (out of memory, say) or failed, with what it said.
    """
    context = multiprocessing.get_context("forkserver")  # imports the libraries once, and runs nothing
    context.set_forkserver_preload(["llava_drip.measure.memory"])
    here, there = context.Pipe(duplex=False)
    arguments = (there, subject, setting, num_classes, img_size, spread, torch.get_num_threads())
    process = context.Process(target=_measure, args=arguments)
    process.start()
    there.close()
    try:
        answer = here.recv()
    except EOFError:
        answer = None
    process.join()
    if not isinstance(answer, float):
        raise RuntimeError(f"{subject.label}: its memory at {setting}: {answer or f'exit code {process.exitcode}'}")
    return answer


def _measure(
    answer: Connection,
    subject: Subject,
    setting: Setting,
    num_classes: int,
    img_size: int | None,
    spread: float,
    threads: int,
) -> None:
    try:
        torch.set_num_threads(threads)
        before = psutil.Process().memory_info().rss
        one = Pass(subject.make(num_classes, img_size), setting, spread)
        reset_peak_memory()  # making it, or reading its file, may have taken more
        one()
        one()
        answer.send(peak_memory_gib() - before / 2**30)
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")


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
