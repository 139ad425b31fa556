"""The two stages of LLaVA's training, as functions that the scripts and the quickstart call.

pretrain: tower and language model frozen, the projector learns to describe pictures (558K format)
finetune: tower frozen, projector and language model learn to answer (LLaVA-Instruct-158K format)
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from llava_drip.assistant.adapter import bases_of
from llava_drip.assistant.build import check_checkpoint
from llava_drip.assistant.packing import why_not_packed
from llava_drip.instruct.arguments import DataArguments, ModelArguments, StageArguments, parse
from llava_drip.instruct.checkpoints import NothingLeft, Resuming, asks_to_resume, find_resume
from llava_drip.instruct.data import Collator, ConversationDataset, load_records
from llava_drip.instruct.dry_run import dry_run
from llava_drip.instruct.elastic import ElasticBudget
from llava_drip.instruct.freeze import PARTS, freeze_for, print_freeze_table
from llava_drip.instruct.lora import add_lora, cast_parameters, check_stage, quantization_of
from llava_drip.instruct.parts import load_parts, resolve
from llava_drip.instruct.ranks import join_ranks, leave_ranks
from llava_drip.instruct.record import RunRecord, check_same_run, describe_run, fingerprint_of
from llava_drip.instruct.result import cleared_if_useless, files_in, save_result
from llava_drip.instruct.row_check import check_rows, most_visual_tokens
from llava_drip.instruct.rows import NamingCollator, ReadableRows
from llava_drip.instruct.standing import Standing
from llava_drip.instruct.stops import Stopped, StopSignals
from llava_drip.instruct.templates import resolve_template
from llava_drip.instruct.trainer import StageTrainer
from llava_drip.towers.directories import tower_directory

DESCRIPTIONS = {
    "pretrain": "Feature alignment: train the projector between a frozen tower and a frozen language model.",
    "finetune": "Instruction tuning: train projector and language model on conversations, the tower frozen.",
}


def run_stage(stage: str, argv: list[str] | None = None) -> Path:
    """Run a stage from its command line (sys.argv when None) and return its output directory.

    stage: "pretrain" or "finetune".
    """
    prog = {"pretrain": "pretrain_projector.py", "finetune": "finetune.py"}[stage]
    model_args, data_args, args = parse(argv, prog, DESCRIPTIONS[stage])
    stops = StopSignals() if argv is None else None  # a caller in Python keeps his signals
    try:
        output_dir = train_stage(stage, model_args, data_args, args, stops)
    except Stopped:
        leave_ranks()
        raise
    leave_ranks()
    return output_dir


def train_stage(
    stage: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: StageArguments,
    stops: StopSignals | None = None,
) -> Path:
    """Train a stage. Data, directories and flags are checked before anything is written, most before anything is loaded.

    With --dry_run it ends there: what would be trained is printed.
    stops: takes SIGTERM and SIGINT while the training goes on; None: they do what they did before.
    Raises:
        ValueError: a mistake in the data, the directories or the flags, named; or too many pictures that cannot be read.
        NothingLearnedError: the run could not learn.
        DivergedError: a loss or a gradient was not finite.
        Stopped: by a signal, after a checkpoint was written.
    """
    records = load_records(data_args.data_path, data_args.image_folder)
    named, model_args = model_args, located(model_args)
    check_deepspeed(args)
    check_stage(stage, model_args, args)
    model_args, data_args = resolve(stage, model_args, data_args)
    for given in (named, model_args):
        check_output_dir(given, args)
    resume, record = find_resume(args), {}
    if resume:
        record = describe_run(stage, model_args, data_args, args)
        check_same_run(Path(resume), record)
    set_seed(args.seed)
    join_ranks(args)  # before the model: ZeRO-3 divides parameters as they are made
    quantization = quantization_of(model_args, args)
    model, processor = load_parts(stage, model_args, quantization)
    template = processor.chat_template
    if model_args.version is not None:
        template = resolve_template(model_args.version, processor.tokenizer)
        if stage == "finetune":
            processor.chat_template = template
    budgets, elastic = model_args.elastic_compression, None
    if budgets is not None:
        elastic = ElasticBudget(model, *budgets, args.seed)
    max_length, image_tokens = data_args.model_max_length, most_visual_tokens(model, budgets and budgets[0])
    dataset = ConversationDataset(records, processor, template, data_args.image_folder, max_length, image_tokens)
    why_not = why_not_packed(model.language_model.config, max_length)
    if args.packing and why_not:
        raise ValueError(f"--packing true: {why_not}")
    packing = args.packing if args.packing is not None else why_not is None
    cut = check_rows(dataset, data_args.data_path)
    freeze_for(stage, model, model_args.lora_enable)
    whole, standing = model, None
    if model_args.lora_enable or quantization is not None:
        standing = Standing(model, model_args.model_name_or_path, quantization, args.should_save)
    if model_args.lora_enable:
        whole = add_lora(model, model_args, str(standing.path.resolve()))
    set_dtypes(model, args)
    model.pack_samples(packing)
    notes = [f"{len(records):,} rows of {data_args.data_path}" + (f"; resuming from {resume}" if resume else "")]
    if args.packing is None and why_not:
        notes.append(f"samples are padded, not packed: {why_not}")
    if cut:
        notes.append(f"{cut:,} of them are longer than --model_max_length {max_length} and are cut there")
    if asks_to_resume(args) and not resume:
        notes.append(f"no complete checkpoint in {args.output_dir}: training starts from the beginning")
    if args.process_index == 0:
        print_freeze_table(model)
        print("\n".join(notes))
    if args.dry_run is not None:
        dry_run(model, ReadableRows(dataset), args, elastic)
        return Path(args.output_dir)
    if not record and args.should_save:  # last: it reads every byte of the weights, for who keeps it in checkpoints
        record = describe_run(stage, model_args, data_args, args)
    if standing is not None and record:
        standing.fingerprint = fingerprint_of(record, "--model_name_or_path")
    with cleared_if_useless(args) as useful:
        trainer = StageTrainer(
            model=whole,
            args=args,
            train_dataset=ReadableRows(dataset),
            data_collator=NamingCollator(Collator(processor.tokenizer.pad_token_id)),
            processing_class=processor,
            elastic=elastic,
            standing=standing,
            stops=stops,
            projector_lr=model_args.mm_projector_lr,
            callbacks=[RunRecord(record), Resuming(resume)],
        )
        try:
            with stops.caught() if stops else nullcontext():
                if stops and trainer.is_world_process_zero():
                    print(f"SIGTERM (kill {os.getpid()}) or Ctrl-C: saves a checkpoint and stops", flush=True)
                trainer.train(resume_from_checkpoint=resume)
        except NothingLeft:
            if trainer.is_world_process_zero():
                print(f"nothing is left to train: {resume} is the end of this run; its weights are the result")
        finally:
            if trainer.state.global_step > 1:  # at the first one's end it may turn out that nothing is learned
                useful += files_in(args.output_dir)
        save_result(trainer, args.output_dir)
    return Path(args.output_dir)


def located(model_args: ModelArguments) -> ModelArguments:
    """The flags with directories in place of names: of the Hub's cache, of the tower within a run's folder."""
    model, tower = check_checkpoint(model_args.model_name_or_path), model_args.vision_tower
    with suppress(ValueError):  # load_tower says what is wrong with it
        tower = tower and str(tower_directory(tower) or tower)
    return dataclasses.replace(model_args, model_name_or_path=str(model), vision_tower=tower)


def check_output_dir(model_args: ModelArguments, args: StageArguments) -> None:
    """ValueError for a result that would take the place of what it is made from."""
    target = Path(args.output_dir).resolve()
    for name in ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter"):
        given = getattr(model_args, name)
        place = given and Path(given).expanduser().resolve()
        if place and target in (place, place.parent if place.is_file() else place):
            raise ValueError(
                f"--output_dir {args.output_dir}: is --{name}, which the result would replace; give another"
            )
    for base in bases_of(model_args.model_name_or_path):
        if target == base.resolve():
            raise ValueError(
                f"--output_dir {args.output_dir}: --model_name_or_path {model_args.model_name_or_path} stands on it, and the "
                "result would replace it; give another"
            )


def check_deepspeed(args: StageArguments) -> None:
    """ValueError for a DeepSpeed configuration whose run would end without weights to load."""
    name, config = "stage3_gather_16bit_weights_on_model_save", args.hf_deepspeed_config if args.deepspeed else None
    if config is not None and config.is_zero3() and not config.get_value(f"zero_optimization.{name}", False):
        raise ValueError(f"--deepspeed {args.deepspeed}: {name} must be true, for the result to have its weights")


def set_dtypes(model: torch.nn.Module, args: StageArguments) -> None:
    """Trained weights are fp32 (mixed precision is the Trainer's or DeepSpeed's); frozen ones take the run's dtype, but
    those that are quantised.

    Under ZeRO-3 all take it. It makes its parameters in that dtype, those of a projector made apart must not differ from the
    language model's, and the optimizer keeps fp32 weights of its own.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model.vision_tower.to(dtype)
    for name in PARTS:
        cast_parameters(getattr(model, name), dtype if is_deepspeed_zero3_enabled() else torch.float32, dtype)
