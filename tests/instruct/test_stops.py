"""SIGTERM and Ctrl-C: a whole checkpoint, an exit code, and a run that goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from llava_drip.instruct.bad_images import BadImages
from llava_drip.instruct.checkpoints import lack_of, newest_complete
from llava_drip.instruct.stage import run_stage
from llava_drip.instruct.stops import ONE_PRESS, SIGNALS, Stopped, StopSignals, spare_worker
from llava_drip.instruct.watch import StepWatch

from .conftest import common, losses, parts, start, torchrun

STEPS = 8


def flags(language_model, tower, world, output: Path, batch: int, steps: int) -> list[str]:
    argv = [*parts(language_model, tower, output), "--data_path", world.caption_train, "--image_folder", world.images]
    return list(map(str, [*argv, *common(batch, steps), "--lr_scheduler_type", "constant"]))


def wait_for_line(process, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.communicate()[1][-3000:])


@pytest.fixture(scope="module")
def uninterrupted(tiny_language_model, tiny_tower, tiny_world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    run_stage("pretrain", flags(tiny_language_model, tiny_tower, tiny_world, output, 4, STEPS))
    return output


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_run_goes_on(
    number, uninterrupted, tiny_language_model, tiny_tower, tiny_world, tmp_path
):
    """Two data workers; the launcher's habit of sending the signal to them and again to the process is imitated. Checkpoints are
    due by epochs: the Trainer would write another over this one, at the end of an epoch that is broken off."""
    argv = [*flags(tiny_language_model, tiny_tower, tiny_world, tmp_path / "out", 4, STEPS), "--save_strategy", "epoch"]
    process = start("pretrain", *argv, "--dataloader_num_workers", 2)
    wait_for_line(process, f"SIGTERM (kill {process.pid}) or Ctrl-C: saves a checkpoint and stops")
    if number == signal.SIGINT:
        wait_for_line(process, "'loss'")
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(signal.SIGTERM)
    process.send_signal(number)
    process.send_signal(number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 128 + number, err[-3000:]
    checkpoint = newest_complete(tmp_path / "out")
    assert lack_of(checkpoint) is None and out.count("is written to") == 1
    assert (
        f"{number.name}: {checkpoint.name} is written to {tmp_path / 'out'}; the same command with --resume_from" in out
    )
    assert f"{number.name}: saving at the end of this step" in err and "Traceback" not in err
    assert not (tmp_path / "out" / "config.json").exists() and len(list(checkpoint.parent.glob("checkpoint-*"))) == 1
    made = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert 1 <= made < STEPS

    run_stage("pretrain", [*argv, "--resume_from_checkpoint", "latest"])
    assert losses(tmp_path / "out") == pytest.approx(losses(uninterrupted), abs=1e-5)
    one, other = (load_file(path / "mm_projector.safetensors") for path in (tmp_path / "out", uninterrupted))
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_torchrun_passes_it_on_and_all_ranks_stop_together(tiny_language_model, tiny_tower, tiny_world, tmp_path):
    """It sends the signal to each rank's process group: the data workers get it too."""
    argv = flags(tiny_language_model, tiny_tower, tiny_world, tmp_path / "out", 2, STEPS)
    process = torchrun("pretrain", 2, *argv, "--dataloader_num_workers", 1)
    wait_for_line(process, "'loss'")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert process.returncode, "torchrun's own, whatever its processes say"
    checkpoint = newest_complete(tmp_path / "out")
    assert out.count(f"SIGTERM: {checkpoint.name} is written") == 1 and "DataLoader worker" not in err, err[-3000:]
    assert (checkpoint / "rng_state_1.pth").is_file() and not (tmp_path / "out" / "config.json").exists()
    sealed = (checkpoint / "trainer_state.json").stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= sealed for path in checkpoint.iterdir()), "what says that it is whole, last"


def test_a_second_signal_ends_the_process_at_once():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stops = StopSignals()
    with pytest.raises(SystemExit) as end, stops.caught():
        for _ in range(2):  # one press of a key, passed on by a launcher
            os.kill(os.getpid(), signal.SIGTERM)
        assert stops.received == signal.SIGTERM
        stops.since -= ONE_PRESS
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        raise AssertionError("it goes on")
    assert end.value.code == 143 and not isinstance(end.value, Stopped)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    stops = StopSignals()
    with pytest.raises(KeyboardInterrupt), stops.caught():
        os.kill(os.getpid(), signal.SIGTERM)
        stops.since -= ONE_PRESS
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_the_ranks_agree_in_the_sum_of_the_step():
    stops = StopSignals()
    for sums, agreed in (([0, 0], 0), ([0, 1], signal.SIGINT), ([1, 2], signal.SIGTERM)):
        stops.count(sums)
        assert stops.agreed == agreed
    watch = StepWatch(BadImages(0.01), fp16=False, stops=stops)
    for number in (0, *SIGNALS):
        stops.received = number
        watch.begin(1, [{"labels": torch.tensor([[1]])}], [["row 3"]], [])
        watch.look(torch.tensor(1.0))
        assert stops.agreed == number


class Slow(Dataset):
    """Each item comes after a while, and says who made it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> int:
        if i == 0:
            spare_worker()
        time.sleep(0.2)
        return os.getpid()


def test_a_data_worker_outlives_one_signal_and_ends_with_its_loader():
    made = iter(DataLoader(Slow(), batch_size=1, num_workers=1, prefetch_factor=1))
    worker = int(next(made))
    os.kill(worker, signal.SIGTERM)
    os.kill(worker, signal.SIGINT)
    assert [int(pid) for pid in made] == [worker] * 3
    made = iter(DataLoader(Slow(), batch_size=1, num_workers=1, prefetch_factor=1))
    worker = psutil.Process(int(next(made)))
    del made
    assert worker.wait(timeout=30) is not False and not worker.is_running()
