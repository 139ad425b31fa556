"""Several processes train what one would (DDP, FSDP, two nodes), and go on after a kill, in other numbers too."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_drip.classification.run import _checkpoint_to_resume

from .helpers import MODEL, SHORT, TORCHRUN, finished, losses, program, rows, run, samples, start, weights, write_tar
from .test_flags import parsed

PROGRAM = "scripts/train_imagenet.py"
KILLED = "tests/classification/killed_run.py"


@pytest.fixture(scope="module")
def shared(data) -> list[str]:
    """Two epochs of three steps of 16 pictures, a checkpoint after each step, the order of shards fixed by their streams."""
    shards = [f"--train-data={data}/shards", f"--classes={data}/shards/names.txt", "--data-streams=2"]
    flags = [f"--model={MODEL}", *shards, f"--val-data={data}/val_shards", "--epochs=2", *SHORT]
    return [*flags, "--shuffle-buffer=6", "--save-every-n-steps=1", "--keep-checkpoints=9"]


@pytest.fixture(scope="module")
def one(shared, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return run(*shared, "--batch-size=16", f"--output={tmp_path_factory.mktemp('one')}")


def succeeded(result) -> None:
    assert result.returncode == 0, result.stderr[-3000:]


def assert_same(several: Path, one: Path, steps: int = 6) -> None:
    assert len(losses(one)) == steps
    np.testing.assert_allclose(losses(several), losses(one), atol=1e-4)
    for ours, theirs in zip(rows(several, "epochs"), rows(one, "epochs"), strict=True):
        for name in ("epoch", "step", "top1", "top5", "val_images", "skipped", "compression_p5"):
            assert ours[name] == theirs[name], name
        for name in ("loss", "val_loss", "tokens", "train_tokens", *(["rate_loss"] if "rate_loss" in theirs else [])):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(several)[name], value, atol=2e-4, rtol=0)


@pytest.mark.slow
def test_two_nodes_train_what_one_process_would(shared, one, tmp_path):
    """Two torchrun agents of one process each (DDP)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for node in range(2):
        where = ["--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--rdzv_backend=c10d"]
        launcher = ["-m", "torch.distributed.run", *where, f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=7", "--"]
        agents.append(start(*launcher, PROGRAM, *shared, "--batch-size=8", f"--output={tmp_path}"))
    results = [finished(agent) for agent in agents]
    for result in results:
        succeeded(result)
    assert_same(tmp_path, one)
    printed = "".join(result.stderr for result in results)
    assert len(re.findall("^epoch 2/2", printed, re.MULTILINE)) == 1  # by one of them


@pytest.mark.slow
def test_ranks_killed_go_on_as_one_process(shared, one, tmp_path):
    flags = [*shared, f"--output={tmp_path}"]
    assert program(*TORCHRUN, KILLED, "step:5", *flags, "--batch-size=8").returncode != 0
    np.testing.assert_allclose(losses(tmp_path), losses(one)[:5], atol=1e-4)
    run(*flags, "--batch-size=16", "--resume")
    assert_same(tmp_path, one)


@pytest.mark.slow
def test_fsdp_and_its_resume(shared, one, tmp_path):
    flags = [*shared, "--batch-size=8", "--fsdp", f"--output={tmp_path}"]
    assert program(*TORCHRUN, KILLED, "step:5", *flags).returncode != 0
    assert (tmp_path / "checkpoints" / "step-4" / ".metadata").is_file()
    succeeded(program(*TORCHRUN, PROGRAM, *flags, "--resume"))
    assert_same(tmp_path, one)
    with pytest.raises(ValueError, match="--resume: --fsdp was True, now False"):
        run(*shared, "--batch-size=16", f"--output={tmp_path}", "--resume")


@pytest.mark.slow
def test_fsdp_of_blocks_in_stages(shared, tmp_path):
    flags = [*shared, "--model=senatra_mini_64", "--epochs=1", "--save-every-n-steps=0"]
    one = run(*flags, "--batch-size=16", f"--output={tmp_path}/one")
    succeeded(program(*TORCHRUN, PROGRAM, *flags, "--fsdp", "--batch-size=8", f"--output={tmp_path}/two"))
    assert_same(tmp_path / "two", one, steps=3)


LAYOUTS = {
    "similarity": ["boundary=similarity"],
    "entropy": ["boundary=entropy"],  # its running threshold is the mean over all ranks
    "two depths, drawn": ["compression=(2.0,2.0)", "pool_after=(1,2)", "sampling=gumbel"],
    "elastic": ["elastic=(2.0,8.0)"],
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_to_cut_is_the_same_by_two_processes(layout, shared, tmp_path):
    """Three steps: weights and buffers, and what an evaluation of them gives."""
    flags = [*shared, "--epochs=1", "--save-every-n-steps=0", "--model-kwargs", *LAYOUTS[layout]]
    one = run(*flags, "--batch-size=16", f"--output={tmp_path}/one")
    succeeded(program(*TORCHRUN, PROGRAM, *flags, "--batch-size=8", f"--output={tmp_path}/two"))
    assert_same(tmp_path / "two", one, steps=3)


@pytest.mark.slow
def test_evaluation_by_ranks_of_which_one_has_nothing(data, tmp_path):
    """DistributedDataParallel sends batch norm's buffers around in the first forward: a rank without one would be waited for."""
    write_tar(tmp_path / "val.tar", samples(1))
    flags = [
        "--model=resnet10t",
        "--img-size=64",
        f"--train-data={data}/shards",
        f"--val-data={tmp_path}/val.tar",
        *SHORT,
    ]
    flags += [f"--classes={data}/shards/names.txt", "--batch-size=12", "--epochs=1", f"--output={tmp_path}/out"]
    succeeded(program(*TORCHRUN, PROGRAM, *flags))
    assert rows(tmp_path / "out", "epochs")[0]["val_images"] == 1


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all(data, tmp_path):
    """A label out of range is met by one rank, while the other waits for its gradients."""
    write_tar(tmp_path / "0.tar", samples(24))
    write_tar(tmp_path / "1.tar", [*samples(23), (samples(1)[0][0], 77)], first=100)
    flags = [f"--train-data={tmp_path}", f"--classes={data}/shards/names.txt", "--train-num-samples=48", *SHORT]
    flags += [f"--model={MODEL}", "--batch-size=8", "--epochs=1", "--shuffle-buffer=1", f"--output={tmp_path}/out"]
    result = program(*TORCHRUN, PROGRAM, *flags)
    assert result.returncode != 0
    assert re.search(r"train_imagenet.py: error: 1.tar: 00123: label 77, but there are 6 classes", result.stderr)


def test_nodes_that_do_not_share_the_output_are_told(tmp_path, monkeypatch):
    """What the processes saw is gathered; here by hand, as two disks would show it."""
    monkeypatch.setattr("llava_drip.classification.run.gather_object", lambda seen: [*seen, "step-4"])
    args = parsed(f"--model={MODEL}", "--train-data=x", f"--output={tmp_path}", "--resume")
    with pytest.raises(ValueError, match=r"--output: the processes see different checkpoints .*\(None, step-4\)"):
        _checkpoint_to_resume(args, tmp_path)
