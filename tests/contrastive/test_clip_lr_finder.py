"""scripts/lr_finder.py clip on made pictures: what it writes, that it trains as train_clip.py does, and what it refuses."""

from __future__ import annotations

import json
import logging
import math
import runpy
import sys
import tempfile
from pathlib import Path

import pytest
from clip_helpers import MODEL, ROOT, SHORT
from PIL import Image

from llava_drip.contrastive.lr_finder import range_test
from llava_drip.contrastive.train import TrainingError, train
from llava_drip.training.range_test import RangeTest

STILL = 1e-30  # a rate that moves no weight


@pytest.fixture(scope="module")
def flags(data) -> list[str]:
    shards = [f"--train-data={data}/train-{{0..1}}.tar", "--train-num-samples=48"]
    return [f"--model={MODEL}", *shards, *SHORT, "--batch-size=8"]


@pytest.fixture(scope="module")
def still(flags) -> tuple[RangeTest, str]:
    """20 steps that move nothing."""
    return range_test(flags, STILL, 2 * STILL, 20, 0.9)


def program(monkeypatch, *argv: object) -> int:
    """Exit code of the program, run in this process."""
    monkeypatch.setattr(sys, "argv", ["lr_finder.py", "clip", *map(str, argv)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "lr_finder.py"), run_name="__main__")
    return end.value.code


def test_the_program(data, tmp_path, monkeypatch, capfd):
    """With a recipe for training: what it says of schedule, evaluation and saving has no effect."""
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\nwhite\nblack\n")
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(
        f"model: {MODEL}\ndataset-type: webdataset\ntrain-num-samples: 48\nbatch-size: 8\nworkers: 1\ndevice: cpu\n"
        f"precision: fp32\nlr: 0.5\nwarmup: 100\nepochs: 300\nlr-scheduler: const-cooldown\nepochs-cooldown: 2\n"
        f"skip-scheduler: true\nsave-frequency: 1\nsave-most-recent: true\nsave-every-n-steps: 1\nresume: latest\n"
        f"report-to: tensorboard\nname: run\nzeroshot-data: {data}/none\nzeroshot-classes: {tmp_path}/names.txt\n"
        f"retrieval-data: {data}/none.tar\nretrieval-split: val\nval-data: {data}/none.tar\nimagenet-val: {data}/none\n"
    )
    output.mkdir()
    range_flags = ["--steps=60", "--start-lr=1e-5", "--end-lr=1", f"--output={output}/lr"]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = program(monkeypatch, recipe, f"--train-data={data}/train-{{0..1}}.tar", *range_flags)
    printed = capfd.readouterr()
    assert code == 0, printed.err[-3000:]

    found = json.loads((output / "lr.json").read_text())
    lrs, losses = found["lrs"], found["losses"]
    assert len(lrs) == len(losses) <= 60 and lrs[0] == 1e-5 and lrs[1] / lrs[0] == pytest.approx(1e5 ** (1 / 59))
    assert (
        math.log(8) - 0.3 < losses[0] < math.log(8) + 2
    )  # of 8 pairs, and five times a rate loss and what pooling loses
    assert 1e-5 < found["steepest"] < 0.1
    assert min(found["smoothed"]) < losses[0] - 0.2
    with Image.open(output / "lr.png") as plot:
        assert plot.width > 500
    assert f"steepest descent: {found['steepest']:.2e}" in printed.out and f"{output}/lr.png" in printed.out
    assert "Train Epoch" not in printed.out + printed.err
    assert sorted(path.name for path in output.iterdir()) == ["lr.json", "lr.png"]
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("pymp-")}  # of data workers
    assert left == {"names.txt", "out", "recipe.yaml"}  # nothing of the run itself


def test_its_losses_are_those_of_training(still, flags, tmp_path):
    """At rates that move nothing, so that the two schedules are one; beyond an epoch's end too."""
    run = train([*flags, f"--lr={STILL}", "--log-every-n-steps=1", "--epochs=4", f"--logs={tmp_path}", "--name=run"])
    steps = [json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text().splitlines()]
    result, title = still
    assert len(steps) == 24 and result.losses == pytest.approx(steps[:20], rel=1e-6)
    assert title == f"{MODEL}, train-{{0..1}}.tar, batch 8"
    assert result.steepest is None and result.notes


def test_accumulation_is_one_step_of_the_whole_batch(still, flags):
    result, title = range_test([*flags, "--batch-size=4", "--accum-freq=2"], STILL, 2 * STILL, 20, 0.9)
    assert title.endswith("batch 8") and len(result.losses) == 20
    # The same pairs, and other noise at the boundaries.
    assert sum(result.losses) / 20 == pytest.approx(sum(still[0].losses) / 20, abs=0.05)


@pytest.mark.slow
def test_it_ends_where_the_loss_diverges(flags):
    """The dense tower; steps of one epoch each. Training's own logging is left as it was."""
    handlers, disabled = list(logging.root.handlers), logging.root.manager.disable
    more = ["--model=DRIP-mini-8-1x", "--train-num-samples=8", "--seed=1"]
    result, _ = range_test([*flags, *more], 1e-4, 1e4, 100, 0.9)
    assert result.diverges is not None and 20 < len(result.lrs) < 100
    assert result.lrs[-1] == pytest.approx(1e-4 * 1e8 ** ((len(result.lrs) - 1) / 99))
    assert (handlers, disabled) == (list(logging.root.handlers), logging.root.manager.disable)


def test_synthetic_data_need_no_name():
    flags = [f"--model={MODEL}", "--dataset-type=synthetic", "--train-num-samples=16", *SHORT, "--batch-size=8"]
    assert range_test(flags, STILL, 2 * STILL, 20, 0.9)[1] == f"{MODEL}, synthetic, batch 8"


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--train-data=none.tar", "--train-data: no shard none.tar"),
        ("--model=nonsense", "--model: no model 'nonsense'"),
        ("--accum-freq=7", "epoch 0 had no training step"),
        ("--opt=nonsense", "nonsense"),
        ("--pretrained=nothing", "--pretrained: 'nothing' is neither"),
    ],
)
def test_a_mistake_is_named(flag, message, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(TrainingError if "--accum" in flag or "--opt" in flag else ValueError, match=message) as error:
        range_test([*flags, flag], 1e-5, 1, 20, 0.9)
    assert "\n" not in str(error.value) and not list(Path(tmp_path).iterdir())


def test_several_processes_are_refused(flags, monkeypatch):
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}.items():  # torchrun's
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="a range test is for one process; --accum-freq makes a step as large"):
        range_test(flags, 1e-5, 1, 20, 0.9)


@pytest.mark.parametrize("flag", ["--steps=19", "--output=none/lr", "--nonsense=1"])
def test_the_program_ends_in_one_line(flag, flags, tmp_path, monkeypatch, capfd):
    assert program(monkeypatch, *flags, f"--output={tmp_path}/lr", flag) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert flag.split("=")[0] in printed.err and not list(tmp_path.iterdir())
