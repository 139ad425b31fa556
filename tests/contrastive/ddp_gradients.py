"""One training step of a DRIP CLIP over the same eight pairs, by one process or divided among the ranks of several."""

from __future__ import annotations

import os

import open_clip
import torch
import torch.distributed as dist
from clip_helpers import COLOURS, MODEL
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import llava_drip  # noqa: F401 - registers the models
from llava_drip.contrastive.loss import BoundaryLoss
from llava_drip.contrastive.model import BoundaryCLIP, patches_of, tower_of

PAIRS = 8


def step(rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    """Losses and token counts of this rank's pairs, and every parameter's gradient after DDP's average."""
    torch.manual_seed(0)
    model = BoundaryCLIP.adopt(open_clip.create_model(MODEL, output_dict=True)).train()
    share = PAIRS // ranks
    mine = slice(rank * share, (rank + 1) * share)
    images = torch.randn(PAIRS, 3, 64, 64) * torch.linspace(0.2, 2, PAIRS)[:, None, None, None]
    texts = open_clip.get_tokenizer(MODEL)(
        [f"a {colour} {kind}" for kind in ("dog", "cat") for colour in COLOURS][:PAIRS]
    )
    loss = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=ranks)
    parallel = DistributedDataParallel(model) if ranks > 1 else model
    torch.manual_seed(1)
    torch.rand(rank * share, 1 + patches_of(tower_of(model)))  # the noise that the ranks before this one draw
    output = parallel(images[mine], texts[mine])
    losses = BoundaryLoss(loss, weight=3.0)(**output, output_dict=True)
    sum(losses.values()).backward()
    gradients = {f"gradient {name}": p.grad for name, p in model.named_parameters()}
    return {**{name: value.detach() for name, value in losses.items()}, "num_tokens": output["num_tokens"], **gradients}


def save_step(folder: str) -> None:
    """This rank's `step`, as FOLDER/rankN.pt."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.save(step(rank, ranks), os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()
