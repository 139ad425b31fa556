"""What is trained and what is frozen: set and shown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from torch import nn

from llava_drip.assistant.quantization import dtype_name, true_numel

PARTS = ("vision_tower", "multi_modal_projector", "language_model")
LORA = "language_model LoRA"
TRAINED = {"pretrain": ("multi_modal_projector",), "finetune": ("multi_modal_projector", "language_model")}


def parameter_size(parameter: nn.Parameter) -> int:
    """Weights of a parameter, also of one that ZeRO-3 has partitioned away, or that is quantised."""
    return getattr(parameter, "ds_numel", true_numel(parameter))


def freeze_for(stage: str, model: nn.Module, lora: bool = False) -> None:
    """Set requires_grad as LLaVA's stage has it: "pretrain" trains the projector, "finetune" projector and language model.

    lora: the language model is frozen, for LoRA to be added to it.
    """
    for name, part in ((name, getattr(model, name)) for name in PARTS):
        part.requires_grad_(name in TRAINED[stage] and not (lora and name == "language_model"))


def freeze_table(model: nn.Module) -> Table:
    """A table: each part, its parameters, whether it is trained, its dtype. LoRA, where there is some, is a part of its own."""
    table = Table(title="Parameters", title_justify="left")
    for column, justify in (
        ("part", "left"),
        ("parameters", "right"),
        ("trained", "right"),
        ("frozen", "right"),
        ("dtype", "left"),
    ):
        table.add_column(column, justify=justify)
    totals = [0, 0]
    parts: dict[str, list[nn.Parameter]] = {name: [] for name in (*PARTS, LORA)}
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:  # peft's copy of the projector from before
            parts[LORA if ".lora_" in name else name.partition(".")[0]].append(parameter)
    for name, parameters in parts.items():
        if not parameters:
            continue
        counts = [sum(parameter_size(p) for p in parameters if p.requires_grad == kind) for kind in (True, False)]
        totals = [a + b for a, b in zip(totals, counts)]
        dtypes = sorted({dtype_name(p) for p in parameters})
        table.add_row(name, f"{sum(counts):,}", *(f"{n:,}" if n else "-" for n in counts), ", ".join(dtypes))
    table.add_section()
    table.add_row("all", f"{sum(totals):,}", *(f"{n:,}" for n in totals), "")
    return table


def print_freeze_table(model: nn.Module) -> None:
    Console().print(freeze_table(model))
