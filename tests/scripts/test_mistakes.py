"""A mistake on the command line is one line on stderr that names it, and an exit code other than 0."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys

import pytest

ZERO_SHOT = "eval/zero_shot.py --model DRIP-mini-8-4x --checkpoint none.pt --data none --classes README.md"
PROGRAMS = {
    "scripts/train_clip.py --foo 1": "train_clip.py: error: unrecognized arguments: --foo 1",
    f"{ZERO_SHOT} --foo": "zero_shot.py: error: unrecognized arguments: --foo",
    "scripts/measure_towers.py": "measure_towers.py: error: give TOWERs to measure, or --presets",
    "scripts/measure_towers.py resnet18 no_such_tower --rounds 0": "no_such_tower: neither a tower directory nor a model name",
}
MORE = {
    "scripts/train_clip.py --model DRIP-mini-8-4x --batch-size many": "argument --batch-size: invalid int value: 'many'",
    "scripts/train_clip.py --boundary-loss-weight much": "--boundary-loss-weight: invalid float value: 'much'",
    f"{ZERO_SHOT} --device quantum": "zero_shot.py: error: device quantum: not available here",
    f"{ZERO_SHOT} --batch-size 0": "zero_shot.py: error: --batch-size 0: must be at least 1",
    ZERO_SHOT: "none.pt: no such checkpoint",
    "scripts/measure_assistant.py": "measure_assistant.py: error: the following arguments are required: --lengths",
    "scripts/measure_assistant.py --lengths a b c": "--lengths: 3 files for 2 stages; give one, or one a stage",
    "scripts/measure_assistant.py --lengths a --batch_size 0": "--batch_size 0: must be at least 1",
    "scripts/measure_assistant.py --lengths a --compressions 4 0.5": "--compressions [4.0, 0.5]: must be at least 1",
    "scripts/measure_assistant.py --lengths none.json": "none.json: no such data file (--lengths)",
    "scripts/measure_towers.py resnet18 --presets": "measure_towers.py: error: give TOWERs to measure, or --presets",
    "scripts/measure_towers.py resnet18 --batches 8 0": "measure_towers.py: error: --batches [8, 0]: must be at least 1",
    "scripts/measure_towers.py resnet18 --devices quantum": "measure_towers.py: error: device quantum: not available here",
    "scripts/measure_towers.py resnet18 --labels a b": "measure_towers.py: error: --labels: 2 for 1 towers",
    "scripts/measure_towers.py resnet18 --num-classes 0": "--num-classes 0: without a classifier there is nothing to train",
    "scripts/measure_towers.py resnet18 resnet18": "resnet18: two towers of one label; give --labels",
    "scripts/measure_towers.py resnet18 --images none": "none: no such folder of images",
    "scripts/measure_towers.py resnet18 --images serve": "serve: no image in it (.jpg, .jpeg, .png, .webp, .gif, .bmp)",
    "scripts/measure_towers.py resnet18 --accuracy none.json": "none.json: not {name: top1} in JSON, nor CSV",
    "scripts/measure_towers.py --presets --batches 8": "--batches: has no meaning beside --presets; leave it out",
    "scripts/measure_towers.py --presets resnet*": "--presets resnet*: matches no tower of this package",
    "scripts/measure_towers.py drip_tiny_patch16_224+pool_after=13": "pool_after must be between 0 and depth 12, got 13",
    "scripts/measure_towers.py drip_tiny_patch16_224+pool_after": "'pool_after' is not KEY=VALUE",
}


FIRST, *OTHERS = PROGRAMS


@pytest.mark.parametrize("command", [FIRST, *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)])
def test_all_that_a_program_prints_is_one_line(command, repository):
    # A line that a narrow terminal would have broken is still one.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "40"}
    call = [sys.executable, *command.split()]
    result = subprocess.run(call, cwd=repository, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode not in (0, None)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert PROGRAMS[command] in result.stderr and result.stdout == ""


@pytest.mark.parametrize("command", MORE)
def test_one_line_that_names_it(command, repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    monkeypatch.setattr(sys, "argv", [word.replace("224+", "224 ") for word in command.split()])  # one word to a shell
    with pytest.raises(SystemExit) as end:
        runpy.run_path(sys.argv[0], run_name="__main__")
    printed = capsys.readouterr()
    assert end.value.code not in (0, None)
    assert len(printed.err.splitlines()) == 1, printed.err
    assert MORE[command] in printed.err and printed.out == ""


def test_train_clip_shows_where_an_error_came_from(repository, monkeypatch):
    monkeypatch.setenv("LLAVA_DRIP_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["train_clip.py", "--model", "no-such-model", "--train-data", "none.tar"])
    with pytest.raises(ValueError, match="no-such-model"):
        runpy.run_path(str(repository / "scripts" / "train_clip.py"), run_name="__main__")


def test_help_of_train_clip_has_open_clips_flags_and_ours(repository, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_clip.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(repository / "scripts" / "train_clip.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert not end.value.code and printed.err == ""
    assert "--boundary-loss-weight" in printed.out and "--train-data" in printed.out
