"""The order of shards: what it depends on, and what it does not."""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from llava_drip.training.skips import BadSample
from llava_drip.training.streams import ShardBatches, ShardOptions, shuffle

from .helpers import decode, epoch_of, numbers, shard_loader, shards, truncated, write_tar


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_ranks_gives_the_same_global_batches(tmp_path, workers):
    units = shards(tmp_path, [6] * 8)
    whole = epoch_of(shard_loader(units, 8, 6, workers, streams=8))
    for ranks in (2, 4):
        parts = [
            epoch_of(shard_loader(units, 8 // ranks, 6, workers, streams=8, rank=rank, ranks=ranks))
            for rank in range(ranks)
        ]
        assert torch.equal(torch.cat(parts, dim=1), whole)  # augmentation included


def test_streams_of_their_own_keep_the_order_with_other_workers_apart(tmp_path):
    """A worker's streams do not depend on which process reads them; only the layout of batches does."""
    units = shards(tmp_path, [6] * 4)
    assert Counter(numbers(epoch_of(shard_loader(units, 4, 6, 0, streams=4)))) == Counter(range(24))
    assert Counter(numbers(epoch_of(shard_loader(units, 4, 6, 2, streams=4)))) == Counter(range(24))


@pytest.mark.parametrize(
    ("sizes", "streams"),
    [([12] * 4, 4), ([12] * 4, 2), ([48], 4), ([24, 24], 4), ([16] * 3, 1), ([12] * 4, 1)],
)
@pytest.mark.parametrize("buffer", [1, 4, 1000])
def test_every_sample_is_seen_once_where_the_numbers_divide(tmp_path, sizes, streams, buffer):
    """Also with more streams than shards: those that share a shard divide its samples."""
    loader = shard_loader(shards(tmp_path, sizes), 4, 12, streams=streams, buffer=buffer)
    for epoch in (0, 1):
        assert sorted(numbers(epoch_of(loader, epoch))) == list(range(48))


def test_epochs_and_seeds_differ_and_the_same_come_again(tmp_path):
    units = shards(tmp_path, [8] * 3)
    loader = shard_loader(units, 4, 6)
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert numbers(first) != numbers(second)
    same = first[..., 0].flatten().argsort(), second[..., 0].flatten().argsort()
    a, b = first.flatten(0, 1)[same[0]], second.flatten(0, 1)[same[1]]
    assert torch.equal(a[:, 0], b[:, 0]) and (a[:, 1:] != b[:, 1:]).all()  # other augmentation of the same samples
    assert torch.equal(epoch_of(loader, 0), first)
    assert torch.equal(epoch_of(shard_loader(units, 4, 6), 0), first)
    assert numbers(epoch_of(shard_loader(units, 4, 6, seed=1), 0)) != numbers(first)
    in_files = shard_loader(units, 4, 6, buffer=1)  # the shards' own order differs too
    assert len({tuple(numbers(epoch_of(in_files, epoch))) for epoch in range(8)}) > 2


def test_moving_the_data_changes_nothing(tmp_path):
    before = epoch_of(shard_loader(shards(tmp_path / "a", [8] * 3), 4, 6))
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    after = sorted(str(path) for path in (tmp_path / "elsewhere").iterdir())
    assert torch.equal(epoch_of(shard_loader(after, 4, 6)), before)


def test_a_buffer_of_1_keeps_the_order_of_the_file(tmp_path):
    assert numbers(epoch_of(shard_loader(shards(tmp_path, [20]), 4, 5, buffer=1))) == list(range(20))


def test_samples_move_within_the_shuffle_buffer_only():
    order = list(shuffle(iter(range(5000)), 100, random.Random(0)))
    assert sorted(order) == list(range(5000)) and order != sorted(order)
    assert all(sample - place < 100 for place, sample in enumerate(order))  # none before it was read
    assert list(shuffle(iter(range(7)), 1, random.Random(0))) == list(range(7))
    assert sorted(shuffle(iter(range(7)), 5000, random.Random(0))) == list(range(7))


def test_an_epoch_longer_than_the_data_goes_round(tmp_path):
    seen = numbers(epoch_of(shard_loader(shards(tmp_path, [5, 5]), 5, 6)))
    assert Counter(seen) == dict.fromkeys(range(10), 3)
    assert seen[:10] != seen[10:20] != seen[20:]


def test_copies_follow_each_other_and_differ(tmp_path):
    batches = epoch_of(shard_loader(shards(tmp_path, [8]), 6, 4, copies=3))
    copies = batches.reshape(8, 3, 4)
    assert (copies[:, :, 0] == copies[:, :1, 0]).all() and sorted(copies[:, 0, 0].tolist()) == list(range(8))
    assert len({tuple(row) for row in copies[:, :, 1:].flatten(0, 1).tolist()}) == 24


def test_weights_are_respected(tmp_path):
    units = shards(tmp_path, [4] * 4)
    loader = shard_loader(units, 8, 400, weights=[1, 0, 3, 6])
    share = np.bincount(np.array(numbers(epoch_of(loader))) // 4, minlength=4) / 3200
    assert share[1] == 0
    np.testing.assert_allclose(share, [0.1, 0, 0.3, 0.6], atol=0.04)
    two = [epoch_of(shard_loader(units, 8, 400, weights=[1, 0, 3, 6], streams=2, rank=r, ranks=2)) for r in (0, 1)]
    assert numbers(two[0]) != numbers(two[1])


def test_a_shard_drawn_twice_is_augmented_differently(tmp_path):
    """Weights draw with replacement: the same sample comes again in a pass, with other augmentation."""
    batches = epoch_of(shard_loader(shards(tmp_path, [2] * 4), 8, 20, weights=[1, 1, 1, 1], streams=2))
    rows = batches.flatten(0, 1).tolist()
    assert len({tuple(row[1:]) for row in rows}) == len(rows)


def test_decoding_in_this_process_leaves_its_randomness_alone(tmp_path):
    loader = shard_loader(shards(tmp_path, [8]), 4, 2)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(3)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    batches = iter(loader)  # a DataLoader's own start draws one number
    next(batches)
    torch.manual_seed(5)
    next(batches)
    assert random.random() == expected[0] and np.random.rand() == expected[1]
    assert torch.equal(torch.rand(3), expected[2])


# What is bad among what is good


def test_bad_samples_are_left_out_and_counted(tmp_path):
    loader = shard_loader(shards(tmp_path, [10, 10], bad=(3, 4, 17)), 17, 1)
    assert sorted(numbers(epoch_of(loader))) == [n for n in range(20) if n not in (3, 4, 17)]
    assert loader.skips.counts == {"corrupt text": 3}
    assert sorted(loader.skips.examples) == ["000.tar: 000003", "000.tar: 000004", "001.tar: 000017"]


@pytest.mark.parametrize("copies", [1, 2])
def test_a_stream_whose_own_shards_hold_nothing_reads_the_others(tmp_path, copies):
    units = shards(tmp_path, [4, 4, 4, 4])
    for unit in units[:2]:
        write_tar(unit, [])
    (tmp_path / "001.tar").write_bytes(b"")
    for epoch in range(6):  # however the shards are dealt
        loader = shard_loader(units, 4, 6, streams=2, copies=copies)
        assert set(numbers(epoch_of(loader, epoch))) <= set(range(8, 16))
        passes = loader.skips.counts["unreadable shard"]
        assert 1 <= passes <= 12 and set(loader.skips.counts) == {"unreadable shard"}


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_a_bad_shard_counts_once_in_a_pass(tmp_path, streams):
    units = shards(tmp_path, [6, 6, 6, 6])
    (tmp_path / "002.tar").write_bytes(b"")
    loader = shard_loader(units, 4, 2, streams=streams, buffer=100)
    epoch_of(loader)
    assert loader.skips.counts == {"unreadable shard": 1}


@pytest.mark.parametrize("buffer", [1, 100])
def test_bad_shards_are_counted_before_the_others_are_read(tmp_path, buffer):
    units = shards(tmp_path, [9] * 4)
    for unit in units[:2]:
        truncated(unit, 0)
    for epoch in range(5):
        loader = shard_loader(units, 4, 1, streams=4, buffer=buffer)
        epoch_of(loader, epoch)
        # Each by the stream whose only shard it is; perhaps again by the other, which then reads all shards.
        assert 2 <= loader.skips.counts["unreadable shard"] <= 4


def test_a_damaged_shard_that_streams_share_counts_once(tmp_path):
    units = shards(tmp_path, [8, 8])
    truncated(units[1], 6 * 1024 + 600)
    loader = shard_loader(units, 8, 1, streams=4, buffer=100)
    assert len(set(numbers(epoch_of(loader)))) == 8 and loader.skips.counts == {"unreadable shard": 1}


# With workers once only: torch takes 5 seconds to end a worker that failed.
@pytest.mark.parametrize(("workers", "weights"), [(0, None), (0, [1, 1, 0]), (1, None)])
def test_nothing_usable_at_all_is_an_error_with_counts_and_examples(tmp_path, workers, weights):
    units = shards(tmp_path, [3, 2, 1], bad=range(6))
    if weights:
        units = shards(tmp_path, [3, 2, 1], bad=range(5))
    (tmp_path / "001.tar").write_bytes(b"garbage" * 500)
    loader = shard_loader(units, 2, 4, workers, weights=weights)
    with pytest.raises(ValueError) as caught:
        epoch_of(loader)
    good = "3" if weights else "4"
    assert re.search(rf"no usable sample in any shard: .*{good} corrupt text", str(caught.value)), caught.value
    assert "1 unreadable shard" in str(caught.value) and "001.tar: " in str(caught.value)


def test_weights_that_draw_bad_shards_only_do_not_end_the_run(tmp_path):
    units = shards(tmp_path, [3, 3])
    (tmp_path / "000.tar").write_bytes(b"")
    seen = numbers(epoch_of(shard_loader(units, 3, 4, weights=[1e9, 1e-9])))
    assert set(seen) == {3, 4, 5}


def test_after_a_draw_of_bad_shards_the_weights_count_again(tmp_path):
    units = shards(tmp_path, [2, 2, 2])
    truncated(units[0], 0)
    seen = numbers(epoch_of(shard_loader(units, 3, 200, streams=3, weights=[0.2, 1, 1e-9])))
    assert 0 < sum(n >= 4 for n in seen) / len(seen) < 0.3  # half, if all shards were read from then on


def breaks(sample: dict) -> None:
    raise KeyError("label")


def test_other_errors_of_decode_are_not_swallowed(tmp_path):
    with pytest.raises(KeyError, match="label"):
        epoch_of(shard_loader(shards(tmp_path, [4]), 2, 2, decode=breaks))


class FailsOnce:
    """Of each sample, the second copy cannot be made."""

    def __call__(self, sample: dict) -> torch.Tensor:
        self.copy = getattr(self, "copy", 0) + 1
        if self.copy == 2:
            self.copy = 0
            raise BadSample("corrupt copy", sample["__key__"])
        return decode(sample)


def test_a_sample_whose_copy_fails_is_left(tmp_path):
    loader = shard_loader(shards(tmp_path, [6]), 2, 3, copies=3, decode=FailsOnce())
    assert sorted(numbers(epoch_of(loader))) == list(range(6))
    # The last one's second copy was not asked for.
    assert loader.skips.counts == {"corrupt copy": 5}


# What is refused


def options(tmp_path, **others) -> ShardOptions:
    return ShardOptions(shards(tmp_path, [4, 4]), decode, **others)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"weights": [1]}, "1 weights for 2 shards"),
        ({"weights": [0, 0]}, "not all of them 0"),
        ({"weights": [1, -1]}, "0 or more"),
        ({"weights": [1, float("nan")]}, "0 or more"),
        ({"buffer": 0}, "at least 1"),
        ({"copies": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_sense(tmp_path, others, message):
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **others)


def test_no_shards_at_all():
    with pytest.raises(ValueError, match="no shards"):
        ShardOptions([], decode)


def test_streams_must_divide(tmp_path):
    with pytest.raises(ValueError, match="3 data streams cannot be divided among 2 workers over all ranks"):
        ShardBatches(options(tmp_path), batch_size=4, batches=1, workers=2, streams=3)
    with pytest.raises(ValueError, match="batch size 5 cannot be divided among 2 data streams"):
        ShardBatches(options(tmp_path), batch_size=5, batches=1, streams=2)
