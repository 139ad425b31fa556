"""Command lines of the two stages: YAML recipes and flags under the names LLaVA's users know.

    python scripts/finetune.py scripts/recipes/finetune_158k.yaml --learning_rate 1e-5

A recipe holds the same names as the flags; a flag given on the command line wins.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainingArguments

from llava_drip import cli
from llava_drip.assistant.configuration import PROJECTORS
from llava_drip.assistant.processing import ASPECT_RATIOS
from llava_drip.instruct.elastic import check_range
from llava_drip.instruct.flags import check_flags, check_numbers, check_surroundings, refused_flags
from llava_drip.instruct.lora import LoraArguments
from llava_drip.training.recipe import read_recipe

DRY_ROWS = 2


def expanded(path: str | None) -> str | None:
    """~ spelled out: a shell does so only where it begins a word, and a recipe has no shell."""
    return os.path.expanduser(path) if isinstance(path, str) else path


@dataclass
class ModelArguments(LoraArguments):
    model_name_or_path: str = field(
        metadata={
            "help": "a language model, or an assistant (of the first stage, for fine-tuning; or of a LoRA run): its directory, "
            "or its name on the Hugging Face Hub, ORGANISATION/NAME or ORGANISATION/NAME@REVISION"
        }
    )
    vision_tower: str | None = field(
        default=None,
        metadata={
            "help": "directory of a tower (config.json, model.safetensors) or of the run that made it, a name of this package, "
            "or a pretrained plain ViT of timm, open_clip (MODEL/TAG) or Hugging Face, by name or directory"
        },
    )
    pretrain_mm_mlp_adapter: str | None = field(
        default=None,
        metadata={"help": "mm_projector.safetensors of the first stage, for --model_name_or_path LANGUAGE_MODEL"},
    )
    mm_projector_type: str | None = field(
        default=None, metadata={"help": "mlp2x_gelu (of a new assistant, unless given) or linear"}
    )
    mm_vision_select_layer: int | None = field(
        default=None, metadata={"help": "tower layer to project, counted from the end; -2 in a new assistant"}
    )
    mm_segment_positions: bool | None = field(
        default=None,
        metadata={"help": "tell the language model where each visual token's segment lies; false unless given"},
    )
    image_aspect_ratio: str | None = field(
        default=None,
        metadata={
            "help": "square (of a new assistant, unless given): the shorter side resized and the centre cropped, as for CLIP; "
            "pad: padded to a square with the mean colour first, as LLaVA-1.5 tunes"
        },
    )
    version: str | None = field(
        default=None, metadata={"help": "chat template: plain, vicuna_v1 (or v1), or the tokenizer's own when absent"}
    )
    compression: float | None = field(
        default=None,
        metadata={"help": "patches per visual token of a DRIP tower, met exactly and kept in the result"},
    )
    elastic_compression: list[float] | None = field(
        default=None,
        metadata={
            "help": "LOW HIGH: each picture of each step gets a compression between these, so that one assistant serves every "
            "budget; its result lets each image decide unless --compression is given to who loads it"
        },
    )

    def __post_init__(self):
        self.fill()
        self.pretrain_mm_mlp_adapter = expanded(self.pretrain_mm_mlp_adapter)
        if self.mm_projector_type not in (None, *PROJECTORS):
            raise ValueError(
                f"--mm_projector_type must be one of {', '.join(PROJECTORS)}, got {self.mm_projector_type}"
            )
        if self.image_aspect_ratio not in (None, *ASPECT_RATIOS):
            raise ValueError(
                f"--image_aspect_ratio must be one of {', '.join(ASPECT_RATIOS)}, got {self.image_aspect_ratio}"
            )
        if self.mm_vision_select_layer is not None and self.mm_vision_select_layer > -1:
            raise ValueError(
                f"--mm_vision_select_layer must be -1 (the last) or less, got {self.mm_vision_select_layer}"
            )
        if self.compression is not None and not self.compression >= 1:
            raise ValueError(f"--compression must be at least 1 (patches per visual token), got {self.compression}")
        if self.elastic_compression is not None:
            check_range(self.elastic_compression)
            if self.compression is not None:
                raise ValueError("--elastic_compression draws what --compression would fix; leave one of them out")


@dataclass
class DataArguments:
    data_path: str = field(metadata={"help": "conversations in LLaVA's JSON format"})
    image_folder: str | None = field(default=None, metadata={"help": "folder that the rows' image paths start from"})
    model_max_length: int | None = field(
        default=None,
        metadata={
            "help": "positions of a row, where its text is cut; as in LLaVA its visual tokens count, as many as the tower can "
            "give. Unless given 2048, or the language model's max_position_embeddings if that is less"
        },
    )

    def __post_init__(self):
        self.image_folder = expanded(self.image_folder)
        if self.model_max_length is not None and self.model_max_length < 1:
            raise ValueError(f"--model_max_length must be at least 1, got {self.model_max_length}")


@dataclass
class StageArguments(TrainingArguments):
    """transformers' TrainingArguments with LLaVA's defaults."""

    output_dir: str = field(default="", metadata={"help": "directory for checkpoints and the result"})
    per_device_train_batch_size: int = 16
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float | None = field(
        default=0.03, metadata={"help": "share of the steps that warm up the learning rate"}
    )
    warmup_steps: float | None = field(
        default=None, metadata={"help": "steps (or, below 1, share) that warm it up; wins over --warmup_ratio"}
    )
    weight_decay: float = 0.0
    logging_steps: float = 1
    save_total_limit: int | None = 2
    dataloader_num_workers: int = 2
    logging_nan_inf_filter: bool = False  # a NaN is to be seen
    remove_unused_columns: bool = False
    max_bad_images: float = field(
        default=0.01,
        metadata={
            "help": "share of the rows seen that may have a picture that cannot be read (each is named, and the next row takes "
            "its place); more, and more than 5 of them, stop the run; 0: the first one does"
        },
    )
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "put a batch's samples into one row without padding, attention kept within each; the same loss. Unless "
            "given, where the language model is known to keep them apart"
        },
    )

    dry_run: int | None = field(
        default=None,
        metadata={
            "help": f"[ROWS]: print the first rows (unless given {DRY_ROWS}) token by token with those that are learned marked, "
            "what is frozen, the steps, and the memory that each GPU would need; train nothing and write nothing"
        },
    )

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("--output_dir is missing")
        self.resume_from_checkpoint = expanded(self.resume_from_checkpoint)
        check_flags(self)
        check_numbers(self)
        if not torch.cuda.is_available():
            self.use_cpu = True
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # set by deepspeed, torchrun and accelerate
                self.ddp_backend = self.ddp_backend or "gloo"
            self.dataloader_pin_memory = False
        if self.warmup_steps is None:
            self.warmup_steps = self.warmup_ratio or 0  # transformers 5: a share when below 1
        try:
            super().__post_init__()
        except TypeError as error:  # a key that --accelerator_config may not have
            raise ValueError(str(error)) from error
        check_surroundings(self)


class StageParser(cli.ArgumentParser, HfArgumentParser):
    """HfArgumentParser with one-line errors and YAML recipes."""

    def parse_recipe_and_flags(self, argv: list[str]) -> tuple[ModelArguments, DataArguments, StageArguments]:
        """argv: an optional recipe (*.yaml) first, then flags."""
        for action in self._actions:
            if action.dest in set(refused_flags(StageArguments)):
                action.help = argparse.SUPPRESS
            if action.dest == "dry_run":
                action.nargs, action.const = "?", DRY_ROWS
        argv = launchers_last(argv)
        if argv and not argv[0].startswith("-"):
            argv = [*self._flags_of(Path(argv[0])), *argv[1:]]
        try:
            return self.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
        except ValueError as error:
            self.error(cli.one_line(error))

    def _flags_of(self, path: Path) -> list[str]:
        try:
            recipe = read_recipe(path)
        except ValueError as error:
            self.error(str(error))
        known = {action.dest for action in self._actions}
        flags = []
        for key, value in recipe.items():
            if key not in known:
                self.error(f"{path}: unknown flag {key!r}")
            if key == "deepspeed" and str(value).endswith(".json"):
                value = self._file_of(path, value)
            if isinstance(value, dict):
                value = json.dumps(value)
            if value is not None:
                flags += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        return flags

    def _file_of(self, recipe: Path, name: str) -> str:
        """A file that a recipe names: from the recipe's own folder, else from the working directory."""
        places = [recipe.parent / name, Path(name)]
        for place in places:
            if place.is_file():
                return str(place)
        self.error(f"{recipe}: deepspeed: no such file, neither {places[0]} nor {places[1]}")


def launchers_last(argv: list[str]) -> list[str]:
    """argv with leading --local_rank flags moved to the end: deepspeed's launcher puts its own before the recipe."""
    own = 0
    while own < len(argv) and argv[own].partition("=")[0] in ("--local_rank", "--local-rank"):
        own += 1 if "=" in argv[own] else 2
    return [*argv[own:], *(word.replace("--local-rank", "--local_rank") for word in argv[:own])]


def parse(argv: list[str] | None, prog: str, description: str) -> tuple[ModelArguments, DataArguments, StageArguments]:
    """The three groups of arguments; exits with status 2 and one line on stderr where they are wrong."""
    parser = StageParser(
        dataclass_types=(ModelArguments, DataArguments, StageArguments),
        prog=prog,
        description=description,
        epilog="A recipe (.yaml) may come first: " + prog + " RECIPE.yaml [--flag value ...]",
    )
    return parser.parse_recipe_and_flags(list(sys.argv[1:] if argv is None else argv))
