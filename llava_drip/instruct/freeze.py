"""What is trained and what is frozen: set and shown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from torch import nn

PARTS = ("vision_tower", "multi_modal_projector", "language_model")
TRAINED = {"pretrain": ("multi_modal_projector",), "finetune": ("multi_modal_projector", "language_model")}


def parameter_size(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also of one that ZeRO-3 has partitioned away."""
    return getattr(parameter, "ds_numel", parameter.numel())


def freeze_for(stage: str, model: nn.Module) -> None:
    """Set requires_grad as LLaVA's stage has it: "pretrain" trains the projector, "finetune" projector and language model."""
    for name, part in ((name, getattr(model, name)) for name in PARTS):
        part.requires_grad_(name in TRAINED[stage])


def freeze_table(model: nn.Module) -> Table:
    """A table: each part, its parameters, whether it is trained, its dtype."""
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
    for name in PARTS:
        parameters = list(getattr(model, name).parameters())
        counts = [sum(parameter_size(p) for p in parameters if p.requires_grad == kind) for kind in (True, False)]
        totals = [a + b for a, b in zip(totals, counts)]
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        table.add_row(name, f"{sum(counts):,}", *(f"{n:,}" if n else "-" for n in counts), ", ".join(dtypes))
    table.add_section()
    table.add_row("all", f"{sum(totals):,}", *(f"{n:,}" for n in totals), "")
    return table


def print_freeze_table(model: nn.Module) -> None:
    Console().print(freeze_table(model))
