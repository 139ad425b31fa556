"""A teacher beside the labels: what it sees, the four losses of DynamicViT, the predictors' own rates; and what is refused."""

from __future__ import annotations

import copy
import math
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from llava_drip.classification.arguments import parse_lr_finder
from llava_drip.classification.launch import hold_backbone, make_optimizer, make_scheduler
from llava_drip.classification.lr_finder import range_test
from llava_drip.classification.run import make_classifier, make_objective
from llava_drip.classification.teacher import TaughtClassifier, Teacher, loss_weights
from llava_drip.towers.io import save_tower

from .helpers import MODEL, NAMES, TORCHRUN, program, rows, run, weights
from .test_flags import parsed

DYNAMIC = "dynamicvit_mini_patch8_64"
PREDICTOR = "score_predictor."
VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A plain ViT of timm's with random weights, whose pixels are normalised in its own way."""
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=6, **VIT)
    model.model_args = VIT
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return save_tower(model, tmp_path_factory.mktemp("teacher"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def taught(teacher: Path, *flags: str) -> tuple[TaughtClassifier, Namespace]:
    given = [f"--model={DYNAMIC}", f"--teacher={teacher}", "--train-data=x", "--output=y", *flags]
    args = parsed(*given)
    return make_classifier(args, len(NAMES)), args


def pictures(n: int) -> Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def test_the_teacher_sees_the_pictures_as_it_was_trained(teacher):
    classifier, _ = taught(teacher)
    x, own = pictures(2), timm.create_model(f"local-dir:{teacher}", pretrained=True).eval()
    config = classifier.model.pretrained_cfg
    raw = x * torch.tensor(config["std"])[:, None, None] + torch.tensor(config["mean"])[:, None, None]
    seen = (raw - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    logits, patches = classifier.teacher(x)
    torch.testing.assert_close(logits, own(seen), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(patches, own.forward_features(seen)[:, 1:], atol=1e-5, rtol=1e-4)


def test_the_losses_are_the_papers(teacher):
    """Recomputed from padded features and masks, as the official code has them."""
    classifier, args = taught(teacher)
    x, labels = pictures(4), torch.tensor([0, 3, 5, 1])
    classifier.train()
    torch.manual_seed(5)
    outputs, rate_loss, lengths = classifier(x)
    losses = make_objective(args, classifier)(outputs, labels, rate_loss)
    torch.manual_seed(5)
    tokens = classifier.model.forward_features(x)
    logits, (teacher_logits, patches) = classifier.model.forward_head(tokens), classifier.teacher(x)
    assert torch.equal(lengths, tokens.lengths) and len(set(lengths.tolist())) > 1
    kept = tokens.segments >= 0
    squares = (tokens.unpool() - patches).square().mean(-1)
    expected = {
        "task_loss": F.cross_entropy(logits, labels),
        "rate_loss": tokens.rate_loss.mean(),
        "logits_loss": (teacher_logits.softmax(1) * (teacher_logits.log_softmax(1) - logits.log_softmax(1))).sum() / 4,
        "tokens_loss": squares[kept].mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)
    official = {"task_loss": 1.0, "rate_loss": 2.0, "logits_loss": 0.5, "tokens_loss": 0.5}
    torch.testing.assert_close(losses["loss"], sum(official[name] * value for name, value in expected.items()))
    assert set(losses) == {"loss", *official}
    other, args = taught(
        teacher,
        *("--rate-loss-weight=3", "--classification-loss-weight=0", "--distill-logits-loss-weight=4"),
        "--distill-tokens-loss-weight=0",
    )
    torch.manual_seed(5)
    outputs, rate_loss, _ = other.train()(x)
    losses = make_objective(args, other)(outputs, labels, rate_loss)
    expected = 3 * losses["rate_loss"] + 4 * losses["logits_loss"]
    torch.testing.assert_close(losses["loss"], expected)
    assert "tokens_loss" not in losses


def test_in_evaluation_there_is_no_teacher(teacher):
    classifier, _ = taught(teacher)
    outputs, rate_loss, lengths = classifier.eval()(pictures(3))
    assert outputs.shape == (3, 6) and rate_loss is None and lengths.tolist() == [31] * 3
    assert not any("teacher" in name for name in classifier.state_dict())
    assert copy.deepcopy(classifier).teacher is classifier.teacher


def test_a_run_with_a_teacher(teacher, flags, tmp_path):
    """From the teacher's weights; the backbone waits for the predictors, then learns slowly; goes on exactly after a stop."""
    flags = [f"--model={DYNAMIC}", f"--teacher={teacher}", "--init-from-teacher", *flags, "--mixup=0.2"]
    flags += ["--backbone-freeze-epochs=1", "--backbone-lr-scale=0.01", "--weight-decay=0.1", "--lr=1e-2"]
    begun = weights(teacher, ".")
    output = run(*flags, f"--output={tmp_path}/whole", "--keep-checkpoints=2")
    first = load_file(output / "checkpoints" / "step-6" / "model.safetensors")
    assert not any("teacher" in name for name in first)
    for name, value in begun.items():
        assert torch.equal(first[f"model.{name}"], value), name  # an epoch has passed
    last = weights(output)
    moved = {name: (last[name] - value).abs().max().item() for name, value in begun.items()}
    assert 0 < moved["blocks.0.mlp.fc1.weight"] < 6 * 1.1e-4  # six steps of Adam at a hundredth of the rate
    assert (last[f"{PREDICTOR}0.out_conv.4.bias"]).abs().max() > 1e-2
    for row in rows(output):
        total = row["task_loss"] + 2 * row["rate_loss"] + 0.5 * (row["logits_loss"] + row["tokens_loss"])
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    assert rows(output, "epochs")[-1]["tokens"] == 31 and {"top1", "train_tokens"} <= set(rows(output, "epochs")[0])

    shutil.copytree(output, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-12")
    again = run(*flags, f"--output={tmp_path}/again", "--keep-checkpoints=2", "--resume")
    for name, value in weights(again).items():
        assert torch.equal(value, last[name]), name


@pytest.mark.slow
def test_two_processes_train_what_one_would(teacher, flags, tmp_path):
    """Draws, ratio loss, logits and rates; the tokens' mean is over a process's own."""
    flags = [f"--model={DYNAMIC}", f"--teacher={teacher}", *flags, "--epochs=1", "--distill-tokens-loss-weight=0"]
    flags += ["--backbone-freeze-epochs=0.5", "--backbone-lr-scale=0.5"]
    one = run(*flags, "--batch-size=16", f"--output={tmp_path}/one")
    result = program(*TORCHRUN, "scripts/train_imagenet.py", *flags, "--batch-size=8", f"--output={tmp_path}/two")
    assert result.returncode == 0, result.stderr[-3000:]
    for ours, theirs in zip(rows(tmp_path / "two"), rows(one), strict=True):
        for name in ("loss", "rate_loss", "logits_loss", "train_tokens", "lr"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, atol=2e-4, rtol=0)


def test_a_run_teaches_another(flags, tmp_path):
    """A dense DynamicViT that this program has trained; the average of the weights beside it."""
    dense = run(f"--model={DYNAMIC}", "--compression=1", *flags, "--epochs=1", f"--output={tmp_path}/dense")
    assert "rate_loss" not in rows(dense)[0]
    flags = [f"--model={DYNAMIC}", f"--teacher={dense}", *flags, "--epochs=1", "--model-ema", "--model-ema-warmup"]
    output = run(*flags, "--compression=4", f"--output={tmp_path}/taught")
    row = rows(output, "epochs")[0]
    assert row["tokens"] == 16 and {"ema_top1", "tokens_loss", "logits_loss", "rate_loss"} <= set(row)


@pytest.mark.parametrize(
    "student", [f"{MODEL} --model-kwargs class_token=True scan=hilbert", "resnet10t --img-size=64"]
)
def test_other_students(teacher, student):
    """A DRIP's tokens are compared with means over their segments; a CNN has none."""
    cnn = "resnet" in student
    flags = f"--model={student}".split() + (["--distill-tokens-loss-weight=0"] if cnn else [])
    classifier, args = taught(teacher, *flags)
    outputs, rate_loss, _ = classifier.train()(pictures(3))
    losses = make_objective(args, classifier)(outputs, torch.tensor([0, 1, 2]), rate_loss)
    assert ("tokens_loss" in losses) != cnn and args.rate_loss_weight == (1.0 if cnn else 5.0)
    losses["loss"].backward()
    if cnn:
        return
    torch.manual_seed(0)
    outputs, *_ = classifier(pictures(3))
    torch.manual_seed(0)
    tokens, (_, patches) = classifier.model.forward_features(pictures(3)), classifier.teacher(pictures(3))
    of_first = patches[0][tokens.segments[0] == 0].mean(0)
    torch.testing.assert_close(outputs["teacher_tokens"][0], of_first)


def test_rates_of_the_backbone_and_of_the_predictors():
    flags = ["--train-data=x", "--output=y", f"--model={DYNAMIC}", "--epochs=10", "--warmup-epochs=0", "--min-lr=1e-5"]
    args = parsed(*flags, "--backbone-lr-scale=0.1", "--backbone-freeze-epochs=2")
    model = make_classifier(args, 6).model
    optimizer = make_optimizer(args, model, 1.0)
    scheduler, named = make_scheduler(args, optimizer, 1.0, 5), dict(model.named_parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)

    def rates(step: int) -> dict[str, tuple[float, float]]:
        scheduler.step_update(step)
        hold_backbone(args, optimizer, 1.0, step / 5)
        return {
            name: (group["lr"], group["weight_decay"])
            for name, parameter in named.items()
            for group in optimizer.param_groups
            if any(parameter is other for other in group["params"])
        }

    for step in (0, 9, 10, 25, 49):
        got = rates(step)
        full = got[f"{PREDICTOR}0.out_conv.2.weight"][0]
        assert full == pytest.approx(1e-5 + (1 - 1e-5) * 0.5 * (1 + math.cos(math.pi * step / 50)))
        backbone = 0.0 if step < 10 else min(0.1, full)
        assert got["blocks.0.mlp.fc1.weight"] == (backbone, 0.3) and got["head.bias"] == (backbone, 0)
        assert got[f"{PREDICTOR}1.in_conv.0.bias"] == (full, 0) and got["pos_embed"] == (backbone, 0)


def test_the_range_test_takes_the_teacher(teacher, data, tmp_path):
    flags = [f"--model={DYNAMIC}", f"--teacher={teacher}", f"--train-data={data}/train", "--batch-size=8", "--steps=20"]
    flags += ["--device=cpu", "--precision=fp32", "--workers=0", "--backbone-lr-scale=0.01", f"--output={tmp_path}/x"]
    result, _ = range_test(parse_lr_finder(flags, "lr_finder.py", "help"), tmp_path)
    assert len(result.lrs) == len(result.losses) >= 10 and all(math.isfinite(loss) for loss in result.losses[:10])


ALONE = {
    "--classification-loss-weight=2": "--classification-loss-weight: has no meaning without --teacher",
    "--distill-tokens-loss-weight=0": "--distill-tokens-loss-weight: has no meaning without --teacher",
    "--init-from-teacher": "--init-from-teacher: has no meaning without --teacher",
    "--teacher=x --distill-logits-loss-weight=-1": "--distill-logits-loss-weight must be at least 0",
    "--teacher=x --distill-logits-loss-weight=0 --distill-tokens-loss-weight=0": "so --teacher teaches nothing",
    "--teacher=x --init-from-teacher --pretrained": "--init-from-teacher, --pretrained: both name the weights",
    "--backbone-lr-scale=2": "--backbone-lr-scale must be between 0 and 1",
    "--backbone-lr-scale=0.1 --layer-decay=0.5": "--backbone-lr-scale, --layer-decay",
    "--backbone-freeze-epochs=1 --freeze=backbone": "--backbone-freeze-epochs: --freeze backbone",
    "--backbone-freeze-epochs=300": "--backbone-freeze-epochs 300 must be fewer than --epochs 300",
}


@pytest.mark.parametrize("mistake", ALONE)
def test_a_wrong_flag_is_one_line(mistake, capsys):
    with pytest.raises(SystemExit):
        parsed(f"--model={DYNAMIC}", "--train-data=x", "--output=y", *mistake.split())
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1 and ALONE[mistake] in printed


BESIDE = {
    "--model=vit_tiny_patch16_224 --img-size=64": "the student, a VisionTransformer, gives no tokens; give 0",
    "--model-kwargs embed_dim=48": "the teacher has 64 patches of width 96, the student 64 of 48; give 0",
    "--model-kwargs patch_size=16": "the teacher has 64 patches of width 96, the student 16 of 96",
    "--freeze=backbone": "--distill-tokens-loss-weight: no token learns beside --freeze backbone",
    "--img-size=96": "--teacher: sees pictures of 64x64 pixels, the student of 96x96; see --img-size",
    "--init-from-teacher --model-kwargs depth=5": "--init-from-teacher: teacher and student differ in 12 weights, blocks.4",
    "--teacher=nonsense": "--teacher: nonsense: neither a directory",
    f"--teacher={DYNAMIC}": "--teacher: dynamicvit_mini_patch8_64: cannot be loaded by timm",
}


@pytest.mark.parametrize("mistake", BESIDE)
def test_a_teacher_that_does_not_fit_is_named(mistake, teacher):
    with pytest.raises(ValueError, match="(?s)^--") as error:
        taught(teacher, *mistake.split())
    assert BESIDE[mistake] in str(error.value) and "\n" not in str(error.value)


def test_teachers_of_other_classes_or_none(teacher):
    args = parsed(f"--model={DYNAMIC}", f"--teacher={teacher}", "--train-data=x", "--output=y")
    with pytest.raises(ValueError, match="--teacher: has 6 classes, --train-data 3"):
        make_classifier(args, 3)
    student = timm.create_model(DYNAMIC, num_classes=6)
    with pytest.raises(ValueError, match="without classes"):
        Teacher(timm.create_model(DYNAMIC, num_classes=0), student)
    pruned = Teacher(timm.create_model(DYNAMIC, num_classes=6), student)
    assert pruned(pictures(1))[1] is None  # not all of its patches are left
    with pytest.raises(
        ValueError, match="--distill-tokens-loss-weight: the teacher, a DynamicViT, does not give all patches"
    ):
        TaughtClassifier(student, pruned, tokens=True)
    plain = make_optimizer, parsed("--model=x", "--train-data=x", "--output=y", "--backbone-lr-scale=0.1")
    with pytest.raises(ValueError, match="--backbone-lr-scale, .*: a VisionTransformer has no predictors"):
        plain[0](plain[1], timm.create_model("vit_tiny_patch16_224", **VIT), 1.0)


def test_the_papers_weights_are_the_defaults():
    args = parsed("--model=x", "--teacher=y", "--train-data=x", "--output=y")
    assert loss_weights(args) == {"classification": 1.0, "distill_logits": 0.5, "distill_tokens": 0.5}
    args = parsed(f"--model={MODEL}", "--train-data=x", "--output=y")
    make_classifier(args, 6)
    assert args.rate_loss_weight == 5.0
    args = parsed(f"--model={DYNAMIC}", "--train-data=x", "--output=y")
    make_classifier(args, 6)
    assert args.rate_loss_weight == 2.0
