"""Recipes as flags."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from llava_drip.training.recipe import flags_of, with_recipe

RECIPE = """
# a comment
batch-size: 512
lr: 5e-4
eps: 0.000001
decay: -0.5
name: a run
empty: ""
date: 2026-01-02
betas: [0.9, 0.98]
milestones:
  - 1
  - -2
local-loss: true
amp: false
resume: null
"""


def write(folder: Path, text: str | bytes, name: str = "recipe.yaml") -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def test_every_kind_of_value(tmp_path):
    path = write(tmp_path, RECIPE)
    expected = ["--batch-size=512", "--lr=5e-4", "--eps=1e-06", "--decay=-0.5", "--name=a run", "--empty="]
    expected += ["--date=2026-01-02", "--betas", "0.9", "0.98", "--milestones", "1", "-2", "--local-loss"]
    assert flags_of(path) == expected
    assert flags_of(path, negative=True) == [*expected, "--no-amp"]


def test_argparse_reads_them_and_later_flags_win(tmp_path):
    parser = argparse.ArgumentParser()
    for name in ("lr", "eps", "decay"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("name", "empty", "date"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--betas", type=float, nargs="+")
    parser.add_argument("--milestones", type=int, nargs="+")
    for name in ("local-loss", "amp"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True)
    path = str(write(tmp_path, RECIPE))
    given = with_recipe([path, "--lr", "1", "--betas", "0.5", "--no-local-loss"], negative=True)
    args = parser.parse_args(given)
    assert (args.lr, args.eps, args.decay, args.batch_size) == (1.0, 1e-6, -0.5, 512)
    assert (args.betas, args.milestones, args.name, args.empty) == ([0.5], [1, -2], "a run", "")
    assert args.local_loss is False and args.amp is False


def test_without_a_recipe_nothing_changes(tmp_path):
    assert with_recipe([]) == []
    assert with_recipe(["--lr", "1", "x.yaml"]) == ["--lr", "1", "x.yaml"]
    assert with_recipe([str(write(tmp_path, "", "empty.yml")), "--lr", "1"]) == ["--lr", "1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {b: 1}", "a: must be a number, a text, true, false or a list"),
        ("a: [[1]]", "a: a list must hold numbers or texts"),
        ("a: [null]", "a: a list must hold numbers or texts"),
        ("a: [true]", "a: a list must hold numbers or texts"),
        ("on: 1", "True is no name of a flag"),
        ("1: 2", "1 is no name of a flag"),
        ("- a", "must hold 'flag: value' lines"),
        ("just words", "must hold 'flag: value' lines"),
        ("a: [", "not valid YAML"),
        (b"a: \xff", "not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML"),
    ],
)
def test_what_is_no_recipe(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        flags_of(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_such_recipe(tmp_path):
    with pytest.raises(ValueError, match="no such recipe"):
        with_recipe([str(tmp_path / "a.yaml")])
    with pytest.raises(ValueError, match="must be a .yaml file; flags begin with --"):
        with_recipe(["train"])
