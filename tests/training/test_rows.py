"""Data with an index: the same global batches for any number of ranks, and a row in place of one that cannot be read."""

from __future__ import annotations

import pickle

import pytest
import torch

from llava_drip.training.loader import TrainLoader
from llava_drip.training.rows import RowBatches, shuffled
from llava_drip.training.seeds import seed_step
from llava_drip.training.skips import BadSample

from .helpers import draws, epoch_of, load, numbers


def table(workers: int = 0, rows: int = 24, load=load, **options) -> TrainLoader:
    options = {"order": shuffled(rows, 0), "batch_size": 4, **options}
    return TrainLoader(RowBatches(load, rows, **options), workers)


def good(row: int) -> torch.Tensor:
    return torch.tensor([row, *draws()], dtype=torch.float64)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_ranks_gives_the_same_global_batches(workers):
    whole = epoch_of(table(workers, batch_size=8))
    for ranks in (2, 4):
        parts = [epoch_of(table(workers, batch_size=8 // ranks, rank=rank, ranks=ranks)) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_the_number_of_workers_changes_nothing():
    assert torch.equal(epoch_of(table(0)), epoch_of(table(2)))


def test_every_row_is_seen_once_and_an_incomplete_batch_is_left_out():
    assert sorted(numbers(epoch_of(table(load=good)))) == list(range(24))
    seen = numbers(epoch_of(table(load=good, rows=26)))
    assert len(seen) == len(set(seen)) == 24


def test_epochs_and_seeds_differ():
    first, second = epoch_of(table(load=good), 0), epoch_of(table(load=good), 1)
    assert numbers(first) != numbers(second)
    assert numbers(epoch_of(table(load=good, order=shuffled(24, 1)))) != numbers(first)
    other = epoch_of(table(load=good, seed=1))
    assert numbers(other) == numbers(first) and (other[..., 1:] != first[..., 1:]).all()
    assert torch.equal(epoch_of(table(load=good), 0), first)


def test_a_row_that_comes_again_is_augmented_differently():
    batches = epoch_of(table(load=good, order=lambda epoch: [5] * 24))
    assert len({tuple(row) for row in batches.flatten(0, 1).tolist()}) == 24


def test_the_next_good_row_stands_in_and_each_bad_one_counts_once():
    loader = table(order=lambda epoch: list(range(24)))
    assert numbers(epoch_of(loader)) == [n if n % 7 != 6 else n + 1 for n in range(24)]
    assert loader.skips.counts == {"corrupt row": 3}
    assert loader.skips.examples == ["row 6", "row 13", "row 20"]


def neighbours(row: int) -> torch.Tensor:
    if row in (3, 4, 23):
        raise BadSample("corrupt row", f"row {row}")
    return torch.tensor([row])


def test_bad_neighbours_and_a_bad_last_row():
    loader = table(load=neighbours, order=lambda epoch: list(range(24)))
    seen = numbers(epoch_of(loader)[..., None])
    assert [seen[3], seen[4], seen[23]] == [5, 5, 0]
    assert loader.skips.counts == {"corrupt row": 3}


def nothing(row: int) -> None:
    raise BadSample("corrupt row", f"row {row}")


def test_nothing_usable_is_an_error_with_counts():
    with pytest.raises(ValueError, match=r"no usable sample: 24 skipped \(24 corrupt row\); row"):
        epoch_of(table(load=nothing))


def breaks(row: int) -> None:
    raise KeyError("path")


def test_other_errors_are_not_swallowed():
    with pytest.raises(KeyError, match="path"):
        epoch_of(table(load=breaks))


def test_loading_in_this_process_leaves_its_randomness_alone():
    data = table().dataset
    seed_step(5)
    expected = draws()
    seed_step(5)
    data[data.batches(0)[0]]
    assert draws() == expected


def test_len_does_not_shuffle_each_time():
    asked = []

    def order(epoch: int) -> list[int]:
        asked.append(epoch)
        return list(range(24 + 4 * epoch))

    loader = table(order=order)
    assert [len(loader) for _ in range(9)] == [6] * 9 and asked == [0]
    loader.set_epoch(2)
    assert len(loader) == 8


def test_it_can_be_pickled():
    data = pickle.loads(pickle.dumps(table().dataset))
    assert data.batches(3) == table().dataset.batches(3)
