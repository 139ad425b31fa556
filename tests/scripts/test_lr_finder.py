"""scripts/lr_finder.py on made pictures: what it writes, suggests and refuses."""

from __future__ import annotations

import io
import json
import math
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
from classification.helpers import MODEL, NAMES, ROOT, fresh, program, samples, write_folder, write_shards
from PIL import Image

SHORT = ["--device=cpu", "--precision=fp32", "--workers=0", "--batch-size=12", "--scale", "0.6", "1"]


@pytest.fixture(autouse=True)
def calm(one_thread):
    """Every test here runs on one thread, and leaves no state of accelerate's to the next."""
    yield
    fresh()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "train", samples(48))
    return write_shards(folder / "shards", samples(48), 2).parent


def find(monkeypatch, *flags: object) -> None:
    fresh()
    monkeypatch.setattr(sys, "argv", ["lr_finder.py", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "lr_finder.py"), run_name="__main__")
    assert end.value.code == 0


@pytest.mark.parametrize("model", [pytest.param(MODEL, marks=pytest.mark.slow), "drip_mini_patch8_64_1x"])
def test_a_range_test(model, data, tmp_path, monkeypatch, capsys):
    flags = [f"--model={model}", f"--train-data={data}/train", *SHORT, "--steps=80", f"--output={tmp_path}/lr"]
    find(monkeypatch, *flags, "--start-lr=1e-5", "--end-lr=1")
    result = json.loads((tmp_path / "lr.json").read_text())
    lrs, losses = result["lrs"], result["losses"]
    assert len(lrs) == len(losses) <= 80 and lrs[0] == 1e-5 and lrs[1] / lrs[0] == pytest.approx(lrs[9] / lrs[8])
    assert 1.6 < losses[0] < 1.8 + 1.5  # ln 6, and five rate losses
    assert 1e-5 < result["steepest"] < 0.1 and 1e-6 < result["tenth_of_minimum"] < 0.1
    assert result["diverges"] is None or result["diverges"] > result["steepest"]
    with Image.open(tmp_path / "lr.png") as plot:
        assert plot.width > 500
    printed = capsys.readouterr().out
    assert f"steepest descent: {result['steepest']:.2e}" in printed and f"{tmp_path}/lr.png" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lr.json", "lr.png"]
    find(monkeypatch, *flags, "--start-lr=1e-5", "--end-lr=1")
    assert json.loads((tmp_path / "lr.json").read_text()) == result  # the same again


def test_a_recipe_and_shards(data, tmp_path, monkeypatch):
    """What the recipe says of the schedule is left out; the model, mixup and the like are taken."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {MODEL}\nepochs: 300\nwarmup-epochs: 30\nlr-base: 0.003\nmodel-ema: true\nmixup: 0.2\nsmoothing: 0.1\n"
        "aa: rand-m9-mstd0.5-inc1\nopt-betas: [0.9, 0.95]\nfsdp: false\nlayer-decay: 0.8\nsave-every-n-steps: 500\n"
    )
    shards = [f"--train-data={data}/shards", f"--classes={data}/shards/names.txt", "--grad-accum-steps=2"]
    find(monkeypatch, recipe, *shards, *SHORT, "--steps=20", "--end-lr=1e-2", f"--output={tmp_path}/lr")
    assert len(json.loads((tmp_path / "lr.json").read_text())["lrs"]) == 20


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A shard of 48 captioned pictures."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.tar"
    with tarfile.open(path, "w") as tar:
        for i, (content, label) in enumerate(samples(48)):
            for ending, data in (("jpg", content), ("txt", f"a {NAMES[label].replace('_', ' ')}".encode())):
                member = tarfile.TarInfo(f"{i:05}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def clip_flags(pairs: Path, output: Path) -> list[str]:
    flags = [f"--train-data={pairs}", "--train-num-samples=48", "--batch-size=12", "--device=cpu", "--precision=fp32"]
    return ["clip", "--model=DRIP-mini-8-4x", *flags, "--workers=0", f"--output={output}"]


def test_clip(pairs, tmp_path, monkeypatch, capsys):
    find(monkeypatch, *clip_flags(pairs, tmp_path / "lr"), "--steps=24", "--start-lr=1e-5", "--end-lr=1e-1")
    result = json.loads((tmp_path / "lr.json").read_text())
    assert result["lrs"][0] == 1e-5 and 20 <= len(result["losses"]) <= 24
    assert -0.5 < result["losses"][0] - math.log(12) < 2  # of a contrastive batch, and five boundary losses
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lr.json", "lr.png"]
    assert "DRIP-mini" not in capsys.readouterr().out  # the trainer's own log stays out


@pytest.mark.parametrize("mistake", ["--steps=3", "--nonsense=1", "--output=none/lr"])
def test_a_mistake_of_clip_is_one_line(mistake, pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lr_finder.py", *clip_flags(pairs, tmp_path / "lr"), mistake])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "lr_finder.py"), run_name="__main__")
    printed = capsys.readouterr().err
    assert end.value.code in (1, 2) and len(printed.splitlines()) == 1 and mistake.partition("=")[0] in printed


MISTAKES = {
    "--steps=19": "--steps must be at least 20, got 19",
    "--start-lr=1 --end-lr=0.1": "--start-lr 1.0 must be above 0 and below --end-lr 0.1",
    "--start-lr=0": "--start-lr 0.0 must be above 0",
    "--beta=1": "--beta must be at least 0 and below 1, got 1.0",
    "--epochs=3": "unrecognized arguments: --epochs=3",
    "--lr=1": "unrecognized arguments: --lr=1",
    "--batch-size=0": "--batch-size must be at least 1, got 0",
    "--output=none/lr": "--output: no folder none",
    "--train-data=none": "--train-data: ",
    "--model=nonsense": "--model: nonsense is neither",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, data, tmp_path, monkeypatch, capsys):
    fresh()
    flags = [f"--model={MODEL}", f"--train-data={data}/train", *SHORT, f"--output={tmp_path}/lr", *mistake.split()]
    monkeypatch.setattr(sys, "argv", ["lr_finder.py", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "lr_finder.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert end.value.code in (1, 2) and printed.out == ""
    assert len(printed.err.splitlines()) == 1 and MISTAKES[mistake] in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_several_processes_are_refused(data, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--"]
    flags = [f"--model={MODEL}", f"--train-data={data}/train", *SHORT, f"--output={tmp_path}/lr"]
    result = program(*launcher, "scripts/lr_finder.py", *flags)
    assert result.returncode != 0
    assert "lr_finder.py: error: a range test is for one process, not 2" in result.stderr
