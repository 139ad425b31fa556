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


def varied_ends(batch: int, patches: int, compression: float, spread: float, generator: torch.Generator) -> Tensor:
    """Forced segments [batch, patches] bool at the rate on average, with token counts that differ from image to image.

    spread: standard deviation of an image's count over its mean. The counts sum to the rate exactly (up to rounding).
    """
    mean = patches / compression
    noise = torch.randn(batch, generator=generator) * spread
    noise = noise - noise.mean()
    ends = torch.zeros(batch, patches, dtype=torch.bool)
    for row, factor in zip(ends, 1 + noise):
        count = int((mean * factor).round().clamp(1, patches))
        row[torch.randperm(patches - 1, generator=generator)[: count - 1]] = True
    ends[:, -1] = True
    return ends


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
        spread: see varied_ends; inference is timed with forced boundaries (the predictor runs all the same), training steps
            with those that the untrained predictor draws at its rate, rate loss included. FLOPs are those of the tokens there
            were.
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
                ends = None
                if isinstance(model, Drip):
                    patches = model.patch_embed.num_patches
                    ends = varied_ends(batch, patches, model.compression, spread, generator).to(device)
                steps[name] = _step(model, x, ends, mode, counts[name])
            seconds = _interleave(steps, rounds, device, f"batch {batch}, {mode}")
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


def _step(model: nn.Module, x: Tensor, ends: Tensor | None, mode: str, counts: list[int]) -> Callable[[], None]:
    """One pass; a Drip's token counts, of each image, are appended to `counts`."""

    def infer() -> None:
        with torch.inference_mode():
            if ends is None:
                model(x)
            else:
                tokens = model.forward_features(x, ends=ends)
                counts.extend(tokens.packing.lengths)
                model.forward_head(tokens)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        if ends is None:
            loss = model(x).float().square().mean()
        else:
            tokens = model.forward_features(x)
            counts.extend(tokens.packing.lengths)
            loss = model.forward_head(tokens).float().square().mean() + tokens.rate_loss.mean()
        loss.backward()

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
            if device != "cpu":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds
