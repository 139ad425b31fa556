"""Model and processor of a stage, from what its flags say and leave open."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as hf_logging

from llava_drip.assistant.adapter import PROJECTOR_FILE, is_adapted
from llava_drip.assistant.build import build_assistant, check_checkpoint, is_assistant, load_assistant, make_savable
from llava_drip.assistant.processing import LlavaDripProcessor, aspect_ratio_of, image_processor_for
from llava_drip.assistant.quantization import Quantization
from llava_drip.instruct.arguments import DataArguments, ModelArguments
from llava_drip.instruct.row_check import resolve_max_length
from llava_drip.instruct.templates import TEMPLATES, resolve_template
from llava_drip.instruct.zero import gathered


def resolve(stage: str, model_args: ModelArguments, data_args: DataArguments) -> tuple[ModelArguments, DataArguments]:
    """The flags with what was left out filled in, before any weights are read. To spell a default out changes nothing.

    `version` stays None only where the model has a chat template of its own that is none of TEMPLATES, `compression` where each
    image decides.
    Raises:
        ValueError: a flag that contradicts the assistant it is given with, or is missing.
    """
    path = check_checkpoint(model_args.model_name_or_path)
    config = AutoConfig.from_pretrained(path)
    if is_assistant(path):
        if model_args.vision_tower:
            raise ValueError(
                f"--vision_tower: {path} is an assistant and has its tower; give a language model to change it"
            )
        own = {
            "mm_projector_type": config.projector_type,
            "mm_vision_select_layer": config.vision_feature_layer,
            "mm_segment_positions": config.segment_positions,
        }
        for name, value in own.items():
            given = getattr(model_args, name)
            if given is not None and given != value:
                raise ValueError(f"--{name} {given}: {path} is an assistant with {value}; leave the flag out")
        budget = config.vision_config.get("budget")
        own["image_aspect_ratio"] = aspect_ratio_of(_processor(path).image_processor)
    else:
        if not model_args.vision_tower:
            raise ValueError(f"--vision_tower is missing: {path} is a language model")
        own = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_segment_positions": False}
        own["image_aspect_ratio"] = "square"
        budget = _saved_budget(Path(model_args.vision_tower).expanduser())
    fixed = budget is not None and model_args.elastic_compression is None
    own["compression"] = float(budget) if fixed else None
    own = {name: value for name, value in own.items() if getattr(model_args, name) is None}
    adapter = model_args.pretrain_mm_mlp_adapter
    if adapter and Path(adapter).is_dir():
        own["pretrain_mm_mlp_adapter"] = str(Path(adapter) / PROJECTOR_FILE)
    own["version"] = _version(stage, model_args.version, path)
    max_length = resolve_max_length(data_args.model_max_length, config.get_text_config())
    return dataclasses.replace(model_args, **own), dataclasses.replace(data_args, model_max_length=max_length)


def _version(stage: str, version: str | None, path: Path) -> str | None:
    """The first name in TEMPLATES of the template that training uses, or None."""
    if version is None and stage == "pretrain":
        version = "plain"
    if version is not None:
        text = resolve_template(version, None)
    else:
        owner = _processor(path)
        text = owner.chat_template if is_assistant(path) else resolve_template(None, owner)
    return next((name for name, template in TEMPLATES.items() if template == text), None)


def _processor(path: Path) -> LlavaDripProcessor | PreTrainedTokenizerBase:
    """An assistant's processor, a language model's tokenizer."""
    try:
        owner = LlavaDripProcessor if is_assistant(path) else AutoTokenizer
        return owner.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a tokenizer's or an image processor's own
        raise ValueError(f"{path}: its tokenizer or processor cannot be loaded: {error}") from error


def _saved_budget(tower: Path) -> float | None:
    """The token budget in a tower's directory. What is wrong with the directory, load_tower says."""
    try:
        return json.loads((tower / "config.json").read_text())["model_args"]["budget"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_parts(stage: str, model_args: ModelArguments, quantization: Quantization | None = None):
    """Model and processor that the flags, filled in by `resolve`, describe.

    quantization: of the language model; None: it is held as it is.
    """
    path, adapter = Path(model_args.model_name_or_path).expanduser(), model_args.pretrain_mm_mlp_adapter
    if is_assistant(path):
        if is_adapted(path) and (quantization is not None or is_deepspeed_zero3_enabled()):
            raise ValueError(
                f"--model_name_or_path {path}: stands on a base, and cannot be quantised or divided by ZeRO-3 as it is loaded; "
                f"merge it first: scripts/merge_lora.py {path} --output DIR"
            )
        model, processor = load_assistant(path, quantization=quantization)
        if model_args.compression is not None:
            model.set_compression(model_args.compression)
        if model_args.image_aspect_ratio != aspect_ratio_of(processor.image_processor):
            processor.image_processor = image_processor_for(model.config.vision_config, model_args.image_aspect_ratio)
        make_savable(model.generation_config, processor.tokenizer, path)
    else:
        model, processor = build_assistant(
            str(path),
            model_args.vision_tower,
            projector_type=model_args.mm_projector_type,
            vision_feature_layer=model_args.mm_vision_select_layer,
            segment_positions=model_args.mm_segment_positions,
            compression=model_args.compression,
            image_aspect_ratio=model_args.image_aspect_ratio,
            quantization=quantization,
        )
        processor.chat_template = resolve_template(None, processor.tokenizer)
        if stage == "finetune" and not adapter:
            hf_logging.get_logger(__name__).warning(
                "the projector starts from random weights: no --pretrain_mm_mlp_adapter"
            )
    if adapter:
        load_projector(model, adapter)
    return model, processor


def load_projector(model: torch.nn.Module, file: str) -> None:
    """Load mm_projector.safetensors into a model; ValueError names the file where it does not fit."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path}: no such projector file (--pretrain_mm_mlp_adapter)")
    projector = model.multi_modal_projector
    try:
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: cut off or no safetensors file ({error}) (--pretrain_mm_mlp_adapter)") from None
        if ("position.weight" in state) != hasattr(projector, "position"):
            has, flag = ("with", "true") if "position.weight" in state else ("without", "false")
            raise ValueError(f"{path}: was trained {has} segment positions; give --mm_segment_positions {flag}")
        with gathered(projector.parameters(), write=True):  # an assistant's are divided among the ranks already
            projector.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: does not fit this tower and language model: {' '.join(str(error).split())}"
        ) from None
