"""A killed run goes on as if it had not been: the same losses, records and weights, with everything on that draws numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llava_drip.classification import checkpoint

from .helpers import MODEL, SHORT, killed, losses, rows, run, weights, without_times

EVERYTHING = ["--mixup=0.2", "--cutmix=1", "--smoothing=0.1", "--aa=rand-m9-mstd0.5-inc1", "--reprob=0.2"]
EVERYTHING += ["--model-ema", "--model-ema-decay=0.8", "--drop-path=0.1", "--grad-accum-steps=2", "--workers=1"]


@pytest.fixture(scope="module")
def everything(data) -> list[str]:
    """Two epochs of six steps of two batches, a checkpoint at every second step."""
    pictures = [
        f"--train-data={data}/train",
        f"--val-data={data}/val",
        "--batch-size=4",
        "--epochs=2",
        "--aug-repeats=2",
    ]
    return [f"--model={MODEL}", *pictures, *SHORT, *EVERYTHING, "--save-every-n-steps=2"]


@pytest.fixture(scope="module")
def whole(everything, tmp_path_factory) -> Path:
    """The run that nobody killed."""
    torch.set_num_threads(1)
    return run(*everything, f"--output={tmp_path_factory.mktemp('whole')}")


def assert_same(run: Path, whole: Path) -> None:
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(whole)]
    assert max(abs(a - b) for a, b in zip(losses(run), losses(whole), strict=True)) < 1e-6
    assert [row["lr"] for row in rows(run)] == [row["lr"] for row in rows(whole)]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(run)[name]), name
    for ours, theirs in zip(rows(run, "epochs"), rows(whole, "epochs"), strict=True):
        ours, theirs = without_times(ours), without_times(theirs)
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            expected = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
            assert ours[name] == expected, name


# Before the first checkpoint; within an epoch; in the second one; while a checkpoint is being written.
@pytest.mark.parametrize(
    "where, goes_on_at",
    [
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("step:1", None), ("step:11", 10))),
        ("step:5", 4),
        ("saving:10", 8),
    ],
)
def test_after_a_kill(where, goes_on_at, everything, whole, tmp_path):
    flags = [*everything, f"--output={tmp_path}/run"]
    killed(where, flags)
    last = checkpoint.newest(tmp_path / "run")
    assert (last and last.name) == (goes_on_at and f"step-{goes_on_at}")
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.partial"))) == (1 if "saving" in where else 0)
    output = run(*flags, "--resume")
    assert not list((output / "checkpoints").glob("*.partial"))
    assert_same(output, whole)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_shards_and_an_epoch_with_batches_to_spare(accumulate, data, tmp_path):
    """Killed in the second epoch, whose first batches must be read again; steps of 3 batches leave one of 4 over."""
    flags = [f"--model={MODEL}", f"--train-data={data}/shards", f"--classes={data}/shards/names.txt", *SHORT]
    flags += [f"--val-data={data}/val_shards", "--batch-size=12", "--epochs=2", "--workers=2", "--shuffle-buffer=5"]
    flags += [f"--grad-accum-steps={accumulate}", "--save-every-n-steps=1"]
    whole = run(*flags, f"--output={tmp_path}/whole")
    last = len(rows(whole))
    flags += [f"--output={tmp_path}/run"]
    killed(f"step:{last}", flags)
    assert_same(run(*flags, "--resume"), whole)


def test_a_finished_run_has_nothing_to_do(everything, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    run(*everything, f"--output={output}", "--resume")
    assert (output / "epochs.jsonl").read_bytes() == (whole / "epochs.jsonl").read_bytes()
    assert_same(output, whole)


def test_an_epoch_with_batches_to_spare_ends_once(everything, tmp_path):
    """Of 4 batches of 10 pictures 1 is left over by steps of 3: the loader stands within an epoch that is over."""
    flags = [*everything, "--batch-size=10", "--grad-accum-steps=3", "--save-every-n-steps=0", "--keep-checkpoints=9"]
    output = run(*flags, f"--output={tmp_path}/run")
    before = rows(output, "epochs")
    assert [row["step"] for row in before] == [1, 2]
    shutil.rmtree(output / "checkpoints" / "step-2")
    run(*flags, f"--output={output}", "--resume")
    assert list(map(without_times, rows(output, "epochs"))) == list(map(without_times, before))


REFUSED = {
    "--seed=1": "--resume: --seed was 0, now 1",
    "--lr=2e-3": "--resume: --lr was 0.001, now 0.002",
    "--mixup=0.3": "--resume: --mixup was 0.2, now 0.3",
    "--epochs=3": "--resume: --epochs was 2, now 3",
    "--aa=rand-m5": "--resume: --aa was rand-m9-mstd0.5-inc1, now rand-m5",
    "--batch-size=8": "--resume: a step had 8 pictures .*, now 16",
    "--no-model-ema": "--resume: --model-ema was True, now False",
    "--precision=bf16": "--resume: --precision was fp32, now bf16",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_another_run_is_refused(flag, everything, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in output.glob("*.json*")}
    with pytest.raises(ValueError, match=REFUSED[flag]):
        run(*everything, f"--output={output}", "--resume", flag)
    assert {path: path.read_bytes() for path in output.glob("*.json*")} == before


def test_how_a_run_is_run_may_change(everything, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(output / "checkpoints" / "step-12")
    free = ["--workers=0", "--log-every-n-steps=1", "--save-every-n-steps=0", "--keep-checkpoints=1"]
    assert_same(run(*everything, f"--output={output}", "--resume", *free), whole)
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-12"]


def test_without_resume_an_earlier_run_is_left_alone(everything, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run; give --resume"):
        run(*everything, f"--output={output}")
    shutil.rmtree(output / "checkpoints")
    with pytest.raises(ValueError, match="holds the records of an earlier run"):
        run(*everything, f"--output={output}")
    assert (output / "epochs.jsonl").read_bytes() == (whole / "epochs.jsonl").read_bytes()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "trainer.json"])
def test_a_damaged_checkpoint_is_named(file, everything, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    path = output / "checkpoints" / "step-12" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="--resume: .*step-12 cannot be read.*remove it to go on from the one before"):
        run(*everything, f"--output={output}", "--resume")
    shutil.rmtree(path.parent)
    assert_same(run(*everything, f"--output={output}", "--resume"), whole)


def test_changed_data_are_noticed(data, everything, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    pictures = shutil.copytree(data / "train", tmp_path / "train")
    record = json.loads((output / "run.json").read_text())
    record["flags"]["train_data"] = str(pictures)
    (output / "run.json").write_text(json.dumps(record))
    flags = [*everything, f"--train-data={pictures}", f"--output={output}", "--resume"]
    shutil.copytree(pictures / "red_ellipse", pictures / "yellow")
    with pytest.raises(ValueError, match="--resume: --train-data has other classes now"):
        run(*flags, f"--val-data={pictures}")
    shutil.rmtree(pictures / "yellow")
    for i in range(8):
        shutil.copy(next((pictures / "red_ellipse").iterdir()), pictures / "red_ellipse" / f"new{i}.jpg")
    with pytest.raises(ValueError, match="--resume: an epoch had 6 steps, now 7: --train-data has changed"):
        run(*flags)
