"""Memory that a stage needs on each GPU, reckoned from its parameters and settings before anything is trained.

Weights, gradients and optimizer states are counted, under ZeRO divided as Rajbhandari et al. (2020) have it. Activations follow
a formula (`activation_bytes`). What is left out is named in LEFT_OUT.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, TrainingArguments

from llava_drip.instruct.freeze import parameter_size

LEFT_OUT = (
    "the CUDA context, communication buffers, layers that ZeRO-3 gathers, the tower's work on a batch of pictures, "
    "quantisation constants, fragmentation; leave a fifth of the GPU free"
)
# Bytes that an optimizer keeps for each trained weight, by the beginning of its name in --optim. Adam: two moments in fp32.
_STATES = {
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "adamw_torch_8bit": 2,
    "adamw_torch_4bit": 1,
    "adamw_anyprecision": 6,
    "adamw": 8,
    "adam": 8,  # DeepSpeed's name
    "paged_adamw": 8,
    "stable_adamw": 8,
    "adafactor": 0,  # a row and a column of each matrix
    "sgd": 0,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "lion": 4,
    "paged_lion": 4,
    "adagrad": 4,
    "rmsprop_bnb_8bit": 1,
    "rmsprop": 4,
}


@dataclass(frozen=True)
class Setting:
    """How a run holds its parameters.

    ranks: processes. zero: DeepSpeed's stage, None without DeepSpeed. half: 16-bit weights or autocast.
    states: bytes of optimizer states for each trained weight, None where --optim is not known here.
    offload_optimizer, offload_param: to the host's memory, by DeepSpeed. checkpointing: of activations.
    """

    ranks: int = 1
    zero: int | None = None
    half: bool = False
    states: float | None = 8
    offload_optimizer: bool = False
    offload_param: bool = False
    checkpointing: bool = False


def setting_of(args: TrainingArguments, ranks: int | None = None) -> Setting:
    """The setting of a run; ranks: of as many processes in place of its own."""
    zero, config = None, getattr(args, "hf_deepspeed_config", None) if args.deepspeed else None
    optimizer, offload = args.optim.value, {}
    if config is not None:
        zero = int(config.get_value("zero_optimization.stage", 0))
        optimizer = str(config.get_value("optimizer.type", optimizer)).lower()
        for name in ("offload_optimizer", "offload_param"):
            offload[name] = config.get_value(f"zero_optimization.{name}.device", "none") not in (None, "none")
    return Setting(
        ranks=args.world_size if ranks is None else ranks,
        zero=zero,
        half=args.bf16 or args.fp16,
        states=state_bytes(optimizer),
        checkpointing=args.gradient_checkpointing,
        **offload,
    )


def state_bytes(optimizer: str) -> float | None:
    """Bytes for each trained weight; None: not known."""
    names = [name for name in _STATES if optimizer.startswith(name)]
    return _STATES[max(names, key=len)] if names else None


def held_bytes(parameter: nn.Parameter) -> int:
    """Of a frozen parameter, as it is in memory: also quantised, or divided by ZeRO-3."""
    if parameter.is_floating_point():
        return parameter_size(parameter) * parameter.element_size()
    return parameter.numel() * parameter.element_size()


def parameter_bytes(parameters: Iterable[nn.Parameter], setting: Setting) -> dict[str, float]:
    """{what: bytes on each GPU} of weights, gradients and optimizer states; keys that begin with "host" are of the host's
    memory, for each process."""
    parameters = list(parameters)
    trained = sum(parameter_size(p) for p in parameters if p.requires_grad)
    frozen = sum(held_bytes(p) for p in parameters if not p.requires_grad)
    zero, ranks, states = setting.zero, setting.ranks, setting.states or 0
    if zero is None:
        found = {
            "weights, trained (fp32)": 4 * trained,
            "weights, frozen": frozen,
            "gradients (fp32)": 4 * trained,
            "optimizer states": states * trained,
        }
        if setting.half:
            found["16-bit copies of autocast"] = 2 * trained
        if ranks > 1:
            found["gradient buckets of DDP"] = 4 * trained
        return found
    width, kind = (2, "16-bit") if setting.half else (4, "fp32")

    def share(least_stage: int) -> int:
        return ranks if zero >= least_stage else 1

    of_weights = "host: " if setting.offload_param else ""
    of_states = "host: " if setting.offload_optimizer else ""
    found = {
        f"{of_weights}weights, trained ({kind})": width * trained / share(3),
        f"{of_weights}weights, frozen": frozen / share(3),
        f"{of_states}gradients ({kind})": width * trained / share(2),
        f"{of_states}optimizer states": states * trained / share(1),
    }
    if zero >= 1 or setting.half:  # the stages keep a copy of their own, in fp32 training too
        found[f"{of_states}weights of the optimizer (fp32)"] = 4 * trained / share(1)
    if setting.half:
        found[f"{of_states}gradients of the optimizer (fp32, within its step)"] = 4 * trained / share(1)
    return found


def activation_bytes(
    text_config: PreTrainedConfig, positions: float, logits: float, setting: Setting, trained: bool = True
) -> dict[str, float]:
    """{what: bytes} that a step keeps of the language model for its backward pass.

    Of each layer and position what autograd keeps of transformers' LLaMA block with SDPA, which holds no matrix of scores: of
    width h, k·v width v and MLP width f, (8.4 h + 2 v + 4 f) values where it is trained, (4.2 h + 2 v + 3 f) where only the
    gradient passes through, and 2.2 h more in 16 bits, whose norms work in fp32. With gradient checkpointing: each layer's
    input, and one layer at work. Logits: in the run's dtype, and three times in fp32 (the loss's copy, its softmax and its
    gradient).

    Args:
        positions: of a batch in one process, visual tokens and, where rows are padded, padding among them.
        logits: positions of which logits are made. trained: whether the language model is.
    """
    width = 2 if setting.half else 4
    h, layers = text_config.hidden_size, text_config.num_hidden_layers
    f = getattr(text_config, "intermediate_size", None) or 4 * h
    heads = text_config.num_attention_heads
    v = (getattr(text_config, "num_key_value_heads", None) or heads) * (
        getattr(text_config, "head_dim", None) or h // heads
    )
    values = (8.4 * h if trained else 4.2 * h) + 2 * v + (4 if trained else 3) * f + (2.2 * h if setting.half else 0)
    layer = values * width * positions
    if setting.checkpointing:
        kept = {"activations (inputs of layers, one layer)": layers * h * width * positions + layer}
    else:
        kept = {"activations of the layers": layers * layer}
    return kept | {"logits and loss": logits * text_config.vocab_size * (width + 12)}


def gpu_total(found: dict[str, float]) -> float:
    return sum(value for what, value in found.items() if not what.startswith("host"))


def devices_memory() -> int | None:
    """Bytes of the smallest GPU here; None without one."""
    if not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
