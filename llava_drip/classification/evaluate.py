"""What a model measures (of a classifier top-1, top-5 and loss), and tokens, over a set of pictures shared among the ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from llava_drip.classification.model import Classifier
from llava_drip.training.meters import TokenHistogram
from llava_drip.training.skips import Skips


def evaluate(
    accelerator: Accelerator,
    model: Classifier,
    loader: DataLoader,
    what: str,
    divided: bool = False,
) -> dict:
    """A collective. Leaves the model in the mode in which it was.

    Args:
        model: not as DistributedDataParallel has wrapped it: that sends buffers around, and a rank may have no forward here.
        what: a word for the progress bar.
        divided: every forward is a collective (FSDP).
    Returns:
        {what the model measures (means; "top1", "top5" and "val_loss" of a Classifier), "images", "skipped"}, and for towers what
        TokenHistogram.summary gives.
    Raises:
        ValueError: not one readable picture.
    """
    device = accelerator.device
    sums = torch.zeros(len(model.measures) + 1, dtype=torch.float64, device=device)  # the last: images
    tokens = TokenHistogram(model.patches, device) if model.patches else None
    skips, training = Skips(), model.training
    model.eval()
    bar = tqdm(desc=what, unit=" images", leave=False, disable=None if accelerator.is_main_process else True)
    with torch.no_grad(), bar:
        for pixels, labels in _even(accelerator, loader, skips, model, divided):
            with accelerator.autocast():
                outputs, _, lengths = model(pixels)
            if labels is None:  # took part for the other ranks' sake
                continue
            sums[:-1] += model.measure(outputs, labels).double()
            sums[-1] += len(labels)
            if tokens is not None:
                tokens.add(lengths)
            bar.update(len(labels))
    model.train(training)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, skips.state())
        skips = Skips()
        for state in states:
            skips.merge(Skips(state["counts"], state["examples"]))
    *measured, images = sums.tolist()
    if not images:
        raise ValueError(f"--val-data: no readable picture: {skips}; {'; '.join(skips.examples)}")
    result = {name: value / images for name, value in zip(model.measures, measured, strict=True)}
    return {**result, "images": int(images), "skipped": skips.state(), **((tokens.summary() if tokens else None) or {})}


def _even(
    accelerator: Accelerator, loader: DataLoader, skips: Skips, model: Classifier, divided: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(pixels, labels) on the device. Under FSDP every forward is a collective: a rank whose pictures are over gives blank ones,
    with labels None, until all are."""
    batches = iter(loader)
    while True:
        batch = next(batches, None)
        if batch is not None:
            skips.merge(batch.skips)
        data = batch.data if batch is not None else None
        if divided:
            over = torch.tensor(int(batch is None), device=accelerator.device)
            dist.all_reduce(over, op=dist.ReduceOp.MIN)
            if over.item():
                return
            if data is None:
                height, width = model.input_size
                yield torch.zeros(1, 3, height, width, device=accelerator.device), None
                continue
        elif batch is None:
            return
        if data is not None:
            yield tuple(value.to(accelerator.device, non_blocking=True) for value in data)
