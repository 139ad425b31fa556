"""The two stages of LLaVA's training, as functions that the scripts and the quickstart call.

pretrain: tower and language model frozen, the projector learns to describe pictures (558K format)
finetune: tower frozen, projector and language model learn to answer (LLaVA-Instruct-158K format)
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as hf_logging

from llava_drip.assistant.build import build_assistant, check_checkpoint, is_assistant, load_assistant
from llava_drip.instruct.arguments import DataArguments, ModelArguments, StageArguments, parse
from llava_drip.instruct.checkpoints import RunRecord, asks_to_resume, describe_run, find_resume, unseal_later
from llava_drip.instruct.data import Collator, ConversationDataset, load_records
from llava_drip.instruct.freeze import PARTS, freeze_for, print_freeze_table
from llava_drip.instruct.result import PROJECTOR_FILE, cleared_if_useless, save_result
from llava_drip.instruct.row_check import check_rows, most_visual_tokens, resolve_max_length
from llava_drip.instruct.templates import PLAIN, resolve_template
from llava_drip.instruct.trainer import StageTrainer, join_ranks, leave_ranks

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
    output_dir = train_stage(stage, model_args, data_args, args)
    leave_ranks()
    return output_dir


def train_stage(stage: str, model_args: ModelArguments, data_args: DataArguments, args: StageArguments) -> Path:
    """Train a stage. Data, directories and flags are checked before anything is written, most before anything is loaded.

    Raises:
        ValueError: a mistake in the data, the directories or the flags, named.
        NothingLearnedError: the run could not learn.
    """
    records = load_records(data_args.data_path, data_args.image_folder)
    check_checkpoint(model_args.model_name_or_path)
    check_deepspeed(args)
    record = describe_run(stage, model_args, data_args, args)
    resume = find_resume(args, record)
    set_seed(args.seed)
    join_ranks(args)  # before the model: ZeRO-3 divides parameters as they are made
    model, processor = load_parts(stage, model_args)
    template = PLAIN if stage == "pretrain" and model_args.version is None else processor.chat_template
    if model_args.version is not None:
        template = resolve_template(model_args.version, processor.tokenizer)
        if stage == "finetune":
            processor.chat_template = template
    max_length = resolve_max_length(data_args.model_max_length, model.config.text_config)
    dataset = ConversationDataset(
        records, processor, template, data_args.image_folder, max_length, most_visual_tokens(model)
    )
    cut = check_rows(dataset, data_args.data_path)
    freeze_for(stage, model)
    set_dtypes(model, args)
    with cleared_if_useless(args):
        trainer = StageTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=Collator(processor.tokenizer.pad_token_id),
            processing_class=processor,
            callbacks=[RunRecord(record)],
        )
        if trainer.is_world_process_zero():
            print_freeze_table(model)
            print(f"{len(records):,} rows of {data_args.data_path}" + (f"; resuming from {resume}" if resume else ""))
            if cut:
                print(f"{cut:,} of them are longer than --model_max_length {max_length} and are cut there")
            if asks_to_resume(args) and not resume:
                print(f"no complete checkpoint in {args.output_dir}: training starts from the beginning")
            unseal_later(args.output_dir, resume)
        trainer.train(resume_from_checkpoint=resume)
    save_result(trainer, processor, args.output_dir)
    return Path(args.output_dir)


def check_deepspeed(args: StageArguments) -> None:
    """ValueError for a DeepSpeed configuration whose run would end without weights to load."""
    name, config = "stage3_gather_16bit_weights_on_model_save", args.hf_deepspeed_config if args.deepspeed else None
    if config is not None and config.is_zero3() and not config.get_value(f"zero_optimization.{name}", False):
        raise ValueError(f"--deepspeed {args.deepspeed}: {name} must be true, for the result to have its weights")


def load_parts(stage: str, model_args: ModelArguments):
    """Model and processor that the flags describe."""
    path = check_checkpoint(model_args.model_name_or_path)
    if is_assistant(path):
        if model_args.vision_tower:
            raise ValueError(
                f"--vision_tower: {path} is an assistant and has its tower; give a language model to change it"
            )
        model, processor = load_assistant(path)
        for flag, given, own in (
            ("--mm_projector_type", model_args.mm_projector_type, model.config.projector_type),
            ("--mm_vision_select_layer", model_args.mm_vision_select_layer, model.config.vision_feature_layer),
            ("--mm_segment_positions", model_args.mm_segment_positions, model.config.segment_positions),
        ):
            if given is not None and given != own:
                raise ValueError(f"{flag} {given}: {path} is an assistant with {own}; leave the flag out")
        if model_args.compression is not None:
            model.set_compression(model_args.compression)
        if model_args.pretrain_mm_mlp_adapter:
            load_projector(model, model_args.pretrain_mm_mlp_adapter)
        return model, processor
    if not model_args.vision_tower:
        raise ValueError(f"--vision_tower is missing: {path} is a language model")
    model, processor = build_assistant(
        str(path),
        model_args.vision_tower,
        projector_type=model_args.mm_projector_type or "mlp2x_gelu",
        vision_feature_layer=-2 if model_args.mm_vision_select_layer is None else model_args.mm_vision_select_layer,
        segment_positions=bool(model_args.mm_segment_positions),
        compression=model_args.compression,
    )
    processor.chat_template = resolve_template(None, processor.tokenizer)
    if model_args.pretrain_mm_mlp_adapter:
        load_projector(model, model_args.pretrain_mm_mlp_adapter)
    elif stage == "finetune":
        hf_logging.get_logger(__name__).warning(
            "the projector starts from random weights: no --pretrain_mm_mlp_adapter"
        )
    return model, processor


def load_projector(model: torch.nn.Module, file: str) -> None:
    """Load mm_projector.safetensors into a model; ValueError names the file where it does not fit."""
    path = Path(file)
    if path.is_dir():
        path = path / PROJECTOR_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such projector file (--pretrain_mm_mlp_adapter)")
    projector = model.multi_modal_projector
    whole = nullcontext()
    if is_deepspeed_zero3_enabled():  # an assistant's parameters are divided among the ranks already
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(list(projector.parameters()), modifier_rank=0)
    try:
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: cut off or no safetensors file ({error}) (--pretrain_mm_mlp_adapter)") from None
        if ("position.weight" in state) != hasattr(projector, "position"):
            has, flag = ("with", "true") if "position.weight" in state else ("without", "false")
            raise ValueError(f"{path}: was trained {has} segment positions; give --mm_segment_positions {flag}")
        with whole:
            projector.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: does not fit this tower and language model: {' '.join(str(error).split())}"
        ) from None


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
