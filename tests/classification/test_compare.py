"""Comparisons of towers: equal terms, no run lost or repeated, and tables and plots that say what the rows say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from llava_drip.classification import compare as compare_module
from llava_drip.classification.compare import check_variants
from llava_drip.classification.compare_recipe import read_comparison
from llava_drip.classification.in_memory import (
    Augmentation,
    Normalize,
    Pictures,
    load_pictures,
    pixel_statistics,
    random_crops,
    shifted,
)
from llava_drip.classification.sources import open_source
from llava_drip.draw.comparison import TokenPoint, draw_comparison, draw_token_points, look_of, side_by_side
from llava_drip.measure import flops
from llava_drip.measure.flops import tower_macs
from llava_drip.reports.comparison import entries, markdown

from .helpers import NAMES, ROOT, fresh, picture, rows, samples, write_folder

RECIPES = sorted((ROOT / "scripts" / "recipes").glob("compare_*.yaml"))
SCRIPT = ROOT / "scripts" / "compare_towers.py"
TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 4}
RECIPE = {
    "protocol": {
        "img_size": 16,
        "batch_size": 16,
        "steps": 4,
        "lr": 1.0e-3,
        "warmup_steps": 1,
        "clip_grad": 1.0,
        "augmentation": {"flip": True, "shift": 2},
    },
    "common": {"model": "drip_tiny_patch16_224", "pool_after": 1, **TINY},
    "dense": "dense",
    "variants": {
        "dense": {"compression": 1},
        "4x": {"compression": 4, "read_at": [2, 4, None]},
        "timm": {"model": "vit_tiny_patch16_224", "pool_after": None},
    },
}


def recipe(folder: Path, **changes) -> Path:
    """RECIPE as a file; a change replaces a part, or, where both are mappings, entries of it."""
    content = dict(RECIPE)
    for name, value in changes.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) and name == "protocol" else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def compare(run_script, data):
    """compare(recipe, output, *flags): the program in this process, over the pictures of `data`."""

    def run(path: Path, output: Path, *flags: object, **sources: Path):
        fresh()
        train, val = sources.get("train", data / "train"), sources.get("val", data / "val")
        places = ["--train-data", train, "--val-data", val, "--output", output, "--device", "cpu"]
        return run_script(SCRIPT, path, *places, *flags)

    return run


# Recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_can_be_made(path):
    comparison = read_comparison(path)
    check_variants(comparison, list(comparison.variants), 10)
    assert {"dense", "2x", "4x", "10x", "elastic"} <= set(comparison.variants) and comparison.dense == "dense"
    protocol = comparison.protocol
    assert (protocol.batch_size, protocol.steps, protocol.lr, protocol.warmup_steps) == (128, 1000, 1e-3, 100)
    assert protocol.rate(0) == 0.01 and protocol.rate(99) == protocol.rate(100) == 1 and protocol.rate(999) < 1e-5
    assert protocol.rate(550) == pytest.approx(0.5)


MISTAKES = {
    "protocol: does not know 'epochs'": {"protocol": {"epochs": 3}},
    "protocol: lr: must be a number above 0, got '1e-3' (YAML takes 1e-3 for a text": {"protocol": {"lr": "1e-3"}},
    "protocol: steps: must be a whole number of at least 1, got 0": {"protocol": {"steps": 0}},
    "warmup_steps 4 must be fewer than steps 4": {"protocol": {"warmup_steps": 4}},
    "precision: must be one of fp32, bf16": {"protocol": {"precision": "fp8"}},
    "shift and scale: a random crop": {"protocol": {"augmentation": {"shift": 2, "scale": [0.5, 1]}}},
    "scale must be two rising numbers above 0": {"protocol": {"augmentation": {"scale": [0.9, 0.5]}}},
    "augmentation: does not know 'mixup'": {"protocol": {"augmentation": {"mixup": 0.2}}},
    "dense: 'plain' is none of the variants (dense, 4x, timm)": {"dense": "plain"},
    "variant a: model": {"variants": {"a": {}}, "common": {}, "dense": None},
    "variant dense: read_at: must be a number of at least 1, got 0.5": {"variants": {"dense": {"read_at": [0.5]}}},
    "variants: names no tower": {"variants": {}},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_a_recipe_is_named(message, tmp_path):
    path = recipe(tmp_path, **MISTAKES[message])
    with pytest.raises(ValueError) as error:
        read_comparison(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_a_variant_that_cannot_be_made_is_told_before_any_is_trained(compare, tmp_path):
    for own, message in (
        ({"compresion": 4}, "variant b: drip_tiny_patch16_224: cannot be made"),
        ({"model": "no_such_model"}, "variant b: no_such_model is neither"),
        ({"model": "vit_tiny_patch16_224", "pool_after": None, "read_at": [2]}, "has no adjustable token budget"),
        ({"num_classes": 3}, "variant b: drip_tiny_patch16_224: num_classes is no argument to give"),
    ):
        path = recipe(tmp_path, variants={"dense": {"compression": 1}, "b": own})
        done = compare(path, tmp_path / "out")
        assert done.returncode == 1 and message in done.stderr and not (tmp_path / "out").exists()


# Pictures in memory


def test_pictures_are_the_same_from_every_kind_of_source(data):
    found = {
        name: load_pictures(
            "--train-data",
            open_source("--train-data", str(data / name), classes=str(data / "shards" / "names.txt")),
            24,
            len(NAMES),
        )
        for name in ("train", "shards", "train.parquet")
    }
    for pictures in found.values():
        assert pictures.pixels.shape == (48, 3, 24, 24) and pictures.pixels.dtype == torch.uint8
        assert torch.bincount(pictures.labels).tolist() == [8] * 6

    def in_any_order(pictures: Pictures) -> list:
        return sorted(zip(pictures.labels.tolist(), pictures.pixels.flatten(1).tolist()))

    assert in_any_order(found["train"]) == in_any_order(found["shards"]) == in_any_order(found["train.parquet"])


def test_pictures_of_the_right_size_stay_as_they_are(tmp_path):
    write_folder(tmp_path, [(picture(0, 5), 0)])
    pictures = load_pictures("--val-data", open_source("--val-data", str(tmp_path)), 72, 1)
    with Image.open(tmp_path / NAMES[0] / "000.jpg") as image:
        assert torch.equal(pictures.pixels[0], pil_to_tensor(image))


def test_too_many_pictures_and_bad_ones_are_refused(data, tmp_path):
    for name in ("train", "train.parquet"):
        with pytest.raises(ValueError, match=r"--train-data .*: 48 pictures or more of 24 x 24 px need over"):
            source = open_source("--train-data", str(data / name))
            load_pictures("--train-data", source, 24, len(NAMES), max_bytes=48 * 3 * 24 * 24 - 1)
    write_folder(tmp_path, [*samples(2), (b"no picture", 1)])
    with pytest.raises(ValueError, match=r"--val-data: 1 skipped \(1 corrupt picture\).*002.jpg"):
        load_pictures("--val-data", open_source("--val-data", str(tmp_path)), 24, len(NAMES))


def test_normalized_training_pictures_have_mean_0_and_deviation_1():
    torch.manual_seed(0)
    pixels = torch.randint(0, 200, (70, 3, 8, 8), dtype=torch.uint8)
    pixels[:, 1] //= 3
    normalized = Normalize(*pixel_statistics(Pictures(pixels, torch.zeros(70))))(pixels)
    assert normalized.mean((0, 2, 3)).abs().max() < 1e-4
    assert (normalized.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_shifts_and_flips_are_windows_of_the_padded_picture():
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8)
    flips, shifts = torch.rand(40) < 0.5, torch.randint(0, 5, (2, 40))
    moved = shifted(pixels, flips, shifts, 2)
    padded = torch.nn.functional.pad(pixels, (2,) * 4)
    for i in range(40):
        window = padded[i, :, shifts[0, i] : shifts[0, i] + 6, shifts[1, i] : shifts[1, i] + 6]
        assert torch.equal(moved[i], window.flip(2) if flips[i] else window)
    assert torch.equal(Augmentation()(pixels, torch.Generator()), pixels)


def test_augmentation_draws_all_shifts_and_half_of_the_flips():
    corner = torch.zeros(400, 3, 9, 9, dtype=torch.uint8)
    corner[:, :, 4, 2] = 255  # a flip moves it to column 6
    moved = Augmentation(flip=True, shift=1)(corner, torch.Generator().manual_seed(0))
    row, column = moved[:, 0].amax(2).argmax(1), moved[:, 0].amax(1).argmax(1)
    assert set(row.tolist()) == {3, 4, 5} and set(column.tolist()) == {1, 2, 3, 5, 6, 7}
    assert 0.4 < (column > 4).float().mean() < 0.6
    again = Augmentation(flip=True, shift=1)(corner, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)


def test_random_crops_have_the_area_asked_for_and_mirror():
    size, count = 32, 200
    ramp = torch.arange(size).expand(size, size)
    pixels = torch.stack([ramp, ramp.T, ramp]).to(torch.uint8).expand(count, -1, -1, -1)
    none, all_ = torch.zeros(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
    crops = random_crops(pixels, none, (0.25, 0.36), torch.Generator().manual_seed(1))
    inner = crops[:, :, 4:-4, 4:-4]  # at the border of the picture the ramp ends
    slope_x = (inner[:, 0, 0, -1] - inner[:, 0, 0, 0]) / (inner.shape[3] - 1)  # share of the width that was taken
    slope_y = (inner[:, 1, -1, 0] - inner[:, 1, 0, 0]) / (inner.shape[2] - 1)
    area, ratio = slope_x * slope_y, slope_x / slope_y
    assert 0.245 < area.min() < 0.27 and 0.34 < area.max() < 0.365
    assert 3 / 4 - 0.02 < ratio.min() < 0.85 and 1.2 < ratio.max() < 4 / 3 + 0.02
    assert crops[:, 0].amin((1, 2)).min() < 2 and crops[:, 0].amax((1, 2)).max() > size - 3  # places up to the borders
    mirrored = random_crops(pixels, all_, (0.25, 0.36), torch.Generator().manual_seed(1))
    assert torch.allclose(mirrored, crops.flip(3), atol=1e-3)


# Runs


def without_times(row: dict) -> dict:
    return {
        name: value for name, value in row.items() if name not in ("step_seconds", "seconds", "finished", "command")
    }


def test_rows_table_and_plot_of_all_variants(compare, tmp_path):
    out = tmp_path / "out"
    done = compare(recipe(tmp_path), out, "--seeds", 0, 1)
    assert done.returncode == 0, done.stderr
    results = rows(out, "results")
    assert [(row["variant"], row["seed"]) for row in results] == [
        (n, s) for s in (0, 1) for n in ("dense", "4x", "timm")
    ]
    dense, pooled, plain = results[:3]
    assert [reading["read_at"] for reading in pooled["readings"]] == [2, 4, None]
    assert [reading["tokens"] for reading in pooled["readings"][:2]] == [8, 4]  # exactly, of 16 patches
    assert dense["readings"][0]["tokens"] == plain["readings"][0]["tokens"] == 16
    assert pooled["rate_loss"] > 0 and dense["rate_loss"] is None
    assert len(dense["loss_curve"]) == 4 and dense["final_loss"] == pytest.approx(sum(dense["loss_curve"]) / 4)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=6, **TINY)
    assert plain["readings"][0]["gmacs"] == pytest.approx(tower_macs(model) / 1e9)
    assert pooled["readings"][1]["gmacs"] < pooled["readings"][0]["gmacs"]
    assert plain["parameters"] == sum(p.numel() for p in model.parameters())

    table = (out / "table.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert [line[0] for line in lines[2:]] == ["dense", "4x, read at 2x", "4x, read at 4x", "4x, read freely", "timm"]
    mean = 50 * (results[0]["top1"] + results[3]["top1"])
    assert lines[2][1].startswith(f"{mean:.2f} ± ") and lines[2][2] == "2" and lines[2][3] == "100.0"
    assert "steps 4" in table and "--seeds 0 1" in table and str(torch.__version__) in table
    assert len({len(line) for line in table.splitlines() if line[:1] == "|"}) == 1
    assert Image.open(out / "results.png").width == 1200
    assert not list(out.glob(".*"))


def test_models_without_a_closed_form_get_their_row(compare, tmp_path):
    """At 32 px batch norm sees 1 x 1 pixels at a ResNet's end: of one picture in training mode it has no variance."""
    small = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    variants = {"cnn": {"model": "resnet18"}, "parallel": {"model": "vit_small_patch16_18x2_224", **small}}
    path = recipe(tmp_path, common={}, dense=None, variants=variants, protocol={"img_size": 32, "steps": 2})
    done = compare(path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for row in rows(tmp_path / "out", "results"):
        assert row["readings"][0]["gmacs"] > 0.001
        assert row["variant"] == "parallel" or row["readings"][0]["gmacs"] == pytest.approx(0.0372, rel=0.02)


def test_a_model_that_cannot_be_counted_costs_no_training(compare, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_module, "train_step", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(flops, "has_plain_blocks", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(recipe(tmp_path), tmp_path / "out")


@pytest.mark.slow
def test_a_name_and_what_was_trained_before_decide_nothing(compare, tmp_path):
    """The same tower under two names, trained after different others: one loss curve. Another seed: another."""
    twins = {"a": {"compression": 4}, "other": {"compression": 2}, "b": {"compression": 4}}
    out = tmp_path / "out"
    assert compare(recipe(tmp_path, variants=twins, dense=None), out, "--seeds", 0, 1).returncode == 0
    found = {(row["variant"], row["seed"]): row for row in rows(out, "results")}
    a, b = found["a", 0], found["b", 0]
    assert {**without_times(a), "variant": "b"} == without_times(b)
    assert a["loss_curve"] != found["a", 1]["loss_curve"] and a["loss_curve"] != found["other", 0]["loss_curve"]


def test_the_rate_loss_has_the_weight_that_the_tower_asks_for(compare, tmp_path):
    """5 where boundaries are drawn, 1 for the entropy rule, unless the recipe says otherwise."""
    variants = {
        f"{rule} {weight}": {"boundary": rule, "compression": 4} for rule in ("gumbel", "entropy") for weight in "015"
    }
    for name, variant in variants.items():
        if name[-1] != "0":
            variant["rate_loss_weight"] = float(name[-1])
    assert compare(recipe(tmp_path, variants=variants, dense=None), tmp_path / "out").returncode == 0
    curves = {row["variant"]: row["loss_curve"] for row in rows(tmp_path / "out", "results")}
    assert curves["gumbel 0"] == curves["gumbel 5"] != curves["gumbel 1"]
    assert curves["entropy 0"] == curves["entropy 1"]


def test_a_stopped_comparison_goes_on_with_what_is_missing(compare, tmp_path, monkeypatch):
    path, out = recipe(tmp_path), tmp_path / "out"
    step, calls = compare_module.train_step, []

    def stopped_in_the_second_run(*args):
        calls.append(0)
        if len(calls) == 4 + 2:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(compare_module, "train_step", stopped_in_the_second_run)
    assert compare(path, out).returncode == 130
    before = (out / "results.jsonl").read_text()
    assert before.count("\n") == 1 and "dense" in (out / "table.md").read_text()
    done = compare(path, out)
    assert done.returncode == 0 and len(calls) == 6 + 8  # the two that were missing, whole
    assert (out / "results.jsonl").read_text().startswith(before)
    whole = tmp_path / "whole"
    assert compare(path, whole).returncode == 0
    assert list(map(without_times, rows(out, "results"))) == list(map(without_times, rows(whole, "results")))
    count = len(calls)
    assert compare(path, out).returncode == 0 and len(calls) == count  # nothing is missing


def test_rows_of_other_settings_or_data_are_not_taken_for_these(compare, tmp_path, data):
    path, out = recipe(tmp_path), tmp_path / "out"
    assert compare(path, out, "--only", "dense").returncode == 0
    done = compare(path, out, "--only", "dense", "--steps", 5)
    assert done.returncode == 1 and "dense, seed 0: trained with protocol: steps 4, now 5" in done.stderr
    more = recipe(tmp_path, protocol={"augmentation": {"flip": True}})
    assert "trained with protocol: augmentation: shift 2, now 0" in compare(more, out).stderr
    done = compare(recipe(tmp_path), out, val=data / "train")
    assert done.returncode == 1 and "trained on other data" in done.stderr
    assert len(rows(out, "results")) == 1


def test_a_loss_that_is_no_number_ends_its_run_alone(compare, tmp_path):
    path = recipe(tmp_path, protocol={"lr": 1.0e30, "clip_grad": None})
    done = compare(path, tmp_path / "out", "--only", "timm", "dense")
    assert done.returncode == 0, done.stderr
    results = rows(tmp_path / "out", "results")
    assert len(results) == 2 and all(row["diverged"] in (2, 3) and row["top1"] is None for row in results)
    assert "| 0 (1 diverged) |" in (tmp_path / "out" / "table.md").read_text()


def test_the_table_alone_needs_no_data(compare, tmp_path, run_script):
    path, out = recipe(tmp_path), tmp_path / "out"
    assert run_script(SCRIPT, path, "--output", out, "--table").returncode == 1
    assert compare(path, out, "--only", "timm").returncode == 0
    written = (out / "table.md").read_text()
    (out / "table.md").unlink()
    (out / "results.png").unlink()
    assert run_script(SCRIPT, path, "--output", out, "--table").returncode == 0
    assert (out / "table.md").read_text() == written and (out / "results.png").is_file()
    needed = run_script(SCRIPT, path, "--output", out)
    assert needed.returncode == 2 and "--train-data is needed" in needed.stderr
    assert "--only: x is none of the recipe's variants" in compare(path, out, "--only", "x").stderr


# Tables and plots


def made_row(variant: str, seed: int, *top1: float, read_at: list | None = None, tokens: float = 16) -> dict:
    readings = [{"top1": value, "tokens": tokens, "gmacs": 0.1} for value in top1]
    row = {"variant": variant, "seed": seed, "readings": readings, "step_seconds": 0.5, "parameters": 2_000_000}
    return {**row, "settings": {"read_at": read_at}}


def test_means_deviations_and_shares_of_dense():
    found = entries(
        [
            *(made_row("dense", seed, value, tokens=64) for seed, value in ((1, 0.52), (0, 0.50), (2, 0.48))),
            *(made_row("4x", seed, value, value - 0.1, read_at=[4, None]) for seed, value in ((0, 0.47), (1, 0.49))),
            made_row("lost", 0),
        ],
        ["4x", "dense", "absent", "lost"],
        "dense",
    )
    assert [entry.label for entry in found] == ["4x, read at 4x", "4x, read freely", "dense", "lost"]
    first, free, dense, lost = found
    assert dense.seeds == (0, 1, 2) and dense.mean == pytest.approx(0.5) and dense.deviation == pytest.approx(0.02)
    assert first.mean == pytest.approx(0.48) and first.deviation == pytest.approx(0.01 * math.sqrt(2))
    assert first.ratio == pytest.approx(0.96) and free.ratio == pytest.approx(0.76) and lost.diverged == 1
    cells = [cell.strip() for cell in markdown(found, "dense").splitlines()[2].split("|")]
    assert cells[1:-1] == ["4x, read at 4x", "48.00 ± 1.41", "2", "96.0", "16.0", "0.1", "2.00", "0.500"]


def test_points_of_equal_tokens_stand_side_by_side():
    places = side_by_side([16, 64, 16.2, 6.4, 16])
    assert places[1] == 64 and places[3] == 6.4
    together = [places[0], places[2], places[4]]
    assert together == sorted(together) and len(set(together)) == 3 and 15 < together[0] < 16.1 < together[2] < 17.5
    assert len({tuple(look_of(number).values()) for number in range(64)}) == 64


def test_the_plot_shows_each_point_where_it_is(tmp_path):
    points = [TokenPoint("dense", 64, 0.55, 0.01), *(TokenPoint("elastic", n, 0.5, 0.02) for n in (32, 16, 6.4))]
    axes = Figure().subplots()
    draw_token_points(axes, "top-1 accuracy", points, ("dense", 0.55))
    drawn = {bars.get_label(): bars[0].get_xydata().tolist() for bars in axes.containers}
    assert drawn["dense"] == [[64, pytest.approx(55)]]
    assert drawn["elastic"] == [[6.4, 50], [16, 50], [32, 50]]
    assert axes.get_ylim()[0] <= 48 and axes.get_ylim()[1] >= 56
    draw_comparison(tmp_path / "plot.png", "top-1 accuracy", points * 6)
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_comparison(tmp_path / "none.png", "top-1 accuracy", [])
