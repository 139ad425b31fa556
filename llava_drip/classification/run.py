"""Everything of a run, from its flags: data, model, optimizer, schedule; new, or put back where a checkpoint left it."""

from __future__ import annotations

import copy
import logging
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

from llava_drip.classification import checkpoint, data, sharding
from llava_drip.classification.launch import learning_rate, make_accelerator, make_optimizer, make_scheduler
from llava_drip.classification.model import Classifier, create, data_config_of, frozen_hash
from llava_drip.classification.record import check_same_run, run_record, write_record
from llava_drip.classification.sources import Source, check_same_classes, open_source
from llava_drip.classification.step import Objective, Sums
from llava_drip.classification.teacher import TaughtObjective, make_taught
from llava_drip.training.loader import TrainLoader
from llava_drip.training.meters import StepClock, TokenHistogram
from llava_drip.training.records import Records
from llava_drip.training.seeds import SharedNoise, seed_of, seed_step

log = logging.getLogger("llava_drip.train")


@dataclass(frozen=True)
class Task:
    """What a trainer of this room does in its own way: see CLASSIFICATION, and distillation.py.

    Attributes:
        program: its name, for the record.
        open_train: flags → --train-data; without names no label is read.
        make: flags, --train-data → the model.
        open_val: flags, --train-data, model → --val-data.
        objective: flags, model → what step.train_step calls.
        evaluates_start: whether --val-data is evaluated before the first step too, as epoch 0.
        finish: called at the end of a run, or None.
    """

    program: str
    open_train: Callable[[Namespace], Source]
    make: Callable[[Namespace, Source], Classifier]
    open_val: Callable[[Namespace, Source, Classifier], Source]
    objective: Callable[[Namespace, Classifier], torch.nn.Module]
    evaluates_start: bool = False
    finish: Callable[[Run], None] | None = None


@dataclass
class Run:
    """All parts of a run, ready to train."""

    task: Task
    args: Namespace
    output: Path
    accelerator: Accelerator
    classifier: Classifier
    model: torch.nn.Module  # what accelerate made of `classifier`
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    ema: ModelEmaV3 | None
    objective: torch.nn.Module
    loader: TrainLoader
    evaluation: DataLoader | None
    noise: SharedNoise | None
    data_config: dict
    steps_an_epoch: int
    step_batch: int
    divided: checkpoint.Divided | None  # under FSDP
    whole: torch.nn.Module | None  # under FSDP: the undivided tower, on the CPU of rank 0
    frozen: str | None = None  # SHA-256 of what does not train
    step: int = 0
    best: float = -1.0
    sums: Sums | None = None
    clock: StepClock | None = None

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def records(self, name: str) -> Records:
        return Records(self.output / f"{name}.jsonl")

    def new_sums(self) -> Sums:
        patches = self.classifier.patches
        return Sums(TokenHistogram(patches, self.accelerator.device) if patches else None)

    def save(self) -> None:
        """A checkpoint (a collective)."""
        state = {
            "step": self.step,
            "best": self.best,
            "sums": self.sums.state(self.accelerator),
            "loader": self.loader.state(),
        }
        checkpoint.save(self.accelerator, self.output, self.step, state, self.args.keep_checkpoints, self.divided)


def open_data(args: Namespace) -> Source:
    """--train-data. ValueError: it is not there, or nobody knows the classes."""
    source = open_source("--train-data", args.train_data, args.dataset_type, args.classes, args.label_key)
    if source.names is None:
        raise ValueError("--classes is needed: --train-data does not tell the names of its classes")
    return source


def make_classifier(args: Namespace, num_classes: int) -> Classifier:
    """The model of the flags, from the seed, on the CPU. args.rate_loss_weight becomes the tower's own, where it is not given."""
    seed_step(args.seed, "model")
    model = create(args, num_classes)
    if args.teacher is None:
        classifier = Classifier(model, args.freeze == "backbone", name=args.model)
    else:
        classifier = make_taught(args, model)
    if args.rate_loss_weight is None:
        args.rate_loss_weight = getattr(model, "rate_loss_weight", 1.0)
    if args.grad_checkpointing:
        classifier.model.set_grad_checkpointing()
    if getattr(args, "crop_pct", None) is not None:  # saved with the tower: who loads it evaluates as this run does
        classifier.model.pretrained_cfg = {**classifier.model.pretrained_cfg, "crop_pct": args.crop_pct}
    return classifier


def make_objective(args: Namespace, classifier: Classifier) -> Objective:
    """What make_classifier's model is trained for."""
    return (Objective if args.teacher is None else TaughtObjective)(args, classifier.num_classes)


def _open_labelled_val(args: Namespace, source: Source, classifier: Classifier) -> Source:
    val = open_source("--val-data", args.val_data, args.dataset_type, args.classes, args.label_key)
    check_same_classes(source, val)
    return val


CLASSIFICATION = Task(
    program="train_imagenet.py",
    open_train=open_data,
    make=lambda args, source: make_classifier(args, source.num_classes),
    open_val=_open_labelled_val,
    objective=make_objective,
)


def prepare(args: Namespace, command: list[str], task: Task = CLASSIFICATION) -> Run:
    """Flags → a run (a collective). ValueError for what is wrong with them, the data or the checkpoint."""
    output = Path(args.output).expanduser()
    accelerator = make_accelerator(args, output)
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    last = _checkpoint_to_resume(args, output)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    source = task.open_train(args)
    classifier = task.make(args, source)
    data_config = data_config_of(classifier.model)
    pin = accelerator.device.type == "cuda"
    transform = data.training_transform(args, data_config)
    loader = data.training_loader(args, source, transform, source.num_classes, rank, ranks, pin)
    evaluation = None
    if args.val_data:
        val = task.open_val(args, source, classifier)
        transform = data.evaluation_transform(data_config)
        evaluation = data.evaluation_loader(args, val, transform, val.num_classes, rank, ranks, pin)

    step_batch = args.batch_size * ranks * args.grad_accum_steps
    steps_an_epoch = len(loader) // args.grad_accum_steps
    lr = learning_rate(args, step_batch)
    frozen = frozen_hash(classifier) if classifier.frozen else None
    record = run_record(args, task.program, command, classifier, source, steps_an_epoch, step_batch, lr, ranks, frozen)
    if last is not None:
        frozen = check_same_run(output, record)["frozen_sha256"]

    whole = copy.deepcopy(classifier.model) if args.fsdp and accelerator.is_main_process else None
    classifier.to(accelerator.device)
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(classifier, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if not args.model_ema_warmup and args.model_ema_decay ** (steps_an_epoch * args.epochs) > 0.05:
            log.warning(
                "--model-ema: after so few steps the average still holds over 5 % of the weights at the start; "
                "--model-ema-warmup or a lower --model-ema-decay make it forget them"
            )
        accelerator.register_for_checkpointing(ema)
    if args.fsdp:
        sharding.shard(classifier, accelerator.device)
    own_optimizer = make_optimizer(args, classifier.model, lr)
    if args.fsdp:
        model, optimizer = classifier, accelerator.prepare(own_optimizer)
    else:
        model, optimizer = accelerator.prepare(classifier, own_optimizer)
    noise = None
    if hasattr(classifier.model, "noise"):
        noise = classifier.model.noise = SharedNoise(args.seed, rank, ranks)
    run = Run(
        task=task,
        args=args,
        output=output,
        accelerator=accelerator,
        classifier=classifier,
        model=model,
        optimizer=optimizer,
        scheduler=make_scheduler(args, optimizer, lr, steps_an_epoch),
        ema=ema,
        objective=task.objective(args, classifier),
        loader=loader,
        evaluation=evaluation,
        noise=noise,
        data_config=data_config,
        steps_an_epoch=steps_an_epoch,
        step_batch=step_batch,
        divided=(classifier, own_optimizer) if args.fsdp else None,
        whole=whole,
        frozen=frozen,
    )
    if last is not None:
        _resume(run, last)
    _begin_records(run, record, last is not None)
    classes = f"{source.num_classes} classes; " if source.names else ""
    log.info(
        f"{classifier.name}: {record['parameters']:,} parameters, {record['trained_parameters']:,} trained; {classes}"
        f"{steps_an_epoch:,} steps of {step_batch:,} pictures an epoch, learning rate {lr:.3g}"
    )
    return run


def _checkpoint_to_resume(args: Namespace, output: Path) -> Path | None:
    """The newest checkpoint, the same for all processes (a collective). ValueError: there is an earlier run, but no --resume."""
    last = checkpoint.newest(output)
    seen = gather_object([None if last is None else last.name])
    if len(set(seen)) > 1:
        raise ValueError(
            f"--output: the processes see different checkpoints in {output} ({', '.join(map(str, seen))}); on several nodes "
            "it must be a folder that all of them share"
        )
    if last is not None and not args.resume:
        raise ValueError(
            f"--output: {output} holds checkpoints of an earlier run; give --resume to go on, or another folder"
        )
    if last is None and not args.resume and Records(output / "epochs.jsonl").read():
        raise ValueError(f"--output: {output} holds the records of an earlier run; give another folder, or remove it")
    return last


def _resume(run: Run, last: Path) -> None:
    state = checkpoint.load(run.accelerator, last, run.divided)
    run.step, run.best = state["step"], state["best"]
    run.sums = run.new_sums()
    run.sums.resume(state["sums"], run.main)
    loader = state["loader"]
    if run.step % run.steps_an_epoch == 0:  # the epoch was over, even where batches too few for one more step were left
        loader["batch"] = len(run.loader)
    run.loader.resume(loader)
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
            write_record(run.output, record)
        for name in ("epochs", "steps"):
            run.records(name).cut("step", run.step)
    run.accelerator.wait_for_everyone()
    if run.args.report_to:
        begun = record["started"] if not resumed else check_same_run(run.output, record)["started"]
        trackers = {
            "tensorboard": {"purge_step": run.step + 1 if resumed else None},
            "wandb": {
                "name": run.output.name,
                "id": f"{seed_of(run.output.name, begun):x}",  # a resumed run goes on as the same
                "resume": "allow",
                "dir": str(run.output),
                "config": record["flags"],
            },
        }
        run.accelerator.init_trackers(run.args.wandb_project, init_kwargs=trackers)
