"""scripts/draw_boundaries.py on towers by name, by directory and by run, and what it says to mistakes."""

from __future__ import annotations

import shutil
from itertools import takewhile

import numpy as np
import pytest
from PIL import Image

MINI = "drip_mini_patch8_64_4x"
LEARNED = "tokenlearner_mini_patch8_64"


@pytest.fixture
def photos(tmp_path):
    """Two pictures of one name in different folders, the second a grey PNG of another shape."""
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "photo.jpg", tmp_path / "other" / "photo.png"]
    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(paths[0])
    Image.fromarray(pixels[:, :50, 0]).save(paths[1])
    return paths


@pytest.fixture
def draw(run_script, repository):
    return lambda *arguments: run_script(repository / "scripts" / "draw_boundaries.py", *arguments)


def test_one_figure_an_image_the_same_for_a_seed(draw, photos, tmp_path):
    call = [
        *photos,
        "--model",
        MINI,
        MINI,
        "--labels",
        "one",
        "two",
        "--compression",
        2,
        4.5,
        "--unlimited",
        "--unpool",
    ]
    first = draw(*call, "--output", tmp_path / "a")
    assert first.returncode == 0, first.stderr
    assert "random" in first.stderr and MINI in first.stderr and first.stdout.startswith("wrote ")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["photo-2.png", "photo.png"]
    assert draw(*call, "--output", tmp_path / "b").returncode == 0
    assert draw(*call, "--seed", 1, "--output", tmp_path / "c").returncode == 0
    for name in ("photo.png", "photo-2.png"):
        one, same, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert one == same and one != other


def test_saved_towers_and_runs_are_what_they_are(draw, photos, tiny_tower, tmp_path):
    shutil.copytree(tiny_tower, tmp_path / "run" / "tower")
    by_directory = draw(photos[0], "--model", tiny_tower, "--labels", "t", "--output", tmp_path / "new" / "a.png")
    assert by_directory.returncode == 0 and by_directory.stderr == "", by_directory.stderr
    by_run = draw(photos[0], "--model", tmp_path / "run", "--labels", "t", "--seed", 5, "--output", tmp_path / "b.png")
    assert by_run.returncode == 0, by_run.stderr
    assert (tmp_path / "new" / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()  # no seed in saved weights
    other = draw(
        photos[0],
        "--model",
        tiny_tower,
        "--labels",
        "t",
        "--model-kwargs",
        "img_size=96",
        "--output",
        tmp_path / "b.png",
    )
    assert other.returncode == 0, other.stderr
    assert (tmp_path / "new" / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_where_learned_tokens_look(draw, photos, tmp_path):
    done = draw(*photos, "--model", LEARNED, LEARNED, "--model-kwargs", "version=1.0", "--output", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["photo-2.png", "photo.png"]


def test_a_plain_tower_beside_one_that_pools(draw, photos, tmp_path):
    """The same at each budget."""
    drawn = draw(photos[0], "--model", "plain_vit_mini_patch8_64", MINI, "--unpool", "--output", tmp_path / "a.png")
    assert drawn.returncode == 0 and (tmp_path / "a.png").is_file(), drawn.stderr


def test_a_senatra_is_drawn_by_its_maps(draw, photos, tmp_path):
    call = [*photos, "--model", "senatra_mini_64", "--model-kwargs", "num_classes=4", "--output", tmp_path / "out"]
    assert draw(*call).returncode == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["photo-2.png", "photo.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "senatra_mini_64", "--compression", 4],
            "--compression: senatra_mini_64 has a fixed number of tokens",
        ),
        (["--model", "senatra_mini_64", "--unlimited"], "--unlimited: senatra_mini_64 has a fixed number of tokens"),
        (["--model", "senatra_mini_64", MINI], "--model: of senatra_mini_64 grouping layers are drawn, of"),
        (["--compression", 2, 0.5], "--compression 0.5: must be at least 1"),
        (["--compression", "nan"], "--compression nan: must be at least 1"),
        (["--compression", "inf"], "--compression inf: must be at least 1 (patches per token), and finite"),
        (["--labels", "a", "b"], "--labels: 2 for 1 models"),
        (["--output", "drawing.gif"], "--output drawing.gif: must be a folder, or end in .png, .svg, .pdf"),
        (["--model", "no_such_tower"], "no_such_tower: neither a tower directory nor a model name that timm knows"),
        (["--model", "resnet18"], "resnet18: not a vision tower"),
        (["--model", "vit_tiny_patch16_224"], "vit_tiny_patch16_224: cannot be loaded by timm"),
        (["--model", MINI, LEARNED], f"--model: of {MINI} segments at a budget are drawn, of {LEARNED} maps"),
        (["--model", LEARNED, "--compression", 4], f"--compression: {LEARNED} has a fixed number of tokens"),
        (
            ["--model", "plain_vit_mini_patch8_64", "--compression", 4],
            "plain_vit_mini_patch8_64 has no adjustable token budget",
        ),
        (["--model", LEARNED, "--unpool"], f"--unpool: {LEARNED} has a fixed number of tokens"),
        (["--model", "{empty}"], "empty holds no tower (config.json and model.safetensors)"),
        (["--model-kwargs", "img_size"], "--model-kwargs: 'img_size' is not KEY=VALUE"),
        (["--model-kwargs", "colour=3"], "colour"),
        (["--device", "quantum"], "device quantum: not available here"),
        (["{empty}/missing.jpg"], "missing.jpg: no such image file"),
        (["{broken}"], "broken.jpg: not a readable picture"),
        (["{photo}", "--output", "one.png"], "--output one.png: a file holds one image, 2 are given"),
    ],
)
def test_mistakes_are_one_line(draw, photos, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_text("no picture")
    places = {"empty": tmp_path / "empty", "broken": tmp_path / "broken.jpg", "photo": photos[1]}
    arguments = [str(argument).format(**places) for argument in arguments]
    model = [] if "--model" in arguments else ["--model", MINI]
    images = list(takewhile(lambda argument: not argument.startswith("--"), arguments))
    result = draw(photos[0], *images, *model, *arguments[len(images) :])
    assert result.returncode not in (0, None)
    lines = [line for line in result.stderr.splitlines() if "random" not in line]
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("draw_boundaries.py: error: "), result.stderr
    assert result.stdout == "" and not list(tmp_path.glob("**/*.partial"))
