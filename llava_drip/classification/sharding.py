"""FSDP 2: weights, gradients and optimizer state divided among the processes (Zhao et al., VLDB 2023).

torch's own `fully_shard`, and not accelerate's wrapper of it, which leaves a model undivided on CPUs without a word.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def shard(classifier: nn.Module, device: torch.device) -> None:
    """Divide a model in place, block by block where it has transformer blocks. Before its optimizer is made."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in classifier.model.modules():
        if hasattr(module, "attn") and hasattr(module, "mlp"):
            fully_shard(module, mesh=mesh)
    fully_shard(classifier, mesh=mesh)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Each process writes its part (a collective)."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=str(folder))


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Puts back what `save` wrote, by as many processes or others (a collective)."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The undivided weights, on the CPU of rank 0 (a collective; empty elsewhere)."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
