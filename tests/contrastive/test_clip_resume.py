"""A killed run goes on as if it had not been: the losses that follow are those of the uninterrupted one, to the last bit."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from clip_helpers import MODEL, SHORT, process_of
from killed_run import train_until
from safetensors.torch import load_file

from llava_drip.contrastive import adapter
from llava_drip.contrastive.checkpoint import WEIGHTS_NAME
from llava_drip.contrastive.resume import check_settings, newest
from llava_drip.contrastive.train import TrainingError, train


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(run: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["lr"], row["compression"]) for row in rows(run / "steps.jsonl")]


@pytest.fixture(scope="module")
def flags(data) -> list[str]:
    """Two epochs of six steps, every step written down, a checkpoint after steps 4, 8 and 12."""
    shards = [f"--train-data={data}/train-{{0..1}}.tar", "--train-num-samples=48", "--batch-size=8", "--epochs=2"]
    return [
        f"--model={MODEL}",
        *shards,
        *SHORT,
        "--log-every-n-steps=1",
        "--save-every-n-steps=4",
        "--shuffle-buffer=9",
    ]


@pytest.fixture(scope="module")
def whole_runs(flags, tmp_path_factory):
    """workers → the uninterrupted run, trained once."""
    logs, known = tmp_path_factory.mktemp("whole"), {}

    def run(workers: int) -> Path:
        if workers not in known:
            known[workers] = train([*flags, f"--workers={workers}", f"--logs={logs}", f"--name={workers}"])
        return known[workers]

    return run


def killed(step: int, flags: list[str]) -> None:
    process = process_of(train_until, step, flags)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


# Killed before any checkpoint, within an epoch, after the first epoch's end, within the second.
@pytest.mark.parametrize(
    "workers, step",
    [(0, 5), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((1, 7), (0, 2), (2, 5), (2, 11)))],
)
def test_after_a_kill(workers, step, flags, whole_runs, tmp_path):
    flags = [*flags, f"--workers={workers}", f"--logs={tmp_path}"]
    whole = whole_runs(workers)
    killed(step, [*flags, "--name=killed"])
    assert curve(tmp_path / "killed") == curve(whole)[:step]
    run = train([*flags, "--name=killed", "--resume=latest"])
    assert [row["step"] for row in rows(run / "steps.jsonl")] == list(range(1, 13))
    assert curve(run) == curve(whole)
    for mine, theirs in zip(rows(run / "epochs.jsonl"), rows(whole / "epochs.jsonl"), strict=True):
        for name in ("epoch", "step", "loss", "tokens", "compression", "compression_p5", "compression_eval", "skipped"):
            assert (
                mine[name] == pytest.approx(theirs[name], rel=1e-12) if name == "loss" else mine[name] == theirs[name]
            )
    before, after = (torch.load(r / "checkpoints" / "epoch_2.pt", weights_only=True) for r in (whole, run))
    assert all(torch.equal(before["state_dict"][name], value) for name, value in after["state_dict"].items())
    assert "Train Epoch: 1 [48/48 (100%)]" in (run / "out.log").read_text()


@pytest.mark.parametrize("where", [pytest.param("epoch_1.pt", marks=pytest.mark.slow), "step_latest.pt"])
def test_accumulation(where, flags, tmp_path):
    """From an epoch's checkpoint, and with --accum-freq from between the steps of one."""
    flags = [*flags, "--batch-size=4", "--accum-freq=2", f"--logs={tmp_path}"]
    whole = train([*flags, "--name=whole"])
    step = 7 if where == "epoch_1.pt" else 11
    killed(step, [*flags, "--name=killed"])
    folder = tmp_path / "killed" / "checkpoints"
    if where == "epoch_1.pt":
        (folder / "step_latest.pt").unlink()
    assert newest(folder).name == where
    assert curve(train([*flags, "--name=killed", "--resume=latest"])) == curve(whole)


@pytest.mark.slow
def test_csv(flags, tmp_path, pictures):
    flags = [flag for flag in flags if not flag.startswith(("--train-", "--shuffle"))]
    flags += [f"--train-data={pictures}", "--workers=1", "--save-every-n-steps=1", f"--logs={tmp_path}"]
    whole = train([*flags, "--name=whole"])
    killed(5, [*flags, "--name=killed"])  # three steps an epoch
    assert curve(train([*flags, "--name=killed", "--resume=latest"])) == curve(whole)


def test_most_recent_checkpoints_are_found(flags, whole_runs, tmp_path):
    flags = [*flags, "--save-most-recent", "--save-frequency=0", f"--logs={tmp_path}"]
    whole = whole_runs(0)
    for step in (5, 7):  # with step_latest.pt alone, with an epoch_latest.pt that is newer
        killed(step, [*flags, f"--name=killed-{step}"])
        run = train([*flags, f"--name=killed-{step}", "--resume=latest"])
        assert curve(run) == curve(whole)
        assert (run / "checkpoints" / "epoch_latest.pt").is_file()


def test_weights_are_never_older_than_the_last_checkpoint(flags, tmp_path, monkeypatch):
    """Else a run that was killed between the two has nothing left to do, and its folder holds another epoch's weights."""
    flags = [*flags, "--epochs=1", "--save-every-n-steps=3", f"--logs={tmp_path}", "--name=run"]
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "write_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(flags)
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_latest.pt"]
    train([*flags, "--resume=latest"])
    state = torch.load(run / "checkpoints" / "epoch_1.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], value) for name, value in load_file(run / WEIGHTS_NAME).items())


def test_newest(tmp_path):
    assert newest(tmp_path) is None
    for name in ("epoch_2.pt", "epoch_10.pt", "epoch_11.pt.partial"):
        (tmp_path / name).touch()
    assert newest(tmp_path).name == "epoch_10.pt"
    for epoch, best in ((9, "epoch_10.pt"), (10, "step_latest.pt"), (11, "step_latest.pt")):
        torch.save({"epoch": epoch}, tmp_path / "step_latest.pt")
        assert newest(tmp_path).name == best
    (tmp_path / "step_latest.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"step_latest.pt: not a training checkpoint .* delete it"):
        newest(tmp_path)


@pytest.fixture(scope="module")
def short_run(flags, tmp_path_factory) -> Path:
    """One epoch, to be copied and resumed."""
    return train([*flags, "--epochs=1", f"--logs={tmp_path_factory.mktemp('short')}", "--name=run"])


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--seed=1", "--seed: the run to resume has 0, now 1"),
        ("--lr=2e-3", "--lr: the run to resume has 0.001, now 0.002"),
        ("--batch-size=16", "--batch-size: the run to resume has '8 over all ranks', now '16 over all ranks'"),
        ("--accum-freq=2", "--accum-freq: "),
        ("--workers=2", "--workers: "),
        ("--data-streams=2", "--data-streams: the run to resume has 1, now 2"),
        ("--train-num-samples=40", "--train-num-samples: "),
        ("--shuffle-buffer=8", "--shuffle-buffer: "),
        ("--train-data={data}/train-0.tar", "--train-data: "),
        ("--boundary-loss-weight=2", "--boundary-loss-weight: "),
        ("--epochs=2", r"--epochs: .* another from the start \(cosine\)"),
    ],
)
def test_what_would_go_on_otherwise_is_refused(flag, message, data, short_run, flags, tmp_path):
    run = shutil.copytree(short_run, tmp_path / "run")
    before = (run / "steps.jsonl").read_bytes()
    with pytest.raises(TrainingError, match=message) as error:
        train([*flags, "--epochs=1", f"--logs={tmp_path}", "--name=run", "--resume=latest", flag.format(data=data)])
    assert "\n" not in str(error.value)
    assert (run / "steps.jsonl").read_bytes() == before


def test_more_epochs_where_the_rate_does_not_depend_on_their_number():
    from argparse import Namespace  # what check_settings reads is what the parser gives

    from llava_drip.contrastive import arguments, resume

    def args(*flags: str) -> Namespace:
        parsed = arguments.parse([f"--model={MODEL}", "--dataset-type=synthetic", *flags])
        parsed.world_size = 1
        return parsed

    for schedule, epoch, good in (
        (["--lr-scheduler=const"], 4, True),
        (["--skip-scheduler"], 4, True),
        (["--lr-scheduler=const-cooldown", "--epochs-cooldown=2"], 1, True),
        (["--lr-scheduler=const-cooldown", "--epochs-cooldown=2"], 3, False),
        ([], 1, False),
    ):
        recorded = resume.settings_of(args(*schedule, "--epochs=4"))
        if good:
            check_settings(recorded, args(*schedule, "--epochs=8"), epoch)
        else:
            with pytest.raises(ValueError, match="--epochs"):
                check_settings(recorded, args(*schedule, "--epochs=8"), epoch)


def test_checkpoints_from_before_these_records(short_run, flags, tmp_path):
    """An epoch's checkpoint as open_clip itself writes it still loads, and the steps go on from its epoch."""
    run = shutil.copytree(short_run, tmp_path / "run")
    path = run / "checkpoints" / "epoch_1.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["llava_drip"]
    torch.save(checkpoint, path)
    (run / "checkpoints" / "step_latest.pt").unlink()
    train([*flags, "--epochs=2", f"--logs={tmp_path}", "--name=run", "--resume=latest"])
    assert [row["step"] for row in rows(run / "steps.jsonl")] == list(range(1, 13))
