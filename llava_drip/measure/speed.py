"""Wall-clock comparison of towers in one interleaved run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
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
        spread: see varied_counts; inference is timed at budgets that differ so from image to image, with all that it does:
            predictor, probabilities, ranking. Training steps are timed with the boundaries that the untrained predictor draws
            at its rate, rate loss included. FLOPs are those of the tokens there were.
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
            for name, model in models.items():
                if mode == "inference" and isinstance(model, Drip) and not model.is_dense:
                    wanted = varied_counts(batch, model.patch_embed.num_patches, model.compression, spread, generator)
                    model.set_compression(model.patch_embed.num_patches / wanted)
                steps[name] = _step(model, x, mode, counts[name])
            seconds = _interleave(steps, rounds, device, f"batch {batch}, {mode}")
            for model in models.values():
                if isinstance(model, Drip):
                    model.set_compression(None)
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
