"""The program that kills a training run and resumes it: what it finds equal, what it does not, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from llava_drip.fingerprint import fingerprint
from llava_drip.instruct.rehearsal import (
    Kill,
    Recovery,
    Rehearsal,
    bases_then_and_now,
    changed_parts,
    losses_of,
    rehearse,
    unmoving,
    weights_apart,
    weights_of,
)
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


def test_a_base_that_was_changed_is_seen(tmp_path):
    """A LoRA result has none of its base's tensors: that they stayed is for the fingerprint to say."""
    base = write(tmp_path / "base", w=[1.0])
    lora = write(tmp_path / "lora", "adapter_model.safetensors", **{"base_model.model.language_model.a.lora_A": [1.0]})
    own = {"base_model": str(base), "base_model_from_here": "../base", "kind": "assistant", "trained_on": {}}
    (lora / "base_model.json").write_text(json.dumps({**own, "fingerprint": fingerprint(base)}))
    kept = Rehearsal(["c"], [3.0], 1.0, changed_parts(lora, lora), bases=bases_then_and_now(lora))
    assert kept.exact and f"Its base {base}: not changed" in table_of(kept)
    write(tmp_path / "base", w=[2.0])
    broken = Rehearsal(["c"], [3.0], 1.0, {}, bases=bases_then_and_now(lora))
    assert not broken.exact and f"Its base {base}: CHANGED" in table_of(broken)
    assert bases_then_and_now(base) == {}


def test_tensors_of_a_result_without_its_base(tmp_path):
    alone = write(tmp_path / "alone", "mm_projector.safetensors", **{"0.weight": [1.0]})
    write(alone, "frozen_parts.safetensors", **{"vision_tower.a": [1.0]})
    assert weights_of(alone).keys() == {"multi_modal_projector.0.weight", "vision_tower.a"}
    write(alone, "adapter_model.safetensors", **{"base_model.model.multi_modal_projector.0.weight": [1.0]})
    assert weights_of(alone).keys() == {"base_model.model.multi_modal_projector.0.weight", "vision_tower.a"}


def test_a_learning_rate_of_the_projector_is_held_too(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lora_enable: true\nmm_projector_lr: 2.0e-5\n")
    held = ["--mm_projector_lr", "0"]
    for command in (["--mm_projector_lr", "1"], ["--mm_projector_lr=1"], [str(recipe)]):
        assert unmoving(["python", "x.py", *command])[-2:] == held
    recipe.write_text("lora_enable: true\n")
    assert held[0] not in unmoving(["python", "x.py", str(recipe), "--lora_r", "4"])


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


@pytest.mark.slow
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
