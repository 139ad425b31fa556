"""Runs of both trainers' formats → plots, a table and JSON, by the program itself."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image
from run_folders import HALF, epoch, write_run

from llava_drip.measure.flops import tower_macs
from llava_drip.reports.run import open_run
from llava_drip.towers.io import save_tower


@pytest.fixture
def plot(repository, monkeypatch, capsys):
    """Runs the program; (exit status, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["plot_results.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(repository / "scripts" / "plot_results.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory) -> Path:
    """Two epochs of the dense twin."""
    folder = tmp_path_factory.mktemp("dense") / "dense"
    model = "drip_mini_patch8_64_1x"
    one = {"tokens": 64.0, "compression": 1.0, "compression_p5": 1.0, "compression_p95": 1.0}
    write_run(folder, "train_imagenet.py", model, [epoch(1, top1=0.25, **one), epoch(2, top1=0.4, **one)])
    save_tower(timm.create_model(model, num_classes=10), folder / "last", HALF, HALF)
    return folder


def test_a_folder_of_plots_and_a_table(plot, imagenet_run, dense_run, tmp_path):
    code, out, err = plot(imagenet_run, dense_run, "--labels", "DRIP | 4x", "dense", "--output", tmp_path / "out")
    assert code == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "epochs.png",
        "gmacs.png",
        "results.md",
        "results.json",
    }
    for name in ("epochs.png", "gmacs.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width == 800
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.strip() in out
    header, _, drip, dense = table.splitlines()
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", drip)[1:-1]]
    assert len(cells) == header.count("|") - 1
    assert cells[:7] == [
        r"DRIP \| 4x",
        "drip_mini_patch8_64_4x",
        "3",
        "30.00%",
        "75.00%",
        "16.0",
        "4.00x (3.20 .. 5.10)",
    ]
    assert "| 40.00% | - | 64.0 | 1.00x |" in dense  # no top-5
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["metric"] == "top1" and content["at"] == "last"
    drip, dense = content["rows"]
    assert drip["gmacs"] == tower_macs(timm.create_model("drip_mini_patch8_64_4x", num_classes=10), 16) / 1e9
    assert dense["gmacs"] == tower_macs(timm.create_model("drip_mini_patch8_64_1x", num_classes=10)) / 1e9
    assert (drip["epoch"], drip["epochs"], drip["step_seconds"]) == (3, 3, 0.2)  # median of 0.1, 0.2, 0.3


def test_the_best_epoch_in_one_file(plot, imagenet_run, tmp_path):
    code, _, err = plot(imagenet_run, "--at", "best", "--output", tmp_path / "new" / "plot.svg")
    assert code == 0, err
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"plot.svg", "plot.md", "plot.json"}
    (row,) = json.loads((tmp_path / "new" / "plot.json").read_text())["rows"]
    assert row["epoch"] == 2 and row["metrics"]["top1"] == 0.35 and row["epochs"] == 3 and row["label"] == "drip_4x"
    plot(imagenet_run, "--at", "best", "--metric", "loss", "--output", tmp_path / "loss.png")
    assert json.loads((tmp_path / "loss.json").read_text())["rows"][0]["epoch"] == 3  # lowest, not highest


def test_a_clip_run(plot, clip_run, imagenet_run, tmp_path):
    code, out, err = plot(clip_run, "--output", tmp_path)
    assert code == 0, err
    assert "zero-shot top-1 accuracy" in out and "| 20.00% |" in out
    code, _, err = plot(clip_run, imagenet_run, "--output", tmp_path / "both")  # all that they have in common
    assert code == 0, err
    assert json.loads((tmp_path / "both" / "results.json").read_text())["metric"] == "loss"


def test_seeds_are_means_and_ranges(plot, imagenet_run, dense_run, tmp_path):
    second = tmp_path / "second"
    shutil.copytree(imagenet_run, second)
    rows = [epoch(1, top1=0.1), epoch(2, top1=0.2), epoch(3, top1=0.5)]
    (second / "epochs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [imagenet_run, second, dense_run]
    code, out, err = plot(*runs, "--group", "--labels", "DRIP", "DRIP", "dense", "--output", tmp_path / "out")
    assert code == 0, err
    assert "DRIP (2 runs)" in out and "| 40.00% (30.00 .. 50.00) |" in out
    drip, dense = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert drip["metrics"]["top1"] == pytest.approx(0.4) and drip["spread"]["top1"] == [0.3, 0.5]
    assert drip["run"] == ["drip_4x", "second"] and dense["run"] == ["dense"]

    code, _, err = plot(imagenet_run, dense_run, "--group", "--labels", "A", "A", "--output", tmp_path / "out")
    assert (
        code == 1
        and "--group: runs labelled 'A' differ in model (drip_mini_patch8_64_1x, drip_mini_patch8_64_4x)" in err
    )
    code, _, err = plot(imagenet_run, second, "--labels", "A", "A", "--output", tmp_path / "out")
    assert code == 1 and "'A' names two runs" in err


def test_a_run_without_a_tower_is_left_out_of_the_points(plot, imagenet_run, tmp_path):
    bare = write_run(tmp_path / "bare", "train_imagenet.py", "drip_mini_patch8_64_4x", [epoch(1, top1=0.2)])
    code, out, err = plot(imagenet_run, bare, "--output", tmp_path / "out")
    assert code == 0 and "bare: not among the points" in out, err
    code, out, err = plot(bare, "--output", tmp_path / "alone")
    assert code == 0, err
    assert not (tmp_path / "alone" / "gmacs.png").exists() and (tmp_path / "alone" / "epochs.png").exists()


def test_epochs_that_were_not_evaluated_are_left_out(tmp_path):
    rows = [epoch(1), epoch(2, top1=0.2), epoch(3, top1=float("nan")), epoch(4, top1=None)]
    run = open_run(write_run(tmp_path / "run", "train_imagenet.py", "m", rows))
    assert run.metrics() == ["top1", "loss"] and run.row("top1")["epoch"] == 2


def test_mistakes_are_one_line(plot, imagenet_run, clip_run, tmp_path):
    empty, none, torn = tmp_path / "empty", tmp_path / "none", tmp_path / "torn"
    empty.mkdir()
    write_run(none, "train_imagenet.py", "m", [])
    torn.mkdir()
    (torn / "run.json").write_text("{")
    for arguments, message in (
        ([tmp_path / "nowhere"], "nowhere: no such run folder"),
        ([empty], "run.json is missing; give --output of train_imagenet.py or LOGS/NAME of train_clip.py"),
        ([none], "no epochs yet"),
        ([torn], "run.json: not valid JSON"),
        ([imagenet_run, clip_run, "--metric", "top1"], "it has zero_shot_top1, zero_shot_top5, loss"),
        ([imagenet_run, "--metric", "accuracy"], "argument --metric: invalid choice: 'accuracy'"),
        ([imagenet_run, "--labels", "A", "B"], "--labels: 2 for 1 runs"),
        ([imagenet_run, "--output", "plot.jpg"], "--output plot.jpg: must be a folder, or end in .png, .svg, .pdf"),
    ):
        code, out, err = plot(*arguments)
        assert code in (1, 2) and len(err.splitlines()) == 1 and message in err and not out, (err, message)
