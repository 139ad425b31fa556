"""What only several processes show: two ranks over gloo, and workers that are not forked."""

from __future__ import annotations

import traceback
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from llava_drip.training.loader import TrainLoader
from llava_drip.training.meters import TokenHistogram
from llava_drip.training.rows import RowBatches, shuffled

from .helpers import as_json, epoch_of, load, shard_loader, shards, truncated

SHARDS = ([9, 8, 7, 6], (2, 3, 10, 16, 17))


def _loader(units: list[str], rank: int = 0, ranks: int = 1):
    return shard_loader(units, 4 // ranks, 9, streams=4, rank=rank, ranks=ranks)


def _rank(rank: int, folder: str, units: list[str], answers) -> None:
    try:
        answers.put((rank, _as_rank(rank, folder, units)))
    except BaseException:
        answers.put((rank, traceback.format_exc()))


def _as_rank(rank: int, folder: str, units: list[str]) -> dict:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    meter = TokenHistogram(64, "cpu")
    meter.add(torch.arange(1, 31) + 30 * rank)
    answer = {"tokens": meter.summary(), "own": meter.summary(over_ranks=False), "batches": [], "states": []}
    state = None
    while True:  # killed after every second batch
        loader = _loader(units, rank, 2)
        if state is not None:
            loader.resume(state)
        if loader.epoch:
            break
        for _, batch in zip(range(2), loader):
            answer["batches"].append(batch.tolist())
        state = as_json(loader.state())
        answer["states"].append(state)
        answer["skips"] = loader.all_skips().state()
    dist.destroy_process_group()
    return answer


def test_two_ranks_killed_again_and_again_do_what_one_does(tmp_path):
    units = shards(tmp_path, *SHARDS)
    truncated(units[3], 4 * 1024 + 700)
    context = mp.get_context("forkserver")  # not from a process with threads, whose locks stay taken
    answers = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, str(tmp_path), units, answers)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    assert all(isinstance(answer, dict) for answer in found.values()), found
    single = _loader(units)
    whole = epoch_of(single)
    assert torch.equal(
        torch.cat([torch.tensor(found[rank]["batches"], dtype=torch.float64) for rank in (0, 1)], 1), whole
    )
    assert found[0]["states"] == found[1]["states"]
    assert found[0]["states"][-1]["positions"] == as_json(single.state())["positions"]
    for rank in (0, 1):
        assert found[rank]["skips"]["counts"] == dict(single.skips.counts)
    all_tokens = TokenHistogram(64, "cpu")
    all_tokens.add(torch.arange(1, 61))
    assert found[0]["tokens"] == found[1]["tokens"] == all_tokens.summary()
    assert found[1]["own"]["tokens"] == 45.5


def _rows(workers: int) -> TrainLoader:
    return TrainLoader(RowBatches(load, 23, order=shuffled(23, 0), batch_size=4), workers)


@pytest.mark.parametrize("kind", ["shards", "rows"])
def test_workers_that_are_not_forked(tmp_path, kind):
    """All that they need can be pickled, and they too hear of the epoch while they run."""
    units = shards(tmp_path, [9, 8], (3, 12))
    make = partial(shard_loader, units, 4, 4) if kind == "shards" else _rows
    plain, loader = make(workers=0), make(workers=1)
    plain.set_epoch(1)
    for _, _batch in zip(range(2), plain):
        pass
    loader.resume(as_json(plain.state()))
    mp.set_forkserver_preload(["llava_drip.training.loader"])  # imported once
    loader.options["multiprocessing_context"] = "forkserver"
    assert torch.equal(torch.stack(list(loader)), torch.stack(list(plain))[2:])
    assert loader.skips.state() == plain.skips.state()
    assert torch.equal(epoch_of(loader, 2), epoch_of(plain, 2))
