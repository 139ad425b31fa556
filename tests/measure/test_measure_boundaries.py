"""Measuring boundaries: references score what they must, the program goes on and reports. That training
teaches is tests/towers/test_boundaries_learn.py."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

from llava_drip.measure.boundaries import Cell, GivenEnds, cells, make_tower, measure, missing, plain, score
from llava_drip.measure.boundary_table import grouped, table
from llava_drip.measure.scene_tasks import TASKS, PatchTask, QuadrantTask
from llava_drip.tokens import TokenBatch
from llava_drip.towers.rules import RULES
from llava_drip.towers.scan import scan_order
from llava_drip.world.labelled import PATCH_CLASSES, labelled_scenes

GRID = (8, 8)
TINY = {"steps": 2, "train_scenes": 32, "test_scenes": 32, "batch_size": 8, "tower": {"depth": 2}}
MODES = {"objects": {"exact", "free"}, "random": {"exact"}, "uniform": {"exact", "free"}}


def test_every_combination_that_there_is():
    found = cells(["gumbel", "entropy", "random"], ["binomial", "interval"], [0.0, 0.3], ["raster", "hilbert"], [0, 1])
    assert len(found) == len(set(found)) == 2 * 2 * (4 + 1 + 1)
    assert {(c.rate_loss, c.detail_weight) for c in found if c.rule == "entropy"} == {(None, None)}
    rows = [{"cell": json.loads(json.dumps(plain(cell)))} for cell in found[:5]]
    assert list(missing(found, rows)) == found[5:]


@pytest.mark.parametrize("scan", ["raster", "hilbert"])
def test_given_ends(scan):
    scenes = labelled_scenes(0, 64, GRID)
    rows, place = torch.arange(64), {}
    for rule in ("objects", "random"):
        ends = GivenEnds(Cell(rule, None, None, scan, 0), scenes, GRID)
        place[rule] = ends(rows)
        assert place[rule].shape == (64, 64) and place[rule][:, -1].all() and (place[rule].sum(1) == 16).all()
        assert not torch.equal(ends(rows), ends(rows)), "places are drawn anew"
    changes = ends.changes
    few = changes.sum(1) <= 15
    assert few.any() and (place["objects"][:, :-1] | ~changes)[few].all(), "every true change is among them"
    assert not few.all() and not (place["objects"][:, :-1] & ~changes)[~few].any(), "nothing else where there are many"
    ends = GivenEnds(Cell("objects", None, None, scan, 0), scenes, GRID)(rows, exact=False)
    assert torch.equal(ends[:, :-1], changes)


@pytest.mark.parametrize("rule", [*RULES, "random", "objects"])
@pytest.mark.parametrize("scan", ["raster", "hilbert"])
def test_what_is_scored(rule, scan):
    sampled = rule in RULES and RULES[rule].samples
    cell = Cell(rule, "binomial" if sampled else None, 0.3 if sampled else None, scan, 0, **TINY)
    torch.manual_seed(0)
    tower, scenes = make_tower(cell), labelled_scenes(0, 64, GRID)
    task = TASKS["patches"](tower.num_features)
    scores = score(tower, task, cell, scenes)
    assert set(scores) == MODES.get(rule, {"exact", "batch", "free"})
    assert scores["exact"]["tokens"] == scores["exact"]["tokens_p95"] == 16 and scores["exact"]["follows"] == 0
    assert score(tower, task, cell, scenes) == scores, "no chance in it"
    if rule == "objects":
        assert scores["free"]["f1"] == 1 and scores["free"]["follows"] == pytest.approx(1)
        counts = scenes.changes(scan_order(scan, *GRID)).sum(1)
        assert scores["free"]["tokens"] == pytest.approx(1 + counts.mean())
        # The best there is at 16 tokens: 15 boundaries, all on changes or on every change.
        assert scores["exact"]["f1"] == pytest.approx(2 * np.minimum(counts, 15).sum() / (15 * 64 + counts.sum()))
    if rule == "random":
        assert scores["exact"]["f1"] == pytest.approx(scores["exact"]["chance_f1"], rel=0.25)


def test_a_patch_task_scores_intersection_over_union():
    scenes, classes = labelled_scenes(0, 8, GRID), len(PATCH_CLASSES)
    task = PatchTask(classes)
    torch.nn.init.eye_(task.head.weight)
    torch.nn.init.zeros_(task.head.bias)
    true, rows = torch.from_numpy(scenes.patch_class), torch.arange(8)
    each = torch.arange(64).expand(8, 64)  # every patch a token

    def scored(said: torch.Tensor) -> float:
        values = torch.nn.functional.one_hot(said.flatten(), classes).float()
        return task.score(None, TokenBatch(values, torch.full((8,), 64), each), scenes, rows)

    assert scored(true) == 1
    there = true.unique().tolist()
    assert scored(torch.zeros_like(true)) == pytest.approx((true == 0).float().mean().item() / len(there))
    wrong = true.clone()
    wrong[:, :32] = 0  # the upper half is all called background
    shares = [((wrong == c) & (true == c)).sum() / ((wrong == c) | (true == c)).sum() for c in there]
    assert scored(wrong) == pytest.approx(torch.stack(shares).mean().item()) and scored(wrong) < 1


def test_a_quadrant_task_scores_objects():
    scenes, rows = labelled_scenes(0, 32, GRID), torch.arange(32)
    task = QuadrantTask(4)
    true = torch.from_numpy(scenes.in_quadrant)

    def scored(logits: torch.Tensor) -> float:
        task._logits = lambda tower, tokens: logits
        return task.score(None, None, scenes, rows)

    assert scored(true) == 1 and scored(-true) == 0
    first = torch.zeros_like(true)
    first[..., 0] = first[..., 6] = 1  # always the first colour and the first shape
    objects = true[true.sum(-1) > 0]
    assert scored(first) == pytest.approx((objects[:, 0] * objects[:, 6]).mean().item())


def test_a_cell_is_the_same_again():
    cell = Cell("similarity", "interval", 0.3, "serpentine", 1, task="quadrants", **TINY)
    first, second = measure(cell), measure(cell)
    assert {**first, "seconds": 0} == {**second, "seconds": 0} and np.isfinite(first["loss"])
    assert measure(Cell(**{**asdict(cell), "seed": 2}))["trained"] != first["trained"]


def test_wrong_tower_arguments_are_named():
    for tower, message in (({"depht": 3}, "depht"), ({"scan": "raster"}, "scan: the cell says this itself")):
        with pytest.raises(ValueError, match=message):
            make_tower(Cell("gumbel", "binomial", 0.0, "raster", 0, tower=tower))


def row_of(rule: str, seed: int, f1: float) -> dict:
    cell = Cell(rule, "binomial" if rule == "gumbel" else None, 0.3 if rule == "gumbel" else None, "raster", seed)
    exact = {"precision": 0.5, "recall": 0.25, "f1": f1, "chance_f1": 0.2, "task": 0.8}
    exact |= {"tokens": 16.0, "tokens_p5": 16.0, "tokens_p95": 16.0, "follows": 0.0}
    free = {**exact, "tokens_p5": 9.0, "tokens_p95": 24.0, "follows": 0.75}
    modes = {"exact": exact} if rule == "random" else {"exact": exact, "free": free}
    return {"cell": plain(cell), "untrained": {"exact": {**exact, "f1": 0.3}}, "trained": modes}


def test_the_table_by_hand():
    rows = [row_of("random", 0, 0.2), row_of("gumbel", 1, 0.7), row_of("gumbel", 0, 0.5)]
    groups = grouped(rows)
    assert [group.label for group in groups] == ["random raster", "gumbel binomial raster detail 0.3"]
    assert groups[1].values("trained", "exact", "f1") == [0.5, 0.7], "by seed"
    lines = [line for line in table(groups).splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in lines}) == 1
    numbers = "0.300 ± 0.000 | 0.600 ± 0.141 | 3.0 ± 0.7 | 0.500 ± 0.000 | 0.250 ± 0.000 | 0.800 ± 0.000"
    free = "0.600 ± 0.141 | 9 .. 24 | 0.750 ± 0.000 | 0.800 ± 0.000"
    assert lines[2] == f"| gumbel | binomial | 0.3 | raster | 2 | {numbers} | {free} |"
    assert lines[3] == "| random |  |  | raster | 1 | 0.300 | 0.200 | 1.0 | 0.500 | 0.250 | 0.800 |  |  |  |  |"


@pytest.mark.slow
def test_the_program_goes_on_and_reports(tmp_path, repository, monkeypatch, capsys):
    out = tmp_path / "out"
    flags = (
        "--rules gumbel uniform objects --rate-losses binomial --scans serpentine --tasks patches quadrants --steps 3"
    )
    flags += (
        " --detail-weights 0.3 --train-scenes 32 --test-scenes 32 --batch-size 8 --model-kwargs depth=2 pool_after=(0)"
    )

    def start(*more: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["measure_boundaries.py", "--output", str(out), *flags.split(), *more])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(repository / "scripts" / "measure_boundaries.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    code, _, printed = start("--table")
    assert code == 1 and "no rows yet" in printed and len(printed.splitlines()) == 1
    code, _, printed = start("--steps", "0")
    assert code == 2 and "--steps 0: must be above 0" in printed and not out.exists()
    code, _, printed = start("--rate-loss-weight", "nan")
    assert code == 2 and "--rate-loss-weight nan: must be 0 or more" in printed
    code, _, printed = start("--model-kwargs", "depth")
    assert code == 1 and printed == "measure_boundaries.py: error: --model-kwargs: 'depth' is not KEY=VALUE\n"
    assert start("--seeds", "0")[0] == 0
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    first = [json.loads(line) for line in lines]
    assert len(first) == 6 and all(row["cell"]["tower"] == {"depth": 2, "pool_after": 0} for row in first)
    # A killed run leaves a torn line: that cell is trained again, with the same result, and nothing else is.
    (out / "results.jsonl").write_text("".join(lines)[: -len(lines[-1]) // 2])
    code, printed, _ = start("--seeds", "0", "1")
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert code == 0 and len(rows) == 12 and rows[:5] == first[:5]
    (again,) = (row for row in rows[5:] if row["cell"] == first[5]["cell"])
    assert again["trained"] == first[5]["trained"]
    written = (out / "table.md").read_text()
    assert written in printed and written.count("### Task") == 2 and "| objects |" in written
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "table.md", "patches.png", "quadrants.png"}
    # Rows of other settings stand in a table, and in a plot, of their own.
    assert start("--seeds", "0", "--tasks", "patches", "--rules", "uniform", "--steps", "2")[0] == 0
    assert (out / "table.md").read_text().count("### Task") == 3
    assert {path.name for path in out.glob("*.png")} == {"patches.png", "patches-2.png", "quadrants.png"}
