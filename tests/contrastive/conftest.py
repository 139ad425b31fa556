"""A small image-text data set and one training run over it, shared by the tests of this folder."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from clip_helpers import COLOURS, MODEL, SHORT, picture, run_program, write_tar


@pytest.fixture(autouse=True)
def calm(one_thread):
    """Every test here runs on one thread."""


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """train-{0,1}.tar of 24 image-caption pairs each, and cls-{0,1}.tar of 10 labelled pictures each."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    colours = list(COLOURS)
    for shard in range(2):
        pairs, labelled = {}, {}
        for i in range(24):
            colour = colours[i % 5]
            pairs[f"{shard}{i:03}.jpg"] = picture(rng, colour)
            pairs[f"{shard}{i:03}.txt"] = f"a {colour} square".encode()
        for i in range(10):
            labelled[f"{shard}{i:03}.jpg"] = picture(rng, colours[i % 5])
            labelled[f"{shard}{i:03}.cls"] = str(i % 5).encode()
        write_tar(folder / f"train-{shard}.tar", pairs)
        write_tar(folder / f"cls-{shard}.tar", labelled)
    return folder


@pytest.fixture(scope="session")
def pictures(data, tmp_path_factory) -> Path:
    """A table of the 24 pairs of train-0.tar, with their pictures beside it."""
    folder, rows = tmp_path_factory.mktemp("pictures"), ["filepath\ttitle"]
    with tarfile.open(data / "train-0.tar") as tar:
        tar.extractall(folder, filter="data")
    for image in sorted(folder.glob("*.jpg")):
        rows.append(f"{image}\t{image.with_suffix('.txt').read_text()}")
    (folder / "pairs.csv").write_text("\n".join(rows))
    return folder / "pairs.csv"


@pytest.fixture(scope="session")
def training_flags(data) -> list[str]:
    shards = str(data / "train-{0..1}.tar")
    return [f"--model={MODEL}", f"--train-data={shards}", "--train-num-samples=48", "--batch-size=8", *SHORT]


@pytest.fixture(scope="session")
def run(data, training_flags, tmp_path_factory) -> Path:
    """The folder of a run of scripts/train_clip.py: one epoch of six steps."""
    logs = tmp_path_factory.mktemp("logs")
    result = run_program("scripts/train_clip.py", *training_flags, f"--logs={logs}", "--name=run", "--epochs=1")
    assert result.returncode == 0, result.stderr[-3000:]
    return logs / "run"
