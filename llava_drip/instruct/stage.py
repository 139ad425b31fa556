"""The two stages of LLaVA's training, as functions that the scripts and the quickstart call.

pretrain: tower and language model frozen, the projector learns to describe pictures (558K format)
finetune: tower frozen, projector and language model learn to answer (LLaVA-Instruct-158K format)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as hf_logging

from llava_drip.assistant.build import build_assistant, check_checkpoint, is_assistant, load_assistant
from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.instruct.arguments import DataArguments, ModelArguments, StageArguments, parse
from llava_drip.instruct.data import Collator, ConversationDataset, encode_conversation, load_records, to_messages
from llava_drip.instruct.freeze import PARTS, freeze_for, print_freeze_table
from llava_drip.instruct.templates import PLAIN, resolve_template
from llava_drip.instruct.trainer import NothingLearnedError, StageTrainer, join_ranks

PROJECTOR_FILE = "mm_projector.safetensors"
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
    return train_stage(stage, model_args, data_args, args)


def train_stage(stage: str, model_args: ModelArguments, data_args: DataArguments, args: StageArguments) -> Path:
    """Train a stage. Data and directories are checked before anything is loaded or written.

    Raises:
        ValueError: a mistake in the data, the directories or the flags, named.
        NothingLearnedError: the run could not learn.
    """
    records = load_records(data_args.data_path, data_args.image_folder)
    resume = find_resume(args)
    set_seed(args.seed)
    join_ranks(args)  # before the model: ZeRO-3 divides parameters as they are made
    model, processor = load_parts(stage, model_args)
    template = PLAIN if stage == "pretrain" and model_args.version is None else processor.chat_template
    if model_args.version is not None:
        template = resolve_template(model_args.version, processor.tokenizer)
        if stage == "finetune":
            processor.chat_template = template
    dataset = ConversationDataset(records, processor, template, data_args.image_folder, data_args.model_max_length)
    check_labels(dataset, data_args.data_path)
    freeze_for(stage, model)
    set_dtypes(model, args)
    with cleared_if_useless(args):
        trainer = StageTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=Collator(processor.tokenizer.pad_token_id),
            processing_class=processor,
        )
        if trainer.is_world_process_zero():
            print_freeze_table(model)
            print(f"{len(records):,} rows of {data_args.data_path}" + (f"; resuming from {resume}" if resume else ""))
            if asks_to_resume(args) and not resume:
                print(f"no complete checkpoint in {args.output_dir}: training starts from the beginning")
        trainer.train(resume_from_checkpoint=resume)
        save_result(trainer, processor, args.output_dir)
    return Path(args.output_dir)


@contextmanager
def cleared_if_useless(args: StageArguments) -> Iterator[None]:
    """After a mistake that only training shows (a broken picture), no output directory stays but one with checkpoints."""
    existed = os.path.exists(args.output_dir)
    try:
        yield
    except (ValueError, OSError):
        if not existed and args.should_save and not any(Path(args.output_dir).glob("checkpoint-*")):
            shutil.rmtree(args.output_dir, ignore_errors=True)
        raise


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
            model.config.vision_config["budget"] = model_args.compression
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
        with whole:
            projector.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(
            f"{path}: does not fit this tower and language model: {' '.join(str(error).split())}"
        ) from None


def check_labels(dataset: ConversationDataset, path: str, rows: int = 64) -> None:
    """Stop early where the first rows hold nothing to learn."""
    texts = (encode_labels(dataset, i) for i in range(min(rows, len(dataset))))
    if all(label == IGNORE_INDEX for labels in texts for label in labels):
        raise NothingLearnedError(
            f"{path}: every label of the first {min(rows, len(dataset))} rows is ignored; "
            "check --version and --model_max_length"
        )


def encode_labels(dataset: ConversationDataset, i: int) -> list[int]:
    """Labels of row i, without decoding its pictures."""
    return encode_conversation(
        dataset.processor, to_messages(dataset.records[i]), dataset.template, dataset.max_length
    )[1]


def set_dtypes(model: torch.nn.Module, args: StageArguments) -> None:
    """Trained parts keep fp32 weights (mixed precision is the Trainer's or DeepSpeed's); frozen ones take the run's dtype."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    for name in PARTS:
        part = getattr(model, name)
        part.to(torch.float32 if any(p.requires_grad for p in part.parameters()) else dtype)


def asks_to_resume(args: StageArguments) -> bool:
    return str(args.resume_from_checkpoint).lower() not in ("none", "false")


def find_resume(args: StageArguments) -> str | None:
    """The checkpoint to resume from: a path, or the newest complete one for "latest" (or "True")."""
    asked, ranks = args.resume_from_checkpoint, int(os.environ.get("WORLD_SIZE", 1))
    if not asks_to_resume(args):
        return None
    if str(asked).lower() not in ("latest", "true"):
        if lack := lack_of(Path(asked), ranks):
            raise ValueError(f"--resume_from_checkpoint {asked}: not a complete checkpoint, {lack}")
        return str(asked)
    complete = [path for path in Path(args.output_dir).glob("checkpoint-*") if not lack_of(path, ranks)]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def lack_of(checkpoint: Path, ranks: int = 1) -> str | None:
    """What a kill left out of a checkpoint, or None if it is complete. ranks: processes of the run that resumes."""
    try:  # rank 0 writes it last
        whole = "global_step" in json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        whole = False
    if not whole:
        return "trainer_state.json is missing or cut off"
    states = {path.stem.rpartition("_")[2] for path in checkpoint.glob("rng_state_*.pth")}
    # The other ranks write at their own pace. A run of one process wrote rng_state.pth, and any number may go on from it.
    if states or (ranks > 1 and not (checkpoint / "rng_state.pth").is_file()):
        highest = max((int(rank) for rank in states if rank.isdigit()), default=0)
        for rank in range(max(ranks if ranks > 1 else 0, highest + 1)):
            if str(rank) not in states:
                return f"rng_state_{rank}.pth is missing"
    latest = checkpoint / "latest"  # DeepSpeed's: the directory with the optimizer's state
    if latest.is_file():
        name = latest.read_text().strip()
        if not name or not (checkpoint / name).is_dir() or not any((checkpoint / name).iterdir()):
            return f"the directory {name!r}, which its file latest names, is missing or empty"
    return None


def save_result(trainer: StageTrainer, processor, output_dir: str) -> None:
    """The whole assistant, and its projector as a small file of its own; a kill leaves no file half-written."""
    partial = Path(output_dir) / ".partial"
    trainer.save_model(str(partial))
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    processor.save_pretrained(partial)
    projector, prefix = {}, "multi_modal_projector."
    # Read back: under ZeRO-3 no rank has the whole in memory.
    for file in sorted(partial.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            keys = [key for key in weights.keys() if key.startswith(prefix)]  # noqa: SIM118
            projector |= {key.removeprefix(prefix): weights.get_tensor(key) for key in keys}
    save_file(projector, partial / PROJECTOR_FILE)
    for part in sorted(
        partial.iterdir(), key=lambda part: part.name == "config.json"
    ):  # it says that the rest is there
        target = Path(output_dir) / part.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(part, target)
    partial.rmdir()
