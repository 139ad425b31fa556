"""The two stages of LLaVA's training, as functions that the scripts and the quickstart call.

pretrain: tower and language model frozen, the projector learns to describe pictures (558K format)
finetune: tower frozen, projector and language model learn to answer (LLaVA-Instruct-158K format)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.utils import logging as hf_logging

from llava_drip.assistant.build import build_assistant, check_checkpoint, is_assistant
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
        trainer.train(resume_from_checkpoint=resume)
        save_result(trainer, processor, args.output_dir)
    return Path(args.output_dir)


@contextmanager
def cleared_if_useless(args: StageArguments) -> Iterator[None]:
    """After a user's mistake that only training shows (a broken picture), no output directory stays but one with checkpoints."""
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
        model = AutoModelForImageTextToText.from_pretrained(path)
        processor = AutoProcessor.from_pretrained(path)
        if model_args.compression is not None:
            model.config.vision_config["model_args"]["compression"] = model_args.compression
            model.set_compression(model_args.compression)
        return model, processor
    if not model_args.vision_tower:
        raise ValueError(f"--vision_tower is missing: {path} is a language model")
    model, processor = build_assistant(
        str(path),
        model_args.vision_tower,
        projector_type=model_args.mm_projector_type,
        vision_feature_layer=model_args.mm_vision_select_layer,
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
    try:
        model.multi_modal_projector.load_state_dict(load_file(path))
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
    """Trained parts keep fp32 weights (mixed precision is the Trainer's or DeepSpeed's); frozen ones take the run's precision."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    for name in PARTS:
        part = getattr(model, name)
        part.to(torch.float32 if any(p.requires_grad for p in part.parameters()) else dtype)


def find_resume(args: StageArguments) -> str | None:
    """The checkpoint to resume from: a path, or the newest complete one for "latest" (or "True")."""
    asked = args.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    if str(asked).lower() not in ("latest", "true"):
        if not is_complete(Path(asked)):
            raise ValueError(
                f"--resume_from_checkpoint {asked}: not a complete checkpoint, trainer_state.json is missing or cut off"
            )
        return str(asked)
    complete = [path for path in Path(args.output_dir).glob("checkpoint-*") if is_complete(path)]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def is_complete(checkpoint: Path) -> bool:
    """trainer_state.json is written last: a checkpoint without it was cut off by a kill."""
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False


def save_result(trainer: StageTrainer, processor, output_dir: str) -> None:
    """The whole assistant, and its projector as a small file of its own."""
    trainer.save_model(output_dir)
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    processor.save_pretrained(output_dir)
    projector, prefix = {}, "multi_modal_projector."
    for file in sorted(
        Path(output_dir).glob("model*.safetensors")
    ):  # read back: under ZeRO-3 no rank has the whole in memory
        with safe_open(file, framework="pt") as weights:
            projector |= {k.removeprefix(prefix): weights.get_tensor(k) for k in weights.keys() if k.startswith(prefix)}  # noqa: SIM118
    partial = Path(output_dir) / f"{PROJECTOR_FILE}.partial"
    save_file(projector, partial)
    os.replace(partial, Path(output_dir) / PROJECTOR_FILE)
