"""The two stages of LLaVA's training, as functions that the scripts and the quickstart call.

pretrain: tower and language model frozen, the projector learns to describe pictures (558K format)
finetune: tower frozen, projector and language model learn to answer (LLaVA-Instruct-158K format)
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from llava_drip.assistant.build import check_checkpoint
from llava_drip.assistant.packing import why_not_packed
from llava_drip.instruct.arguments import DataArguments, ModelArguments, StageArguments, parse
from llava_drip.instruct.checkpoints import NothingLeft, Resuming, asks_to_resume, find_resume
from llava_drip.instruct.data import Collator, ConversationDataset, load_records
from llava_drip.instruct.elastic import ElasticBudget
from llava_drip.instruct.freeze import PARTS, freeze_for, print_freeze_table
from llava_drip.instruct.parts import load_parts, resolve
from llava_drip.instruct.ranks import join_ranks, leave_ranks
from llava_drip.instruct.record import RunRecord, check_same_run, describe_run
from llava_drip.instruct.result import cleared_if_useless, files_in, save_result
from llava_drip.instruct.row_check import check_rows, most_visual_tokens
from llava_drip.instruct.rows import NamingCollator, ReadableRows
from llava_drip.instruct.stops import Stopped, StopSignals
from llava_drip.instruct.templates import resolve_template
from llava_drip.instruct.trainer import StageTrainer

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

    stops: takes SIGTERM and SIGINT while the training goes on; None: they do what they did before.
    Raises:
        ValueError: a mistake in the data, the directories or the flags, named; or too many pictures that cannot be read.
        NothingLearnedError: the run could not learn.
        DivergedError: a loss or a gradient was not finite.
        Stopped: by a signal, after a checkpoint was written.
    """
    records = load_records(data_args.data_path, data_args.image_folder)
    check_checkpoint(model_args.model_name_or_path)
    check_deepspeed(args)
    model_args, data_args = resolve(stage, model_args, data_args)
    check_output_dir(model_args, args)
    resume, record = find_resume(args), {}
    if resume:
        record = describe_run(stage, model_args, data_args, args)
        check_same_run(Path(resume), record)
    set_seed(args.seed)
    join_ranks(args)  # before the model: ZeRO-3 divides parameters as they are made
    model, processor = load_parts(stage, model_args)
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
    freeze_for(stage, model)
    set_dtypes(model, args)
    model.pack_samples(packing)
    if not record and args.should_save:  # last: it reads every byte of the weights, for who keeps it in checkpoints
        record = describe_run(stage, model_args, data_args, args)
    with cleared_if_useless(args) as useful:
        trainer = StageTrainer(
            model=model,
            args=args,
            train_dataset=ReadableRows(dataset),
            data_collator=NamingCollator(Collator(processor.tokenizer.pad_token_id)),
            processing_class=processor,
            elastic=elastic,
            callbacks=[RunRecord(record), Resuming(resume), *([stops] if stops else [])],
        )
        if trainer.is_world_process_zero():
            print_freeze_table(model)
            print(f"{len(records):,} rows of {data_args.data_path}" + (f"; resuming from {resume}" if resume else ""))
            if args.packing is None and why_not:
                print(f"samples are padded, not packed: {why_not}")
            if cut:
                print(f"{cut:,} of them are longer than --model_max_length {max_length} and are cut there")
            if asks_to_resume(args) and not resume:
                print(f"no complete checkpoint in {args.output_dir}: training starts from the beginning")
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


def check_deepspeed(args: StageArguments) -> None:
    """ValueError for a DeepSpeed configuration whose run would end without weights to load."""
    name, config = "stage3_gather_16bit_weights_on_model_save", args.hf_deepspeed_config if args.deepspeed else None
    if config is not None and config.is_zero3() and not config.get_value(f"zero_optimization.{name}", False):
        raise ValueError(f"--deepspeed {args.deepspeed}: {name} must be true, for the result to have its weights")


def set_dtypes(model: torch.nn.Module, args: StageArguments) -> None:
    """Trained parts keep fp32 weights (mixed precision is the Trainer's or DeepSpeed's); frozen ones take the run's dtype.

    Under ZeRO-3 all take it. It makes its parameters in that dtype, those of a projector made apart must not differ from the
    language model's, and the optimizer keeps fp32 weights of its own.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    for name in PARTS:
        part = getattr(model, name)
        trained = any(p.requires_grad for p in part.parameters())
        part.to(torch.float32 if trained and not is_deepspeed_zero3_enabled() else dtype)
