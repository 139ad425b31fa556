"""Towers trained by one protocol, a row for each variant and seed: what scripts/compare_towers.py runs.

For one seed all variants see the same pictures in the same order, augmented alike, and start from the same random state.
"""

from __future__ import annotations

import datetime
import logging
import platform
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from tqdm import tqdm

from llava_drip.classification.compare_recipe import Comparison, Protocol, Variant
from llava_drip.classification.evaluate import evaluate
from llava_drip.classification.in_memory import Data, evaluation_batches, load_data
from llava_drip.classification.launch import make_accelerator
from llava_drip.classification.model import Classifier, build
from llava_drip.classification.step import Objective, train_step
from llava_drip.towers.contract import check_budget
from llava_drip.training.meters import StepClock
from llava_drip.training.records import Records
from llava_drip.training.rows import shuffled
from llava_drip.training.seeds import seed_of, seed_step

log = logging.getLogger("llava_drip.compare")
RESULTS = "results.jsonl"
CURVE = 20  # parts of training whose mean losses are kept
_LOOK = 10  # steps between looks at the loss, each of which waits for a GPU

MacCounter = Callable[[nn.Module, float | None], float]


def make_model(variant: Variant, img_size: int, num_classes: int) -> nn.Module:
    """ValueError naming the variant: no such model, or an argument that it does not take."""
    try:
        model = build(variant.model, variant.arguments, num_classes, img_size=img_size)
        if variant.read_at is not None:
            check_budget(model, f"read_at: a {type(model).__name__}")
    except ValueError as error:
        raise ValueError(f"variant {variant.name}: {error}") from error
    return model


def check_variants(comparison: Comparison, names: Sequence[str], num_classes: int) -> None:
    """Makes each model without memory, so that a mistake in the last is told before the first is trained."""
    for name in names:
        with torch.device("meta"):
            make_model(comparison.variants[name], comparison.protocol.img_size, num_classes)


def finished_rows(records: Records, comparison: Comparison, data: dict | None = None) -> dict[tuple[str, int], dict]:
    """(variant, seed) → its row, of the recipe's variants. data: what Data.record says now.

    Raises:
        ValueError: a row that was trained with other settings than the recipe has now, or on other data.
    """
    rows = {}
    for row in records.read():
        name = row.get("variant")
        if name not in comparison.variants:  # of a recipe that had more of them
            continue
        where = f"{records.path}: {name}, seed {row['seed']}"
        settings = comparison.settings(name)
        for key, before, now in _differences(row["settings"], settings):
            raise ValueError(
                f"{where}: trained with {key} {before}, now {now}; give another --output or the variant another name"
            )
        if data is not None and row["data"] != data:
            raise ValueError(f"{where}: trained on other data (pictures or classes differ); give another --output")
        rows[name, row["seed"]] = row
    return rows


def _differences(before: dict, now: dict, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    for key in {**before, **now}:
        ours, theirs = before.get(key), now.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differences(ours, theirs, f"{prefix}{key}: ")
        elif ours != theirs:
            yield f"{prefix}{key}", ours, theirs


def compare(
    comparison: Comparison,
    names: Sequence[str],
    args: Namespace,
    command: list[str],
    count_macs: MacCounter,
    after_each: Callable[[], None],
) -> None:
    """Trains what is missing in OUTPUT/results.jsonl, seed after seed, so that all variants are there soon.

    Args:
        names: of variants, in this order.
        args: the data flags (load_data), output, seeds, device.
        count_macs: (model, tokens of an image or None) → multiply-accumulates of an image.
        after_each: called when a row has been written.
    Raises:
        ValueError: a mistake in recipe or data, or rows there that do not belong to them.
    """
    output = Path(args.output).expanduser()
    protocol = comparison.protocol
    flags = Namespace(report_to=[], device=args.device, precision=protocol.precision, grad_accum_steps=1)
    accelerator = make_accelerator(flags, output)
    if accelerator.num_processes > 1:
        raise ValueError(f"a comparison is for one process, not {accelerator.num_processes}; start one for each --only")
    records = Records(output / RESULTS)
    finished_rows(records, comparison)  # mistakes before minutes of reading
    data = load_data(args, protocol.img_size, accelerator.device)
    if len(data.train) < protocol.batch_size:
        raise ValueError(f"--train-data: {len(data.train):,} pictures do not fill a batch of {protocol.batch_size}")
    check_variants(comparison, names, len(data.names))
    output.mkdir(parents=True, exist_ok=True)
    cells = [(name, seed) for seed in args.seeds for name in names]
    done = finished_rows(records, comparison, data.record())
    todo = [cell for cell in cells if cell not in done]
    log.info(
        f"{len(data.train):,} pictures to train on, {len(data.val):,} to evaluate, {len(data.names)} classes; "
        f"{len(cells)} runs, {len(cells) - len(todo)} of them finished before"
    )
    spent = []  # seconds of each run
    for number, (name, seed) in enumerate(todo, 1):
        if (name, seed) in finished_rows(records, comparison, data.record()):
            continue  # by another process with the same --output
        title = f"{number}/{len(todo)} {name}, seed {seed}"
        if spent and number < len(todo):
            log.info(f"about {statistics.fmean(spent) * (len(todo) - number + 1) / 60:.0f} min left for all runs")
        row = train_variant(comparison, name, seed, data, accelerator, count_macs, title)
        spent.append(row["seconds"])
        records.add({**row, "command": command})
        accelerator.free_memory()
        after_each()


def train_variant(
    comparison: Comparison,
    name: str,
    seed: int,
    data: Data,
    accelerator: Accelerator,
    count_macs: MacCounter,
    title: str = "",
) -> dict:
    """One run: its row of results.jsonl. A loss that is no number ends it: "diverged" is the step, "readings" is empty."""
    began = time.perf_counter()
    protocol, variant, settings = comparison.protocol, comparison.variants[name], comparison.settings(name)
    seed_step(seed, "model")
    classifier = Classifier(make_model(variant, protocol.img_size, len(data.names))).to(accelerator.device)
    macs = count_macs(classifier.model, None)  # before training: a model that it cannot count costs no run
    optimizer = create_optimizer_v2(
        classifier.model, "adamw", lr=protocol.lr, weight_decay=protocol.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(classifier, optimizer)
    weight = settings["protocol"]["rate_loss_weight"]
    weight = getattr(classifier.model, "rate_loss_weight", 1.0) if weight is None else weight
    objective = Objective(Namespace(rate_loss_weight=weight, mixup=0.0, cutmix=0.0, smoothing=0.0), len(data.names))
    losses, seconds, diverged = _train(protocol, seed, data, accelerator, model, optimizer, objective, title)
    readings = []
    if not diverged:
        macs_at = partial(count_macs, classifier.model) if classifier.is_tower else lambda tokens: macs
        readings = _read(variant, classifier, data, accelerator, macs_at)
    trained = [one["task_loss"] for one in losses[: diverged - 1 if diverged else None]]
    row = {
        "variant": name,
        "seed": seed,
        "top1": readings[0]["top1"] if readings else None,
        "readings": readings,
        "diverged": diverged,
        "final_loss": statistics.fmean(trained[-50:]) if trained else None,  # cross-entropy, over the last 50 steps
        "loss_curve": _means_of_parts(trained, CURVE),
        "loss_steps": len(trained),
        "rate_loss": _last_mean(losses, "rate_loss") if not diverged else None,
        "train_tokens": _last_mean(losses, "train_tokens"),
        "step_seconds": seconds,
        "seconds": time.perf_counter() - began,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "settings": settings,
        "data": data.record(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "machine": _machine(accelerator.device),
        "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    words = f"diverged at step {diverged}" if diverged else ", ".join(map(describe_reading, readings))
    log.info(f"{title}: {words}; {seconds:.3f} s a step, {row['seconds']:.0f} s in all")
    return row


def _train(
    protocol: Protocol,
    seed: int,
    data: Data,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    title: str,
) -> tuple[list[dict[str, float]], float, int | None]:
    """Each step's losses, median seconds of a step, and the step at which the loss was no number, if it ever was."""
    model.train()
    generator, clock = torch.Generator(), StepClock()
    losses: list[dict[str, Tensor]] = []
    diverged = None
    with tqdm(total=protocol.steps, desc=title, unit="step", leave=False, disable=None) as bar:
        for step, rows in zip(range(protocol.steps), _batches(len(data.train), protocol.batch_size, seed)):
            rows = rows.to(data.train.labels.device)
            generator.manual_seed(seed_of(seed, "augmentation", step))
            pixels = data.normalize(protocol.augmentation(data.train.pixels[rows], generator))
            for group in optimizer.param_groups:
                group["lr"] = protocol.lr * protocol.rate(step)
            seed_step(seed, "step", step)
            batch = [(pixels, data.train.labels[rows])]
            losses.append(train_step(accelerator, model, optimizer, objective, batch, protocol.clip_grad))
            clock.tick()
            bar.update()
            if step % _LOOK == _LOOK - 1 or step == protocol.steps - 1:
                recent = torch.stack([one["loss"] for one in losses[-_LOOK:]]).cpu()
                if not recent.isfinite().all():
                    diverged = len(losses) - len(recent) + int((~recent.isfinite()).nonzero()[0]) + 1
                    break
                bar.set_postfix(loss=f"{recent.mean():.3f}")
                if bar.disable and (step + 1) % max(_LOOK, protocol.steps // 100 * _LOOK) == 0:
                    left = clock.median() * (protocol.steps - step - 1)
                    log.info(f"{title}: step {step + 1:,}, loss {recent.mean():.3f}, {left:.0f} s left")
    return [{key: value.item() for key, value in one.items()} for one in losses], clock.median(), diverged


def _batches(rows: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Row numbers of one batch after another, endlessly; what does not fill a batch at an epoch's end is left out."""
    order, epoch = shuffled(rows, seed), 0
    while True:
        yield from torch.tensor(order(epoch))[: rows // batch_size * batch_size].split(batch_size)
        epoch += 1


def _read(
    variant: Variant,
    classifier: Classifier,
    data: Data,
    accelerator: Accelerator,
    macs_at: Callable[[float | None], float],
) -> list[dict]:
    """The trained model evaluated at each budget: [{"read_at" (None without one, or where each image decides), "top1",
    "top5", "val_loss", "images", "tokens", "compression", ..., "gmacs"}]. macs_at: tokens of an image → multiply-accumulates."""
    readings = []
    for budget in variant.read_at or (None,):
        if variant.read_at is not None:
            classifier.model.set_compression(budget)
        batches = evaluation_batches(data.val, data.normalize)
        reading = evaluate(accelerator, classifier, batches, f"evaluation of {variant.name}")
        del reading["skipped"]
        if "tokens" not in reading:  # timm's own: every patch stays, where it has patches
            reading["tokens"] = getattr(getattr(classifier.model, "patch_embed", None), "num_patches", None)
        readings.append({"read_at": budget, **reading, "gmacs": macs_at(reading["tokens"]) / 1e9})
    return readings


def describe_reading(reading: dict) -> str:
    """ "55.02 % at 16.0 tokens"."""
    tokens = "" if reading["tokens"] is None else f" at {reading['tokens']:.1f} tokens"
    return f"{reading['top1']:.2%}{tokens}"


def _means_of_parts(values: list[float], parts: int) -> list[float]:
    size = -(-len(values) // parts)
    return [statistics.fmean(values[i : i + size]) for i in range(0, len(values), size)]


def _last_mean(losses: list[dict[str, float]], name: str, count: int = 50) -> float | None:
    return statistics.fmean(one[name] for one in losses[-count:]) if name in losses[-1] else None


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
