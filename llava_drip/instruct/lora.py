"""LoRA and QLoRA for the second stage, and a quantised language model in both: LLaVA's flags, read and carried out.

LoRA (Hu et al., 2021) learns a low-rank change of each linear layer of the language model; the projector is trained whole beside
it. QLoRA (Dettmers et al., 2023) does so over weights of 4 bits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from llava_drip.assistant.quantization import QUANT_TYPES, Quantization, is_quantized

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments

ALL_LINEAR = "all-linear"


@dataclass(kw_only=True)
class LoraArguments:
    """Flags of both stages. None where a flag was left out; `fill` puts LLaVA's values there."""

    lora_enable: bool = field(
        default=False, metadata={"help": "train LoRA in the language model, and the projector; fine-tuning alone"}
    )
    lora_r: int | None = field(default=None, metadata={"help": "rank; 128 unless given"})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "the learned change is scaled by alpha / r; 256 unless given"}
    )
    lora_dropout: float | None = field(default=None, metadata={"help": "of LoRA's input; 0.05 unless given"})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "names of linear layers of the language model (q_proj v_proj); unless given, or all-linear, each of them but "
            "the output layer"
        },
    )
    lora_bias: str | None = field(default=None, metadata={"help": "none: the only choice, biases stay as they are"})
    bits: int = field(
        default=16, metadata={"help": "4 or 8: hold the frozen language model so, by bitsandbytes; 16: as it is"}
    )
    quant_type: str | None = field(default=None, metadata={"help": "of --bits 4: nf4 (unless given) or fp4"})
    double_quant: bool | None = field(
        default=None, metadata={"help": "of --bits 4: quantise the scales as well; true unless given"}
    )
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "learning rate of the projector in fine-tuning; --learning_rate unless given"}
    )

    def fill(self) -> None:
        """Fill in what was left out. ValueError for a flag that is out of its range or would be ignored."""
        if self.bits not in (4, 8, 16):
            raise ValueError(f"--bits must be 4, 8 or 16, got {self.bits}")
        _fill(self, "--lora_enable true", self.lora_enable, _LORA)
        _fill(self, "--bits 4", self.bits == 4, {"quant_type": "nf4", "double_quant": True})
        if self.lora_bias not in (None, "none"):
            raise ValueError(
                f"--lora_bias {self.lora_bias}: must be none; biases are not trained, so that the base stays whole"
            )
        if self.quant_type not in (None, *QUANT_TYPES):
            raise ValueError(f"--quant_type must be {' or '.join(QUANT_TYPES)}, got {self.quant_type}")
        if self.mm_projector_lr is not None and not 0 <= self.mm_projector_lr < float("inf"):
            raise ValueError(f"--mm_projector_lr must be at least 0, got {self.mm_projector_lr}")
        if not self.lora_enable:
            return
        if self.lora_r < 1:
            raise ValueError(f"--lora_r must be at least 1, got {self.lora_r}")
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"--lora_alpha must be above 0, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if ALL_LINEAR in self.lora_target_modules and len(self.lora_target_modules) > 1:
            raise ValueError(f"--lora_target_modules: {ALL_LINEAR} stands alone")


_LORA = {
    "lora_r": 128,
    "lora_alpha": 256.0,
    "lora_dropout": 0.05,
    "lora_target_modules": [ALL_LINEAR],
    "lora_bias": "none",
}
LORA_FLAGS = (*_LORA, "lora_enable", "bits", "quant_type", "double_quant", "mm_projector_lr")


def _fill(arguments: LoraArguments, needs: str, active: bool, defaults: dict) -> None:
    for name, value in defaults.items():
        given = getattr(arguments, name)
        if active and given is None:
            setattr(arguments, name, value)
        elif not active and given is not None:
            words = " ".join(map(str, given)) if isinstance(given, list) else given
            raise ValueError(f"--{name} {words}: has no effect without {needs}; add it, or leave this one out")


def check_stage(stage: str, arguments: LoraArguments, args: TrainingArguments) -> None:
    """ValueError for flags that the stage, or the run's precision and DeepSpeed configuration, do not go with."""
    zero3 = bool(args.deepspeed) and args.hf_deepspeed_config.is_zero3()
    if stage == "pretrain":
        if arguments.lora_enable:
            raise ValueError("--lora_enable true: the first stage trains the projector alone; it is for finetune.py")
        if arguments.mm_projector_lr is not None:
            raise ValueError("--mm_projector_lr: the first stage trains the projector alone; give --learning_rate")
    elif arguments.bits < 16 and not arguments.lora_enable:
        raise ValueError(
            f"--bits {arguments.bits}: a quantised language model cannot be trained itself; add --lora_enable true"
        )
    if arguments.bits < 16 and zero3:
        raise ValueError(
            f"--bits {arguments.bits}: transformers cannot load quantised weights for ZeRO-3; give --deepspeed zero2.json, "
            "which divides gradients and optimizer"
        )
    own = args.hf_deepspeed_config.get_value("optimizer.type") if args.deepspeed else None
    if arguments.mm_projector_lr is not None and own is not None:
        raise ValueError(
            f"--mm_projector_lr: the configuration {args.deepspeed} has an optimizer of its own ({own}), with one learning "
            "rate; leave it out"
        )


def quantization_of(arguments: LoraArguments, args: TrainingArguments) -> Quantization | None:
    """How the language model is held; None for 16 bits. 4-bit weights are multiplied in the run's precision."""
    if arguments.bits == 16:
        return None
    compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return Quantization(arguments.bits, arguments.quant_type, arguments.double_quant, compute)


def linear_layers(language_model: nn.Module) -> dict[str, str]:
    """Linear layers of a language model but its output layer: full name → last part of it."""
    head = language_model.get_output_embeddings()
    layers = (
        name for name, module in language_model.named_modules() if isinstance(module, nn.Linear) and module is not head
    )
    return {name: name.rpartition(".")[2] for name in layers}


def target_pattern(language_model: nn.Module, names: Sequence[str]) -> str:
    """A regular expression for peft's target_modules that fits those linear layers of the assistant's language model and nothing
    else: "all-linear" of peft's own would take the projector and the tower's boundary predictor as well.

    names: last parts of the layers' names, or all-linear.
    Raises:
        ValueError: a name that no linear layer has.
    """
    layers = linear_layers(language_model)
    known = sorted(set(layers.values()))
    if not known:
        raise ValueError(
            f"--lora_enable true: a {language_model.config.model_type} has no linear layers (nn.Linear) to add LoRA to"
        )
    chosen = known if list(names) == [ALL_LINEAR] else sorted(set(names))
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"--lora_target_modules {name}: the language model has no such linear layer, but {', '.join(known)}"
            )
    return rf"language_model\.(.+\.)?({'|'.join(map(re.escape, chosen))})"


def add_lora(model: nn.Module, arguments: LoraArguments, base: str) -> PeftModel:
    """The assistant within peft's model, LoRA in its language model, and the projector trained as a whole (modules_to_save).

    The assistant is changed in place: its linear layers become peft's. Everything else is frozen.
    base: directory of the base, for peft's own configuration file.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(
            f"--lora_enable true needs peft ({error}): pip install -e '.[train]' in the repository"
        ) from error
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        bias=arguments.lora_bias,
        target_modules=target_pattern(model.language_model, arguments.lora_target_modules),
        modules_to_save=["multi_modal_projector"],
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def cast_parameters(module: nn.Module, trained: torch.dtype, frozen: torch.dtype) -> None:
    """Weights to one dtype where they are trained and another where not; those of 4 and 8 bits, and buffers, stay.

    A language model's buffers are the frequencies of its rotary positions: rounded to bf16 they would place a token at position
    2000 several positions off.
    """
    for parameter in module.parameters():
        if not is_quantized(parameter):
            parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)


def split_projector(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float) -> None:
    """Give the projector's parameters groups with a learning rate of their own. Before a scheduler reads the groups."""
    own = {id(p) for p in model.multi_modal_projector.parameters()}
    for group in list(optimizer.param_groups):
        projector = [p for p in group["params"] if id(p) in own]
        if not projector:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in own]
        optimizer.add_param_group({**group, "params": projector, "lr": learning_rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
