"""One set of pictures in the three formats, and the folder of a run over it, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .helpers import MODEL, SHORT, fresh, run, samples, write_folder, write_parquet, write_shards


@pytest.fixture(autouse=True)
def calm(one_thread):
    """Every test here runs on one thread, and leaves no state of accelerate's to the next."""
    yield
    fresh()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """train/, val/ (folders), shards/, val_shards/ (tars), train.parquet: 48 pictures to train, 22 to evaluate, 6 classes."""
    folder = tmp_path_factory.mktemp("imagenet")
    train, val = samples(48), samples(22, first=1000)
    write_folder(folder / "train", train)
    write_folder(folder / "val", val)
    write_shards(folder / "shards", train, 4)
    write_shards(folder / "val_shards", val, 3)
    write_parquet(folder / "train.parquet", train)
    return folder


@pytest.fixture(scope="session")
def flags(data) -> list[str]:
    """Two epochs of six steps of a mini tower, evaluated after each."""
    return [f"--train-data={data}/train", f"--val-data={data}/val", "--batch-size=8", "--epochs=2", *SHORT]


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory) -> Path:
    """A run of a mini DRIP from scratch, all pictures' crops large, six epochs."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs") / "drip"
    return run(f"--model={MODEL}", *flags, "--epochs=6", "--scale", "0.5", "1", f"--output={output}")
