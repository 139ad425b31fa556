"""A loader put back where a killed run was: the rest of the epoch, the next epoch and what was skipped are the same."""

from __future__ import annotations

import io

import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from llava_drip.training.loader import TrainLoader, batches_of_epoch
from llava_drip.training.rows import RowBatches, shuffled

from .helpers import as_json, epoch_of, load, numbers, shard_loader, shards, truncated, write_tar

EPOCHS = 2


def damaged(folder, sizes=(9, 8, 7)) -> list[str]:
    """Shards with corrupt samples and one that is cut off."""
    units = shards(folder, sizes, bad=(2, 3, 10, 16, 17))
    truncated(units[-1], 4 * 1024 + 100)  # in the middle of a header: 4 samples are left
    return units


def run(loader: TrainLoader) -> tuple[dict, dict, list]:
    """Batches by (epoch, number), skips by epoch, and the state after every batch."""
    batches, skips, states = {}, {}, []
    for epoch in range(loader.epoch, EPOCHS):
        loader.set_epoch(epoch)
        for batch in loader:
            batches[epoch, loader.batch] = batch
            states.append(as_json(loader.state()))
        skips[epoch] = loader.all_skips().state()
    return batches, skips, states


def check_every_resume(make, every: int = 1) -> None:
    batches, skips, states = run(make())
    assert len(batches) == len(states) == EPOCHS * len(make())
    for state in states[every - 1 :: every]:
        loader = make()
        loader.resume(state)
        again, skips_again, _ = run(loader)
        rest = {at: batch for at, batch in batches.items() if at > (state["epoch"], state["batch"])}
        assert again.keys() == rest.keys()
        assert all(torch.equal(again[at], batch) for at, batch in rest.items()), state
        assert skips_again == {epoch: skips[epoch] for epoch in skips_again}, state
        assert set(skips_again) == {epoch for epoch, _ in rest}


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("buffer", [1, 5, 1000])
def test_resume_after_every_batch(tmp_path, copies, streams, buffer):
    """Within passes and at their ends (an epoch is two to three of them), with more streams than shards, within copies."""
    units = damaged(tmp_path)
    check_every_resume(lambda: shard_loader(units, 4, 11, streams=streams, copies=copies, buffer=buffer))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("copies", [1, 3])
def test_resume_after_every_batch_with_workers(tmp_path, workers, copies):
    """Persistent workers go on into the next epoch from its beginning."""
    units = damaged(tmp_path)
    check_every_resume(lambda: shard_loader(units, 4, 5, workers, copies=copies))


def test_resume_of_drawn_shards_and_of_streams_without_good_ones(tmp_path):
    units = damaged(tmp_path)
    check_every_resume(lambda: shard_loader(units, 4, 11, streams=2, weights=[1, 2, 3]))
    write_tar(units[0], [])
    write_tar(units[1], [("1.txt", b"bad")])
    check_every_resume(lambda: shard_loader(units, 4, 11, streams=4))


def table(workers: int = 0, rows: int = 23, **options) -> TrainLoader:
    options = {"order": shuffled(rows, 0), "batch_size": 4, "seed": 0, **options}
    return TrainLoader(RowBatches(load, rows, **options), workers)


class Repeated:
    """timm's repeated augmentation as an order."""

    def __init__(self, rows: int):
        self.sampler = RepeatAugSampler(range(rows), num_replicas=1, rank=0, num_repeats=3)

    def __call__(self, epoch: int) -> list[int]:
        self.sampler.set_epoch(epoch)
        return list(self.sampler)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resume_of_rows(workers):
    every = 3 if workers else 1  # starting workers takes its time; 3: at the turn of either
    check_every_resume(lambda: table(workers), every)
    check_every_resume(lambda: table(workers, order=Repeated(23)), 2 * every - 1)


def test_a_state_survives_torch_save(tmp_path):
    loader = shard_loader(damaged(tmp_path), 4, 6)
    loader.set_epoch(1)
    batches = list(loader)
    file = io.BytesIO()
    state = loader.state()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == state == as_json(state)
    assert len(batches) == state["batch"] == 6


def test_a_run_may_be_killed_again_and_again(tmp_path):
    units = damaged(tmp_path)
    batches, skips, _ = run(shard_loader(units, 4, 7, streams=2))
    state, seen = None, {}
    while True:
        loader = shard_loader(units, 4, 7, streams=2)
        if state is not None:
            loader.resume(state)
        if loader.epoch == EPOCHS:
            break
        loader.set_epoch(loader.epoch)
        for _, batch in zip(range(2), loader):
            seen[loader.epoch, loader.batch] = batch
        if loader.batch == len(loader):
            assert loader.skips.state() == skips[loader.epoch]
        state = as_json(loader.state())
    assert seen.keys() == batches.keys() and all(torch.equal(seen[at], batches[at]) for at in seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_was_left_begins_anew(tmp_path, workers):
    """Also the one in which the loader had been put back, and while workers hold batches of it ready."""
    units = damaged(tmp_path)
    loader = shard_loader(units, 4, 6, workers)
    whole, next_one = epoch_of(loader, 0), epoch_of(loader, 1)
    for _, _batch in zip(range(2), loader):
        pass
    loader.set_epoch(1)
    assert loader.state()["batch"] == 0 and loader.skips.total == 0
    assert torch.equal(epoch_of(loader, 0), whole)
    loader.set_epoch(0)
    for _, _batch in zip(range(3), loader):
        pass
    state = as_json(loader.state())
    loader.resume(state)  # while its workers run
    assert torch.equal(torch.stack(list(loader)), whole[3:])
    assert torch.equal(torch.stack(list(loader)), whole)  # without set_epoch: the same epoch again, all of it
    assert loader.batch == 6
    assert torch.equal(epoch_of(loader, 1), next_one)
    assert torch.equal(epoch_of(loader, 0), whole)


def test_rows_begin_anew_too():
    loader = table()
    whole = epoch_of(loader, 0)
    for _, _batch in zip(range(2), loader):
        pass
    loader.resume(as_json(loader.state()))
    assert torch.equal(epoch_of(loader, 0), whole[2:]) and torch.equal(epoch_of(loader, 0), whole)


def test_at_the_end_of_an_epoch_the_next_one_begins(tmp_path):
    units = shards(tmp_path, [8])
    loader = shard_loader(units, 4, 2)
    epoch_of(loader, 3)
    again = shard_loader(units, 4, 2)
    again.resume(loader.state())
    assert (again.epoch, again.batch) == (4, 0)
    assert torch.equal(torch.stack(list(again)), epoch_of(loader, 4))


def test_a_state_from_before_the_first_batch(tmp_path):
    units = shards(tmp_path, [8])
    loader, again = shard_loader(units, 4, 2), shard_loader(units, 4, 2)
    loader.set_epoch(2)
    again.resume(as_json(loader.state()))
    assert again.epoch == 2 and torch.equal(torch.stack(list(again)), epoch_of(loader, 2))


def test_other_ranks_may_go_on(tmp_path):
    """One rank's state, taken up by two."""
    units = shards(tmp_path, [10] * 4)
    loader = shard_loader(units, 8, 5, streams=4)
    whole = epoch_of(loader, 0)
    loader.set_epoch(0)
    for _, _batch in zip(range(2), loader):
        pass
    parts = []
    for rank in (0, 1):
        part = shard_loader(units, 4, 5, streams=4, rank=rank, ranks=2)
        part.resume(as_json(loader.state()))
        assert len(part.positions) == 2  # its own streams alone
        parts.append(torch.stack(list(part)))
    assert torch.equal(torch.cat(parts, dim=1), whole[2:])


def test_another_order_is_refused_within_an_epoch_only(tmp_path):
    units = shards(tmp_path, [8] * 4)
    loader = shard_loader(units, 4, 4)
    next(iter(loader))
    state = as_json(loader.state())
    with pytest.raises(ValueError, match="with 1 workers and 1 data streams, now 2 and 2: .*--data-streams"):
        shard_loader(units, 4, 4, workers=2).resume(state)
    with pytest.raises(ValueError, match="took 4 samples a batch over all ranks, now 8"):
        shard_loader(units, 8, 4).resume(state)
    with pytest.raises(ValueError, match="another kind of data"):
        table().resume(state)
    for _ in loader:
        pass
    end = shard_loader(units, 4, 2, workers=2)
    end.resume(as_json(loader.state()))
    assert (end.epoch, end.batch) == (1, 0)


def test_len_is_that_of_the_whole_epoch(tmp_path):
    loader = shard_loader(shards(tmp_path, [8]), 4, 7)
    next(iter(loader))
    assert len(loader) == 7 and len(table()) == 5


def test_rows_that_do_not_fill_a_batch():
    loader = table(rows=3)
    assert len(loader) == 0
    with pytest.raises(ValueError, match="the 3 rows of the data do not fill one batch of 4"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("arguments", "batches"),
    [((100, 10), 10), ((101, 10), 11), ((101, 10, 2), 6), ((101, 10, 2, 4), 8), ((1, 10, 2, 4), 4)],
)
def test_batches_of_epoch(arguments, batches):
    assert batches_of_epoch(*arguments) == batches


def test_workers_give_batches_in_turn_whatever_their_number(tmp_path):
    """5 batches of 2 workers: the first gives one more."""
    batches = epoch_of(shard_loader(shards(tmp_path, [12, 12]), 4, 5, workers=2))
    assert len(batches) == 5
    streams = [set(numbers(batch)) for batch in batches]
    assert all(max(s) < 12 or min(s) >= 12 for s in streams)  # each from one stream's shard
