"""Wall-clock comparison of towers in one interleaved run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from llava_drip.measure.flops import tower_macs
from llava_drip.towers.drip import Drip


@dataclass
class Timing:
    """One tower in one setting, against dense.

    Attributes:
        speed_up: dense seconds / its seconds, median over rounds of the ratio within a round.
        low, high: smallest and largest of those ratios.
        flop_speed_up: dense MACs / its MACs at the tokens it had.
        milliseconds: median.
    """

    tower: str
    batch: int
    mode: str
    milliseconds: float
    speed_up: float
    low: float
    high: float
    flop_speed_up: float


def varied_counts(batch: int, patches: int, compression: float, spread: float, generator: torch.Generator) -> Tensor:
    """Token counts [batch] int64 that differ from image to image, and meet the rate on average (up to rounding).

    spread: standard deviation of an image's count over the mean.
    """
    noise = torch.randn(batch, generator=generator) * spread
    factors = 1 + noise - noise.mean()
    return (patches / compression * factors).round().clamp(1, patches).long()


def force_counts(tower: Drip, x: Tensor, counts: Tensor) -> RemovableHandle:
    """Makes a tower find so many segments in the images x, in eval, by its own decision.

    Each image's logits get a constant added, where the predictor answers, so that the probabilities sum to the wanted number of
    boundaries. So all that inference does is done and timed: predictor, calibrated threshold, ranking; and one addition more.

    counts: [B] int64. Returns the handle that undoes it.
    """
    seen: list[Tensor] = []
    watch = tower.boundary_predictor.register_forward_hook(lambda module, inputs, logits: seen.append(logits))
    with torch.inference_mode():
        tower.eval().forward_features(x)
    watch.remove()
    logits = seen[0].double()
    # Not 0 and not all: probabilities are never 0 or 1.
    wanted = (counts.to(logits) - 1).clamp(0.01, logits.shape[1] - 0.01)
    low, high = (torch.full((len(logits), 1), bound, device=logits.device, dtype=logits.dtype) for bound in (-100, 100))
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        too_few = (torch.sigmoid(logits + middle).sum(1) < wanted)[:, None]
        low, high = torch.where(too_few, middle, low), torch.where(too_few, high, middle)
    shift = middle.float()
    return tower.boundary_predictor.register_forward_hook(
        lambda module, inputs, logits: None if module.training else logits + shift
    )


def compare(
    towers: dict[str, dict],
    dense_name: str,
    batches: list[int],
    rounds: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    spread: float = 0.25,
) -> list[Timing]:
    """Time DRIP towers against timm's dense ViT, random weights, all of a setting in turn within each round.

    Args:
        towers: name → arguments of timm.create_model ("model_name", ...).
        dense_name: timm name of the dense ViT.
        batches: batch sizes.
        rounds: counted rounds, after one that is not.
        spread: see varied_counts; inference is timed with forced counts (see force_counts), training steps with the boundaries
            that the untrained predictor draws at its rate, rate loss included. FLOPs are those of the tokens there were.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"dense": timm.create_model(dense_name)}
    models |= {name: timm.create_model(**arguments) for name, arguments in towers.items()}
    models = {name: model.to(device, dtype) for name, model in models.items()}
    size = models["dense"].patch_embed.img_size[0]
    results = []
    for batch in batches:
        x = torch.randn(batch, 3, size, size, generator=generator).to(device, dtype)
        for mode in ("inference", "training"):
            steps: dict[str, Callable] = {}
            counts: dict[str, list[int]] = {name: [] for name in models}
            forced = []
            for name, model in models.items():
                if mode == "inference" and isinstance(model, Drip) and not model.is_dense:
                    wanted = varied_counts(batch, model.patch_embed.num_patches, model.compression, spread, generator)
                    forced.append(force_counts(model, x, wanted))
                steps[name] = _step(model, x, mode, counts[name])
            seconds = _interleave(steps, rounds, device, f"batch {batch}, {mode}")
            for handle in forced:
                handle.remove()
            macs = {
                name: statistics.mean(tower_macs(model, n) for n in counts[name]) if counts[name] else tower_macs(model)
                for name, model in models.items()
            }
            for name in towers:
                ratios = [dense / own for dense, own in zip(seconds["dense"], seconds[name])]
                results.append(
                    Timing(
                        name,
                        batch,
                        mode,
                        1000 * statistics.median(seconds[name]),
                        statistics.median(ratios),
                        min(ratios),
                        max(ratios),
                        macs["dense"] / macs[name],
                    )
                )
    return results


def _step(model: nn.Module, x: Tensor, mode: str, counts: list[int]) -> Callable[[], None]:
    """One pass; a Drip's token counts, of each image, are appended to `counts`."""
    pools = isinstance(model, Drip) and not model.is_dense

    def forward() -> tuple[Tensor, Tensor | float]:
        if not pools:
            return model(x), 0.0
        tokens = model.forward_features(x)
        counts.extend(tokens.packing.lengths)
        return model.forward_head(tokens), tokens.rate_loss.mean()

    def infer() -> None:
        with torch.inference_mode():
            forward()

    def train() -> None:
        model.zero_grad(set_to_none=True)
        logits, rate_loss = forward()
        (logits.float().square().mean() + rate_loss).backward()

    def run() -> None:
        model.train(mode == "training")
        train() if mode == "training" else infer()

    return run


def _interleave(steps: dict[str, Callable], rounds: int, device: str, label: str) -> dict[str, list[float]]:
    """Seconds of each step in each round; the order turns from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for round_ in tqdm(range(rounds + 1), desc=label, leave=False):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            start = time.perf_counter()
            steps[name]()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds
