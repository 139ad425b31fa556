"""train(args): one run of the ImageNet recipe, from flags to a tower on disk. The step is in step.py."""

from __future__ import annotations

import json
import logging
import os
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import resolve_model_data_config
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from tqdm import tqdm

from llava_drip.classification import arguments, checkpoint, data, sharding
from llava_drip.classification.evaluate import evaluate
from llava_drip.classification.launch import make_accelerator, make_optimizer
from llava_drip.classification.model import Classifier, create, frozen_hash
from llava_drip.classification.record import check_same_run, run_record
from llava_drip.classification.step import Objective, Sums, train_step
from llava_drip.towers.io import save_tower
from llava_drip.training.loader import TrainLoader
from llava_drip.training.meters import StepClock, describe, peak_memory_gib, reset_peak_memory
from llava_drip.training.records import Records
from llava_drip.training.seeds import SharedNoise, seed_step
from llava_drip.training.skips import Skips

log = logging.getLogger("llava_drip.train")
logging.getLogger("accelerate").setLevel(logging.WARNING)  # it tells of every file of a checkpoint


def train(args: Namespace, command: list[str]) -> Path:
    """Runs, or goes on with, the training that the flags describe (arguments.parse).

    Args:
        command: how the program was started, for the record.
    Returns:
        The output folder: run.json, epochs.jsonl, steps.jsonl, checkpoints/step-N, and the towers last/ and best/ (by top-1 on
        --val-data) in timm's directory format.
    Raises:
        ValueError: flags, data or checkpoints that are wrong; a loss that is no longer a number.
    """
    run = _prepare(args, command)
    try:
        for epoch in range(run.loader.epoch, args.epochs):
            _train_epoch(run, epoch)
            _finish_epoch(run, epoch + 1)
        _finish(run)
    finally:
        run.accelerator.end_training()
    return run.output


@dataclass
class Run:
    """All parts of a run, ready to train. `model` is what accelerate made of `classifier`."""

    args: Namespace
    output: Path
    accelerator: object
    classifier: Classifier
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: object
    ema: ModelEmaV3 | None
    objective: Objective
    loader: TrainLoader
    evaluation: object | None
    noise: SharedNoise | None
    data_config: dict
    frozen: str | None
    steps_an_epoch: int
    divided: checkpoint.Divided | None
    step: int = 0
    best: float = -1.0
    sums: Sums | None = None
    clock: StepClock | None = None

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def records(self, name: str) -> Records:
        return Records(self.output / f"{name}.jsonl")


def _prepare(args: Namespace, command: list[str]) -> Run:
    output = Path(args.output).expanduser()
    accelerator = make_accelerator(args, output)
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    last = checkpoint.newest(output)
    if last is not None and not args.resume:
        raise ValueError(
            f"--output: {output} holds checkpoints of an earlier run; give --resume to go on, or another folder"
        )
    rank, ranks = accelerator.process_index, accelerator.num_processes
    source = data.open_source("--train-data", args.train_data, args.dataset_type, args.classes, args.label_key)
    if source.names is None:
        raise ValueError("--classes is needed: --train-data does not tell the names of its classes")
    num_classes = len(source.names)
    seed_step(args.seed, "model")
    classifier = Classifier(create(args, num_classes), args.freeze == "backbone")
    if args.grad_checkpointing:
        classifier.model.set_grad_checkpointing()
    data_config = resolve_model_data_config(classifier.model)
    classifier.input_size = tuple(data_config["input_size"][1:])
    pin = accelerator.device.type == "cuda"
    loader = data.training_loader(
        args, source, data.training_transform(args, data_config), num_classes, rank, ranks, pin
    )
    evaluation = None
    if args.val_data:
        val = data.open_source("--val-data", args.val_data, args.dataset_type, args.classes, args.label_key)
        if val.names != source.names:
            raise ValueError("--val-data has other classes than --train-data")
        transform = data.evaluation_transform(args, data_config)
        evaluation = data.evaluation_loader(args, val, transform, num_classes, rank, ranks, pin)

    step_batch = args.batch_size * ranks * args.grad_accum_steps
    lr = arguments.learning_rate(args, step_batch)
    steps_an_epoch = len(loader) // args.grad_accum_steps
    frozen = frozen_hash(classifier)
    ema = None
    classifier.to(accelerator.device)
    if args.model_ema:
        ema = ModelEmaV3(classifier, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        accelerator.register_for_checkpointing(ema)
    if args.fsdp:
        sharding.shard(classifier, accelerator.device)
    optimizer = make_optimizer(args, classifier.model, lr)
    raw_optimizer = optimizer
    if args.fsdp:
        model, optimizer = classifier, accelerator.prepare(optimizer)
    else:
        model, optimizer = accelerator.prepare(classifier, optimizer)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=min(args.warmup_lr, lr),
        min_lr=args.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_an_epoch,
    )
    noise = None
    if classifier.has_rate_loss and hasattr(classifier.model.boundary_predictor, "noise"):
        noise = classifier.model.boundary_predictor.noise = SharedNoise(args.seed, rank, ranks)
    objective = Objective(args, num_classes)
    run = Run(
        args,
        output,
        accelerator,
        classifier,
        model,
        optimizer,
        scheduler,
        ema,
        objective,
        loader,
        evaluation,
        noise,
        data_config,
        frozen,
        steps_an_epoch,
        (classifier, raw_optimizer) if args.fsdp else None,
    )
    record = run_record(args, command, classifier, source, step_batch, lr, ranks)
    if last is not None:
        check_same_run(output, record)
        _resume(run, last)
    _begin_records(run, record, last is not None)
    log.info(
        f"{args.model}: {record['parameters']:,} parameters, {record['trained_parameters']:,} trained; {num_classes} classes; "
        f"{steps_an_epoch:,} steps of {step_batch:,} pictures an epoch, learning rate {lr:.3g}"
    )
    return run


def _resume(run: Run, last: Path) -> None:
    state = checkpoint.load(run.accelerator, last, run.divided)
    run.step, run.best, run.sums = state["step"], state["best"], Sums(**state["sums"])
    run.loader.resume(state["loader"])
    log.info(f"going on from {last}, step {run.step:,}")


def _begin_records(run: Run, record: dict, resumed: bool) -> None:
    """run.json; and the records without what a killed run wrote beyond its checkpoint."""
    if run.main:
        run.output.mkdir(parents=True, exist_ok=True)
        for partial in (run.output / "checkpoints").glob("*.partial"):
            shutil.rmtree(partial)
        if not resumed:
            for name in ("epochs", "steps"):
                run.records(name).path.unlink(missing_ok=True)
            partial = run.output / "run.json.partial"
            partial.write_text(json.dumps(record, indent=2))
            os.replace(partial, run.output / "run.json")
        for name in ("epochs", "steps"):
            run.records(name).cut("step", run.step)
    if run.args.report_to:
        run.accelerator.init_trackers(run.args.wandb_project)
    run.accelerator.wait_for_everyone()


def _train_epoch(run: Run, epoch: int) -> None:
    args, accelerator = run.args, run.accelerator
    run.loader.set_epoch(epoch)
    first = run.step - epoch * run.steps_an_epoch  # steps of this epoch before a kill
    if first == 0 or run.sums is None:
        run.sums = Sums()
    reset_peak_memory()
    run.clock = StepClock()
    run.model.train()
    bar = tqdm(
        total=run.steps_an_epoch,
        initial=first,
        desc=f"epoch {epoch + 1}/{args.epochs}",
        unit="step",
        leave=False,
        disable=not run.main,
    )
    batches = iter(run.loader)
    with bar:
        for _ in range(first, run.steps_an_epoch):
            micro = [next(batches) for _ in range(args.grad_accum_steps)]
            run.scheduler.step_update(run.step)
            lr = max(group["lr"] for group in run.optimizer.param_groups)
            seed_step(args.seed, "step", run.step, accelerator.process_index)
            if run.noise is not None:
                run.noise.at(run.step)
            result = train_step(accelerator, run.model, run.optimizer, run.objective, micro, args.clip_grad or None)
            run.step += 1
            if run.ema is not None:
                run.ema.update(run.classifier, step=run.step)
            run.sums.add(result)
            run.clock.tick()
            bar.update()
            done = run.step - epoch * run.steps_an_epoch
            if done % args.log_every_n_steps == 0 or done == run.steps_an_epoch:
                _log_step(run, result, lr, bar)
            if args.save_every_n_steps and run.step % args.save_every_n_steps == 0 and done < run.steps_an_epoch:
                checkpoint.save(accelerator, run.output, run.step, _state(run), args.keep_checkpoints, run.divided)
                run.clock.restart()


def _log_step(run: Run, result: dict, lr: float, bar: tqdm) -> None:
    row = {name: run.accelerator.reduce(value, "mean").item() for name, value in result.items()}
    if not torch.isfinite(torch.tensor(row["loss"])):
        raise ValueError(
            f"the loss is {row['loss']} at step {run.step}: lower the learning rate ({lr:.3g}), or check the data; "
            f"checkpoints before it are in {run.output / 'checkpoints'}"
        )
    bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{lr:.2e}")
    run.accelerator.log({f"train/{name}": value for name, value in {**row, "lr": lr}.items()}, step=run.step)
    if run.main:
        run.records("steps").add({"step": run.step, **row, "lr": lr})


def _state(run: Run) -> dict:
    """What a checkpoint holds besides the weights (a collective)."""
    return {"step": run.step, "best": run.best, "sums": run.sums.state(run.accelerator), "loader": run.loader.state()}


def _finish_epoch(run: Run, epochs: int) -> None:
    """Evaluation, the epoch's record and line, towers on disk, a checkpoint."""
    args, accelerator = run.args, run.accelerator
    row = {
        "epoch": epochs,
        "step": run.step,
        **run.sums.means(accelerator),
        "lr": max(group["lr"] for group in run.optimizer.param_groups),
        "step_seconds": run.clock.median(),
        "images_per_second": args.batch_size * accelerator.num_processes * args.grad_accum_steps / run.clock.median(),
        "peak_memory_gib": peak_memory_gib(),
    }
    skips = run.loader.all_skips()
    every = args.eval_every_n_epochs
    if run.evaluation is not None and (epochs == args.epochs or (every and epochs % every == 0)):
        result = evaluate(accelerator, run.model, run.classifier, run.evaluation, "evaluation", args.fsdp)
        row["val_images"], row["val_skipped"] = result.pop("images"), result.pop("skipped")
        row |= result
        if run.ema is not None:
            average = evaluate(
                accelerator, run.ema.module, run.classifier, run.evaluation, "evaluation of the average", False
            )
            row |= {f"ema_{name}": average[name] for name in ("top1", "top5", "val_loss")}
    row["skipped"] = skips.state()
    accelerator.log({name: value for name, value in row.items() if isinstance(value, (int, float))}, step=run.step)
    _save_towers(run, row)
    if run.main:
        run.records("epochs").add(row)
        log.info(line(row, args.epochs, skips))
    checkpoint.save(accelerator, run.output, run.step, _state(run), args.keep_checkpoints, run.divided)


def line(row: dict, epochs: int, skips: Skips) -> str:
    """An epoch in one line."""
    parts = [f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.4f}"]
    if "top1" in row:
        parts.append(f"top-1 {row['top1']:.2%}, top-5 {row['top5']:.2%}")
    if "ema_top1" in row:
        parts.append(f"average's top-1 {row['ema_top1']:.2%}, top-5 {row['ema_top5']:.2%}")
    parts += [describe(row), str(skips)]
    for name, skipped in (("", skips), ("of --val-data ", Skips(**row.get("val_skipped", {})))):
        parts += [f"{name}{skipped}"] if name and skipped.total else []
        parts += [f"e.g. {skipped.examples[0]}"] if skipped.examples else []
    return ", ".join(parts)


def _save_towers(run: Run, row: dict) -> None:
    """last/, and best/ where top-1 rose: the averaged weights where there are any (then their top-1 counts)."""
    model = (run.ema.module if run.ema is not None else run.accelerator.unwrap_model(run.model)).model
    state = sharding.whole_state(run.model) if run.args.fsdp else None
    top1 = row.get("ema_top1", row.get("top1"))
    better = top1 is not None and top1 > run.best
    run.best = top1 if better else run.best
    if not run.main:
        return
    if state is not None:
        model = create(run.args, run.objective.num_classes)
        model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    for name in ("last", *(["best"] if better else [])):
        save_tower(model, run.output / name, run.data_config["mean"], run.data_config["std"])


def _finish(run: Run) -> None:
    now = frozen_hash(run.classifier)
    if run.frozen is not None:
        assert now == run.frozen, "frozen weights have changed"
        log.info(f"frozen weights unchanged: SHA-256 {now[:16]}")
    log.info(
        f"towers: {run.output / 'last'}" + (f", {run.output / 'best'} (top-1 {run.best:.2%})" if run.best >= 0 else "")
    )
