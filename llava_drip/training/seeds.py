"""Randomness as a function of what it is for, not of what ran before: (seed, step) in a model, (seed, sample) in augmentation."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from numbers and names; the same in every process and on every machine."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_sample(*parts: int | str) -> None:
    """Seeds what augmentations draw from: random, NumPy and torch's CPU generator. For data workers (7 microseconds)."""
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # Not torch.manual_seed, which also looks for GPUs and keeps a stack trace for later.
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def kept_randomness() -> Iterator[None]:
    """Puts the generators that `seed_sample` seeds back as they were: where data are made in the training process itself."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_step(*parts: int | str) -> None:
    """Seeds all that a training step draws from, the GPUs too (dropout, mixup)."""
    seed_sample(*parts)
    torch.manual_seed(seed_of(*parts))


class SharedNoise:
    """Uniform numbers for the boundaries of a global batch: an image's are the same however many ranks share the batch.

    Every rank draws for all images and keeps its own rows, which lie in the order of the ranks (a hundredth of a percent of a
    step's work). Calls after `at` count: the same calls must come in each run.
    """

    def __init__(self, seed: int, rank: int = 0, ranks: int = 1):
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.at(0)

    def at(self, step: int) -> None:
        """Go to an optimizer step."""
        self.step, self.calls = step, 0

    def __call__(self, like: Tensor) -> Tensor:
        """[B, ...] in 0 .. 1, of the shape, dtype and device of `like` (this rank's part)."""
        generator = torch.Generator(like.device).manual_seed(seed_of(self.seed, "noise", self.step, self.calls))
        self.calls += 1
        rows = len(like)
        everyone = torch.rand(
            rows * self.ranks, *like.shape[1:], dtype=like.dtype, device=like.device, generator=generator
        )
        return everyone[self.rank * rows : (self.rank + 1) * rows]
