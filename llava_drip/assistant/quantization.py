"""A language model in 4 or 8 bits, by bitsandbytes; tower, projector and output layer stay as they are.

QLoRA (Dettmers et al., 2023): weights of the frozen language model stand as 4-bit numbers with a scale for each block, and are
turned back into the compute dtype where they are used.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

QUANT_TYPES = ("nf4", "fp4")


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a language model are stored.

    Attributes:
        bits: 4 or 8.
        quant_type: "nf4" or "fp4", of 4 bits.
        double_quant: the scales of 4-bit blocks are quantised as well.
        compute_dtype: name of the torch dtype that 4-bit weights are multiplied in: "float32", "bfloat16" or "float16".
    """

    bits: int
    quant_type: str | None = None
    double_quant: bool | None = None
    compute_dtype: str = "float32"

    def config(self, skip: list[str] | None = None) -> BitsAndBytesConfig:
        """skip: modules that stay as they are, which replaces transformers' own choice (the output layer); None: that.

        Raises:
            ValueError: bitsandbytes is not installed.
        """
        try:
            import bitsandbytes  # noqa: F401  late: of the extra "train"
        except ImportError as error:
            raise ValueError(
                f"{self.bits} bits need bitsandbytes ({error}): pip install -e '.[train]' in the repository"
            ) from error
        from transformers import BitsAndBytesConfig

        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
            llm_int8_skip_modules=skip,
        )

    def as_dict(self) -> dict:
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def is_quantized(parameter: nn.Parameter) -> bool:
    """Whether it holds packed integers of bitsandbytes, which no cast may touch."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def true_numel(parameter: nn.Parameter) -> int:
    """Weights of a parameter; of a 4-bit one those it stands for, not its bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def dtype_name(parameter: nn.Parameter) -> str:
    """bfloat16, int8, nf4, ..."""
    state = getattr(parameter, "quant_state", None)
    return str(parameter.dtype).removeprefix("torch.") if state is None else state.quant_type


def own_quantization(model: PreTrainedModel, bits: int) -> None:
    """After loading: the model says of itself only what its adapters need, that its linear layers are bitsandbytes'.

    The rest of what transformers notes would stop a stage that trains the projector alone ("purely quantized"), and say
    in a saved configuration that the weights are stored so. They are not: a result names its base, unquantised.
    """
    for module in model.modules():
        for name in ("is_quantized", "quantization_method", "hf_quantizer", "hf_device_map"):
            vars(module).pop(name, None)
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            vars(config).pop("quantization_config", None)
    setattr(model, f"is_loaded_in_{bits}bit", True)
