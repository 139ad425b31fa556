"""The command line: recipes hold what they promise, every flag is read somewhere, mistakes are named in one line."""

from __future__ import annotations

import ast
from argparse import Namespace

import pytest
import yaml

from llava_drip.classification.arguments import make_parser, parse, parse_lr_finder
from llava_drip.classification.launch import learning_rate

from .helpers import MODEL, ROOT, fresh, run

RECIPES = sorted((ROOT / "scripts" / "recipes").glob("imagenet_*.yaml"))


def parsed(*flags: str) -> Namespace:
    return parse([str(flag) for flag in flags], "train_imagenet.py", "help")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_for_both_programs(recipe):
    needed = ["--train-data=x", "--output=y"]
    if "model" not in yaml.safe_load(recipe.read_text()):
        needed.append("--model=z")
    args = parsed(recipe, *needed)
    for key, value in yaml.safe_load(recipe.read_text()).items():
        assert getattr(args, key.replace("-", "_")) == value, key
    finder = parse_lr_finder([str(recipe), *needed], "lr_finder.py", "help")
    assert (finder.batch_size, finder.weight_decay, finder.output) == (args.batch_size, args.weight_decay, "y")


def test_from_scratch_is_the_published_recipe():
    args = parsed(ROOT / "scripts/recipes/imagenet_scratch.yaml", "--train-data=x", "--output=y")
    expected = {
        "epochs": 300,
        "opt": "adamw",
        "lr": None,
        "lr_base": 3e-3,
        "lr_base_size": 4096,
        "weight_decay": 0.3,
        "sched": "cosine",
        "warmup_epochs": 30,
        "smoothing": 0.11,
        "mixup": 0.2,
        "cutmix": 1.0,
        "clip_grad": 1.0,
        "model_ema": True,
    }
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.aa.startswith("rand-") and args.aug_repeats > 1


def test_the_other_recipes():
    frozen = parsed(ROOT / "scripts/recipes/imagenet_probe.yaml", "--train-data=x", "--output=y")
    full = parsed(ROOT / "scripts/recipes/imagenet_finetune.yaml", "--train-data=x", "--output=y")
    size = parsed(ROOT / "scripts/recipes/imagenet_384.yaml", "--train-data=x", "--output=y", "--model=z")
    assert (frozen.freeze, frozen.epochs, full.freeze, full.epochs) == ("backbone", 30, "none", 30)
    assert frozen.model == full.model == "vit_base_patch32_clip_224.laion2b" and full.pretrained
    assert size.img_size == 384 and not size.pretrained
    pruned = parsed(ROOT / "scripts/recipes/imagenet_dynamicvit.yaml", "--train-data=x", "--output=y")
    assert (pruned.epochs, pruned.backbone_freeze_epochs, pruned.backbone_lr_scale) == (30, 5, 0.01)
    assert pruned.init_from_teacher and learning_rate(pruned, 1024) == 1e-3


def test_learning_rate_follows_the_batch():
    args = parsed("--model=x", "--train-data=x", "--output=y")
    assert learning_rate(args, 4096) == 3e-3 and learning_rate(args, 512) == pytest.approx(3e-3 / 8)
    args.lr_base_scale = "sqrt"
    assert learning_rate(args, 1024) == pytest.approx(1.5e-3)
    args.lr = 0.1
    assert learning_rate(args, 1024) == 0.1


def test_every_flag_is_read_by_what_runs():
    """Not by the parser, nor by the checks of it: by data, model, step, schedule or run."""
    read = set()
    for path in (ROOT / "llava_drip" / "classification").glob("*.py"):
        if path.name in ("arguments.py", "checks.py", "record.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "args":
                read.add(node.attr)
    flags = {action.dest for action in make_parser("x", "y")._actions} - {"help"}
    assert flags - read == set()


MISTAKES = {
    "--batch-size=7 --mixup=0.2": "--mixup, --cutmix: they mix pairs, --batch-size 7 must be even",
    "--epochs=3 --warmup-epochs=3": "--warmup-epochs 3 must be fewer than --epochs 3",
    "--smoothing=1.5": "--smoothing must be between 0 and 1, got 1.5",
    "--lr=0": "--lr must be above 0, got 0.0",
    "--lr=nan": "--lr must be above 0, got nan",
    "--scale 0.9 0.1": "--scale must be two rising numbers above 0 and at most 1, got 0.9 0.1",
    "--crop-pct=0": "--crop-pct must be above 0 and at most 1, got 0.0",
    "--fsdp": "--fsdp: one process has nothing to divide",
    "--fsdp --model-ema": "--model-ema: not with --fsdp",
    "--pretrained --initial-checkpoint=x": "--pretrained, --initial-checkpoint: both name",
    "--freeze=backbone --grad-checkpointing": "--grad-checkpointing: a frozen backbone",
    "--lerning-rate=1": "unrecognized arguments: --lerning-rate=1",
    "--workers=-1": "--workers must be at least 0, got -1",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_flag_is_one_line(mistake, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(f"--model={MODEL}", "--train-data=x", "--output=y", *mistake.split())
    printed = capsys.readouterr().err
    assert end.value.code == 2 and len(printed.splitlines()) == 1 and MISTAKES[mistake] in printed


LATER = {
    "--model=vit_nonsense": "--model: vit_nonsense is neither a directory nor a model name",
    "--model={data}": "--model: .* holds no tower",
    "--model-kwargs=depth": "--model-kwargs: 'depth' is not KEY=VALUE",
    "--model-kwargs=num_classes=5": "num_classes is no argument to give",
    "--model-kwargs depht=3": "--model: .*depht",
    "--model-kwargs size_bias=maybe": "--model: .*size_bias must be True or False, got 'maybe'",
    "--compression=2 --model-kwargs compression=4": "--model-kwargs: compression has a flag of its own",
    "--img-size=64 --model-kwargs img_size=32": "--model-kwargs: img_size has a flag of its own",
    "--model=vit_tiny_patch16_224 --compression=2": "--model: vit_tiny_patch16_224.*compression",
    "--initial-checkpoint=none.pt": "--initial-checkpoint: no file none.pt",
    "--train-data={data}/nothing.tar": "--train-data: no shard .*nothing.tar",
    "--train-data={data}/shards": "--classes is needed",
    "--val-data={data}/odd": "--val-data: class 'blue_ellipse' is in --train-data, but not in --val-data",
    "--classes={data}/two.txt": "--train-data: .*6 class folders, but --classes has 2 names",
    "--opt=adamm": "--opt: no optimizer 'adamm'",
    "--opt-betas 2 2": "--opt adamw: Invalid beta",
    "--aa=nonsense": "--aa nonsense: timm makes no augmentation of it",
    "--batch-size=64": "--train-data: 48 pictures do not fill a step of 64",
    "--train-num-samples=9": "--train-num-samples: of shards; .* is an image folder",
    "--label-key=cls": "--train-data: .* leave out --label-key",
    "--min-lr=1": "--min-lr 1 is above the learning rate 0.001",
    "--device=cuda:1": "--device cuda:1: cpu or cuda",
    "--precision=fp16": "--precision fp16: of GPUs",
    "--lr=1e9 --opt=sgd --clip-grad=0 --epochs=9": "the loss is nan at step .* lower the learning rate",
}


@pytest.mark.parametrize("mistake", LATER)
def test_a_wrong_value_is_named(mistake, data, flags, tmp_path):
    (data / "odd" / "purple").mkdir(parents=True, exist_ok=True)
    (data / "odd" / "purple" / "0.jpg").write_bytes(b"")
    (data / "two.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=LATER[mistake]) as error:
        run(f"--model={MODEL}", *flags, f"--output={tmp_path}/out", *mistake.format(data=data).split())
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_the_program_prints_one_line(tmp_path, run_script):
    flags = ["--model=x", f"--train-data={tmp_path}", f"--output={tmp_path}/out"]
    result = run_script(ROOT / "scripts" / "train_imagenet.py", *flags)
    fresh()
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("train_imagenet.py: error: --train-data: ")
