"""What the tests of this folder share: pictures, tar files, and programs run in their own process."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 50, 230),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
}
MODEL = "DRIP-mini-8-4x"
# open_clip's defaults are for GPUs and long runs.
SHORT = ["--device=cpu", "--precision=fp32", "--workers=0", "--warmup=2", "--lr=1e-3", "--log-every-n-steps=2"]


def picture(rng: np.random.Generator, colour: str) -> bytes:
    """A JPEG of 72 x 72 pixels: a square of the colour, on noise."""
    pixels = rng.integers(90, 160, (72, 72, 3), dtype=np.uint8)
    left, top = rng.integers(4, 30, 2)
    pixels[top : top + 36, left : left + 36] = COLOURS[colour]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def run_program(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """A program of the repository in its own process, one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def process_of(work: Callable, *args) -> BaseProcess:
    """work(*args) in a process with as many torch threads as this one. Forked from one that has made the imports and runs no
    thread: one of this one's might hold a lock that is then never given back."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["llava_drip.contrastive.train", "llava_drip.measure.memory"])
    return context.Process(target=_with_threads, args=(torch.get_num_threads(), work, args))


def _with_threads(threads: int, work: Callable, args: tuple) -> None:
    torch.set_num_threads(threads)
    work(*args)


def _rank_of_two(rank: int, port: int, work: Callable, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    work(*args)


def in_two_ranks(work: Callable, *args) -> list[int]:
    """Exit codes of work(*args), a function of a module, in two ranks, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    ranks = [process_of(_rank_of_two, rank, port, work, args) for rank in range(2)]
    for process in ranks:
        process.start()
    connection.wait([process.sentinel for process in ranks], 120)
    ended = next((process for process in ranks if process.exitcode is not None), None)
    for process in ranks:
        if ended is not None and ended.exitcode == 0:
            process.join(60)
        process.kill()  # one whose other rank has failed would wait for it
        process.join()
    return [process.exitcode for process in ranks]
