"""One step, its schedule and its data: averages, repeated augmentation, mixing, accumulation, precision."""

from __future__ import annotations

import math
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3

from llava_drip.classification import data as loaders
from llava_drip.classification.launch import make_optimizer, make_scheduler
from llava_drip.classification.sources import open_source
from llava_drip.classification.step import Objective

from .helpers import MODEL, NAMES, losses, rows, run, weights
from .test_flags import parsed


def schedule(*flags: str, lr: float = 1.0, steps_an_epoch: int = 10) -> list[float]:
    args = parsed("--model=x", "--train-data=x", "--output=y", *flags)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make_scheduler(args, optimizer, lr, steps_an_epoch), []
    for step in range(args.epochs * steps_an_epoch):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_cosine_counts_its_warm_up_and_reaches_the_full_rate():
    rates = schedule("--epochs=300", "--warmup-epochs=30", "--warmup-lr=0")
    assert len(rates) == 3000 and rates[0] == 0 and rates[150] == pytest.approx(0.5)
    assert max(rates) == rates[300] == pytest.approx(1.0)
    expected = [0.5 * (1 + math.cos(math.pi * (step - 300) / 2700)) for step in range(300, 3000)]
    np.testing.assert_allclose(rates[300:], expected, atol=1e-9)


def test_the_other_schedules_fit_the_epochs():
    constant = schedule("--epochs=10", "--warmup-epochs=2", "--sched=constant")
    assert constant[0] == 1e-6 and set(constant[20:]) == {1.0}
    wsd = schedule("--epochs=10", "--warmup-epochs=2", "--sched=wsd", "--min-lr=0.1")
    assert wsd[20] == wsd[50] == 1.0 and 0.1 <= wsd[-1] < 0.3 and wsd[-1] == min(wsd[20:])


def test_layers_below_learn_more_slowly():
    from .test_learning import classifier_of

    flags = [f"--model={MODEL}", "--train-data=x", "--output=y", "--epochs=4", "--warmup-epochs=0", "--layer-decay=0.5"]
    model = classifier_of(f"--model={MODEL}").model
    optimizer = make_optimizer(parsed(*flags), model, 0.1)
    make_scheduler(parsed(*flags), optimizer, 0.1, 5).step_update(0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    at = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert at["head.weight"] == pytest.approx(0.1)
    assert at["blocks.1.norm1.weight"] == pytest.approx(at["blocks.2.norm1.weight"] / 2)
    assert at["patch_embed.proj.weight"] < at["blocks.0.norm1.weight"]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert decays[id(named["head.weight"])] == 0.3 and decays[id(named["head.bias"])] == 0
    assert decays[id(named["pos_embed"])] == decays[id(named["boundary_predictor.size_scale"])] == 0


def test_the_average_is_the_average(flags, tmp_path, monkeypatch):
    seen, update = [], ModelEmaV3.update

    def watched(self: ModelEmaV3, model: torch.nn.Module, step: int) -> None:
        update(self, model, step)
        seen.append({name: value.clone() for name, value in model.model.state_dict().items()})

    monkeypatch.setattr(ModelEmaV3, "update", watched)
    flags = [f"--model={MODEL}", *flags, "--epochs=1", "--batch-size=16", "--model-ema", "--model-ema-decay=0.6"]
    output = run(*flags, f"--output={tmp_path}")
    assert len(seen) == 3
    for name, value in weights(output).items():
        average = seen[0][name]  # the first update takes the weights as they are (timm)
        for later in seen[1:]:
            average = 0.6 * average + 0.4 * later[name]
        torch.testing.assert_close(value, average, atol=1e-6, rtol=1e-5)
    row = rows(output, "epochs")[0]
    assert {"ema_top1", "ema_top5", "top1", "top5"} <= set(row)


def batches_of(data, *flags: str, epoch: int = 0) -> tuple[list, list]:
    """Labels and means of the pixels of an epoch."""
    args = parsed("--model=x", f"--train-data={data}/train", "--output=y", "--workers=0", *flags)
    source = open_source("--train-data", args.train_data, classes=args.classes)
    config = {"input_size": (3, 64, 64), "mean": (0, 0, 0), "std": (1, 1, 1)}
    loader = loaders.training_loader(args, source, loaders.training_transform(args, config), 6, 0, 1, False)
    loader.set_epoch(epoch)
    batches = list(loader)
    return [x.tolist() for _, x in batches], [x.mean((1, 2, 3)).tolist() for x, _ in batches]


@pytest.mark.parametrize("kind", ["train", "shards", "train.parquet"])
def test_repeated_augmentation(kind, data):
    more = [f"--train-data={data}/{kind}", "--batch-size=12", "--aug-repeats=3", "--shuffle-buffer=8"]
    more += [f"--classes={data}/shards/names.txt"] if kind == "shards" else []
    labels, looks = batches_of(data, *more)
    assert [len(batch) for batch in labels] == [12] * 4  # an epoch is as long as without
    for batch in labels:
        assert all(len(set(batch[i : i + 3])) == 1 for i in range(0, 12, 3))
    for batch in looks:
        assert len(set(batch)) == 12  # each copy has its own augmentation
    assert batches_of(data, *more) == (labels, looks)
    assert batches_of(data, *more, epoch=1)[0] != labels


def test_repeats_of_a_folder_show_a_third_of_it_an_epoch(data):
    order = loaders.RepeatedOrder(48, 3, seed=0)(0)
    assert len(order) == 48 and set(Counter(order).values()) == {3}
    assert len(loaders.RepeatedOrder(1000, 3, seed=0)(0)) == 1000  # not rounded to 256


def test_without_repeats_every_picture_comes_once(data):
    labels, looks = batches_of(data, "--batch-size=8")
    assert Counter(sum(labels, [])) == dict.fromkeys(range(6), 8)


def test_the_loss_is_what_the_flags_say():
    logits, labels = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])

    def loss(**flags: float) -> dict:
        args = Namespace(**{"mixup": 0, "cutmix": 0, "smoothing": 0, "rate_loss_weight": 0.5, **flags})
        objective = Objective(args, 6)
        return objective(logits, objective.mix(torch.rand(4, 3, 8, 8), labels)[1], torch.full((4,), 0.2))

    plain = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(loss()["task_loss"], plain)
    torch.testing.assert_close(loss()["loss"], plain + 0.1)
    smooth = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.11)
    torch.testing.assert_close(loss(smoothing=0.11)["task_loss"], smooth)
    objective = Objective(Namespace(mixup=0.2, cutmix=1.0, smoothing=0.11, rate_loss_weight=1), 6)
    pixels, targets = objective.mix(torch.rand(4, 3, 8, 8), labels)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert ((targets > 0.02).sum(1) <= 2).all() and targets.min() == pytest.approx(0.11 / 6)


def test_accumulation_is_a_larger_batch(flags, tmp_path):
    """Without drawn boundaries the two are the same sums."""
    model = [f"--model={MODEL}", "--model-kwargs", "boundary=uniform"]
    one = run(*model, *flags, "--batch-size=16", f"--output={tmp_path}/one")
    two = run(*model, *flags, "--batch-size=4", "--grad-accum-steps=4", f"--output={tmp_path}/two")
    assert len(losses(one)) == 6
    np.testing.assert_allclose(losses(one), losses(two), atol=1e-5)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(two)[name], atol=1e-5, rtol=1e-4)


def test_bf16(flags, tmp_path):
    full = run(f"--model={MODEL}", *flags, "--epochs=1", f"--output={tmp_path}/full")
    half = run(f"--model={MODEL}", *flags, "--epochs=1", "--precision=bf16", f"--output={tmp_path}/half")
    assert losses(full) != losses(half)
    np.testing.assert_allclose(losses(full), losses(half), atol=0.05)
    assert {value.dtype for value in weights(half).values()} == {torch.float32}


def test_top5_of_few_classes_is_of_all(trained):
    assert 0 <= rows(trained, "epochs")[0]["top1"] <= rows(trained, "epochs")[0]["top5"] <= 1
    assert len(NAMES) == 6


def test_gradients_are_clipped_to_their_norm(flags, tmp_path, monkeypatch):
    """With SGD without momentum a step is lr times the gradient: its norm is at most lr times --clip-grad."""
    steps = {}
    flags = [f"--model={MODEL}", *flags, "--epochs=1", "--batch-size=48", "--opt=momentum", "--momentum=0", "--lr=1"]
    flags += ["--weight-decay=0", "--warmup-lr=1"]
    from llava_drip.classification import run as module

    make = module.make_classifier

    def kept(*arguments: object) -> torch.nn.Module:
        classifier = make(*arguments)
        steps["before"] = {name: value.clone() for name, value in classifier.model.state_dict().items()}
        return classifier

    monkeypatch.setattr(module, "make_classifier", kept)
    for clip in (0.01, 0.02, 0):
        after = weights(run(*flags, f"--clip-grad={clip}", f"--output={tmp_path}/{clip}"))
        steps[clip] = math.sqrt(sum(float(((after[n] - v) ** 2).sum()) for n, v in steps["before"].items()))
    assert steps[0.01] == pytest.approx(0.01, rel=1e-2) and steps[0.02] == pytest.approx(0.02, rel=1e-2)
    assert steps[0] > 0.1
