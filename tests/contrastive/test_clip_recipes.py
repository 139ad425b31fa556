"""scripts/recipes/clip_*.yaml: every flag is the program's, and what must hold of the values."""

from __future__ import annotations

import json

import open_clip
import pytest
import yaml
from clip_helpers import ROOT, run_program

from llava_drip.contrastive import register
from llava_drip.contrastive.arguments import parse

RECIPES = sorted((ROOT / "scripts" / "recipes").glob("clip_*.yaml"))


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} == {"clip_laion26m", "clip_laion280m", "clip_continual", "clip_cpu"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_programs_parser_takes_it(path):
    register()
    args = parse([str(path), "--train-data", "x.tar"])
    for key, value in yaml.safe_load(path.read_text()).items():
        parsed = getattr(args, key.replace("-", "_"))
        assert parsed == value and type(parsed) is type(value), key
    assert args.model in open_clip.list_models()
    assert (args.beta2, args.eps) == (0.98, 1e-6)  # a ViT's
    assert parse([str(path), "--train-data", "x.tar", "--lr=1e-4"]).lr == 1e-4  # later flags win
    head = path.read_text().split("model:")[0]
    assert all(line.startswith("#") for line in head.splitlines()) and f"scripts/recipes/{path.name}" in head
    if args.device != "cpu":
        assert "torchrun --nproc_per_node 4 -- scripts/train_clip.py" in head and "torchrun --nnodes 2" in head
        assert (args.batch_size, args.precision, args.wd) == (512, "amp_bf16", 0.2)
        assert args.local_loss and args.gather_with_grad and args.save_every_n_steps > 0


def test_the_cpu_recipe_runs(data, tmp_path):
    """On 48 pairs instead of thousands."""
    flags = ["--train-data", str(data / "train-{0..1}.tar"), "--train-num-samples", "48", "--batch-size", "8"]
    flags += ["--logs", str(tmp_path), "--name", "mini", "--epochs", "1", "--retrieval-data", str(data / "train-0.tar")]
    result = run_program("scripts/train_clip.py", "scripts/recipes/clip_cpu.yaml", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    (row,) = [json.loads(line) for line in (tmp_path / "mini" / "epochs.jsonl").read_text().splitlines()]
    assert row["compression"] > 1 and 0 <= row["image_to_text_R@1"] <= row["image_to_text_R@10"] <= 1
