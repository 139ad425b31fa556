"""Two ranks that share a global batch have the loss curve of one process, and go on after a kill as one would."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from clip_helpers import SHORT, in_two_ranks
from killed_run import train_until

from llava_drip.contrastive.train import train

GATHER = {"local": ["--local-loss", "--gather-with-grad"], "default": [], "with-grad": ["--gather-with-grad"]}


def rows(run: Path, name: str = "steps.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def flags_of(model: str, data: Path, logs: Path, *more: str) -> list[str]:
    shards = [f"--train-data={data}/train-{{0..1}}.tar", "--train-num-samples=48", "--data-streams=2", "--epochs=2"]
    return [f"--model={model}", *shards, *SHORT, "--log-every-n-steps=1", f"--logs={logs}", *more]


def test_whole_gradients_matter(data, tmp_path):
    """A check of the check: what two ranks must agree with moves far more than the tolerance."""
    run = train(flags_of("DRIP-mini-8-4x", data, tmp_path, "--name=one", "--batch-size=16"))
    losses = [row["loss"] for row in rows(run)]
    assert max(losses) - min(losses) > 0.05


@pytest.mark.parametrize(
    "model, gather, workers, accum",
    [
        pytest.param("DRIP-mini-8-4x", "local", 0, 1, marks=pytest.mark.slow),
        ("DRIP-mini-8-4x", "default", 0, 2),
        pytest.param("DRIP-mini-8-4x", "with-grad", 1, 1, marks=pytest.mark.slow),
        pytest.param("DRIP-mini-8-1x", "local", 1, 1, marks=pytest.mark.slow),
        pytest.param("DRIP-mini-8-1x", "default", 0, 1, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_have_the_losses_of_one(model, gather, workers, accum, data, tmp_path):
    flags = flags_of(model, data, tmp_path, f"--workers={workers}", f"--accum-freq={accum}")
    one = train([*flags, "--name=one", f"--batch-size={16 // accum}"])
    two = [*flags, "--name=two", f"--batch-size={8 // accum}", *GATHER[gather]]
    assert in_two_ranks(train, two) == [0, 0]
    two = tmp_path / "two"
    assert len(rows(one)) == 6
    for ours, theirs in zip(rows(two), rows(one), strict=True):
        for name in set(theirs) - {"lr", "step", "epoch"}:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), (name, theirs["step"])
        assert (ours["lr"], ours["step"]) == (theirs["lr"], theirs["step"])
    for ours, theirs in zip(rows(two, "epochs.jsonl"), rows(one, "epochs.jsonl"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["compression_p5"] == theirs["compression_p5"] and ours["tokens"] == pytest.approx(theirs["tokens"])


@pytest.mark.slow
def test_ranks_resume_and_change_their_number(data, tmp_path):
    """Two ranks, killed; resumed by two, and by one with the whole batch: the curve of one uninterrupted process."""
    flags = flags_of("DRIP-mini-8-4x", data, tmp_path, "--save-every-n-steps=1")
    one = train([*flags, "--name=one", "--batch-size=16"])
    two = ["--name=two", "--batch-size=8", "--local-loss", "--gather-with-grad"]
    assert in_two_ranks(train_until, 2, [*flags, *two])[0] == -signal.SIGKILL
    assert [row["step"] for row in rows(tmp_path / "two")] == [1, 2]
    assert in_two_ranks(train_until, 5, [*flags, *two, "--resume=latest"])[0] == -signal.SIGKILL
    run = train([*flags, "--name=two", "--batch-size=16", "--resume=latest"])
    for ours, theirs in zip(rows(run), rows(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    first = rows(run, "epochs.jsonl")[0]
    assert first["tokens"] == pytest.approx(rows(one, "epochs.jsonl")[0]["tokens"])  # of both ranks, counted once
