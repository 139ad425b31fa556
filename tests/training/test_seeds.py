"""Randomness that does not depend on what ran before."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import timm
import torch

import llava_drip  # noqa: F401
from llava_drip.training.seeds import SharedNoise, kept_randomness, seed_of, seed_sample, seed_step

from .helpers import draws


def test_seed_of_is_the_same_everywhere():
    """Another value would be another order for every run that goes on."""
    assert seed_of(1, "sample", "größe", 2) == 6280617905084896986


def test_seeds_of_different_things_differ():
    seeds = [seed_of(*parts) for parts in ((1, 2), (12,), ("1", "2", ""), (2, 1), (1, "x", 2), (1, "x2"))]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("seed", [seed_sample, seed_step])
def test_all_generators_are_seeded(seed):
    seed(0, "a", 1)
    first = draws()
    seed(0, "a", 2)
    assert all(a != b for a, b in zip(draws(), first))
    seed(0, "a", 1)
    assert draws() == first


def test_kept_randomness():
    seed_step(3)
    expected = draws()
    seed_step(3)
    with pytest.raises(ValueError), kept_randomness():
        seed_sample(4)
        draws()
        raise ValueError
    assert draws() == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_rows_are_the_single_ranks(ranks):
    like = torch.zeros(8, 5)
    single = SharedNoise(0)
    parts = [SharedNoise(0, rank, ranks) for rank in range(ranks)]
    for step in (0, 1, 5):
        for source in (single, *parts):
            source.at(step)
        for _ in range(2):
            noise = single(like)
            assert torch.equal(torch.cat([part(like[: 8 // ranks]) for part in parts]), noise)
            assert noise.shape == like.shape and noise.dtype == like.dtype and 0 <= noise.min() <= noise.max() < 1


def test_noise_differs_by_seed_step_and_call_and_leaves_the_generators_alone():
    like = torch.zeros(2, 50)
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    noise, other = SharedNoise(0), SharedNoise(1)
    drawn = [noise(like), noise(like), other(like)]
    noise.at(1)
    drawn.append(noise(like))
    assert len({tuple(draw.flatten().tolist()) for draw in drawn}) == 4
    noise.at(0)
    assert torch.equal(noise(like), drawn[0])
    assert torch.equal(torch.rand(4), expected)


def test_a_tower_draws_the_same_boundaries_however_its_batch_is_divided():
    torch.manual_seed(0)
    tower = timm.create_model("drip_mini_patch8_64_4x", num_classes=0).train()
    images = torch.rand(6, 3, 64, 64)

    def segments(rank: int, ranks: int, step: int) -> torch.Tensor:
        tower.noise = noise = SharedNoise(0, rank, ranks)
        noise.at(step)
        part = len(images) // ranks
        return tower.forward_features(images[rank * part : (rank + 1) * part]).segments

    for step in (0, 3):
        whole = segments(0, 1, step)
        assert torch.equal(torch.cat([segments(0, 2, step), segments(1, 2, step)]), whole)
        assert torch.equal(torch.cat([segments(rank, 3, step) for rank in range(3)]), whole)
    assert not torch.equal(segments(0, 1, 0), segments(0, 1, 1))


def test_a_seed_costs_little():
    """For every sample of a run: far below the decoding of a picture."""
    begin = time.perf_counter()
    for n in range(2000):
        seed_sample(0, 1, 2, 3, "train-00017.tar: 000170042", n)
    assert (time.perf_counter() - begin) / 2000 < 500e-6  # 7 microseconds on a free core
    assert random.random() == random.Random(seed_of(0, 1, 2, 3, "train-00017.tar: 000170042", 1999)).random()
    assert np.random.rand() < 1
