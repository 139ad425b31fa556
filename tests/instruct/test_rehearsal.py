"""The program that kills a training run and resumes it: what it finds equal, what it does not, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from llava_drip.instruct.rehearsal import Kill, Recovery, Rehearsal, changed_parts, losses_of, rehearse, weights_apart
from llava_drip.instruct.rehearsal_table import table_of

from .conftest import REPOSITORY, SCRIPTS, common, environment, parts


def write(directory, name="model.safetensors", **tensors):
    directory.mkdir(exist_ok=True)
    save_file({key: torch.as_tensor(value) for key, value in tensors.items()}, directory / name)
    return directory


def test_weights_that_differ_are_seen_wherever_they_lie(tmp_path):
    a = write(tmp_path / "a", "model-1.safetensors", x=[1.0, 2.0])
    write(a, "model-2.safetensors", y=[3.0])
    b = write(tmp_path / "b", x=[1.0, 2.0], y=[3.5])
    assert weights_apart(a, a) == 0 and weights_apart(a, b) == 0.5
    assert weights_apart(a, write(tmp_path / "c", x=[1.0, 2.0])) == math.inf, "a tensor less"
    assert weights_apart(a, write(tmp_path / "d", x=[1.0, 2.0], y=[3.0, 3.0])) == math.inf, "another shape"
    nan = write(tmp_path / "e", x=[1.0, 2.0], y=[float("nan")])
    assert weights_apart(a, nan) == math.inf and weights_apart(nan, nan) == math.inf
    with pytest.raises(ValueError, match="empty: no weights in it"):
        (tmp_path / "empty").mkdir()
        weights_apart(a, tmp_path / "empty")


def test_changed_tensors_are_counted_by_part(tmp_path):
    keys = ("vision_tower.a", "multi_modal_projector.b", "base.language_model.c", "base.language_model.d")
    start = write(tmp_path / "start", **dict.fromkeys(keys, [0.0]))
    moved = dict.fromkeys(keys, [0.0]) | {keys[1]: [1.0], keys[3]: [1.0]}
    result = write(tmp_path / "result", **moved)
    found = changed_parts(start, result)
    assert found == {"vision_tower": (0, 1), "multi_modal_projector": (1, 1), "language_model": (1, 2)}


def test_a_run_that_is_not_the_same_is_not_called_exact():
    same = Recovery("after step 3", 2, ["checkpoint-2"], 0.0, 0.0, 0.0)
    other = Recovery("while checkpoint-2 is written", 0, [], 0.0, 0.0, 1e-7)
    assert same.exact and not other.exact
    table = table_of(Rehearsal(["c"], [3.0, 1.0], 1.0, {"multi_modal_projector": (2, 2)}, [same, other]))
    assert "multi_modal_projector 2 of 2" in table
    assert "| after step 3 | 2 | step 2 | 0 | 0 | 0 |" in table
    assert "| while checkpoint-2 is written | none | the beginning | 0 | 0 | 1e-07 |" in table


def test_losses_of_every_step_are_needed(tmp_path):
    state = {"global_step": 4, "log_history": [{"loss": 1.0}, {"loss": 0.5}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="2 losses of 4 steps; give --logging_steps 1"):
        losses_of(tmp_path)


def test_a_command_that_fails_shows_what_it_said(tmp_path):
    with pytest.raises(ValueError, match="--output_dir stands in the command"):
        rehearse(["python", "x.py", "--output_dir=there"], [Kill(1)], tmp_path)
    with pytest.raises(ValueError, match="ended with 2.*whole.log(.|\n)*No such file"):
        rehearse(["python", str(tmp_path / "missing.py")], [Kill(1)], tmp_path)


def test_a_killed_run_is_resumed_and_compared(tiny_language_model, tiny_tower, tiny_world, tmp_path):
    """Killed amid its first checkpoint: of what is left nothing is whole, or the checkpoint is."""
    made = parts(tiny_language_model, tiny_tower, tmp_path)
    command = [sys.executable, REPOSITORY / "scripts" / SCRIPTS["pretrain"], *made[:4]]  # all but --output_dir
    command += ["--data_path", tiny_world.caption_train, "--image_folder", tiny_world.images, *common(4, 6)]
    command += ["--save_strategy", "steps", "--save_steps", "2", "--version", "plain"]
    program = [
        sys.executable,
        REPOSITORY / "scripts" / "rehearse.py",
        "--kill_saving",
        "4",
        "--output",
        tmp_path / "out",
    ]
    done = subprocess.run([*program, "--", *command], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "rehearsal.json").read_text())
    (recovery,) = found["recoveries"]
    assert recovery["resumed_from"] in (2, 4) and "checkpoint-4" in recovery["left"]
    assert recovery["all_losses"] == 0 and recovery["weights"] == 0
    changed = found["changed"]
    assert changed["vision_tower"][0] == changed["language_model"][0] == 0
    assert changed["multi_modal_projector"][0] == changed["multi_modal_projector"][1] > 0
    assert "while checkpoint-4 is written" in done.stdout
