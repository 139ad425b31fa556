"""The learning-rate range test, without the training: from the losses of a run whose rate rises to suggested learning rates.

Smith, "Cyclical Learning Rates for Training Neural Networks" (WACV 2017, arXiv:1506.01186) raises the rate from tiny to far too
large within one short run and reads usable rates off the loss. The two suggestions are those that fastai's `lr_find` made common:

- `steepest`: where the smoothed loss falls fastest against log(lr) (fastai's "steep"). The rate to begin with.
- `tenth_of_minimum`: a tenth of the rate at which the smoothed loss is lowest (fastai's "minimum"). At the minimum itself
  training is about to diverge. Often the higher of the two: an upper limit.

Three things differ from fastai. The slope is that of a line fitted to a tenth of the curve: the difference of two neighbours of
an exponential average is mostly the noise of one batch. Each average stands at the (geometric) average of its rates, with the
same weights: at the rate of its last loss it would lag beta / (1 - beta) steps, and suggestions would be too high by as much.
And where the losses carry no suggestion there is none, with a note that says why.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llava_drip.files import write_whole

MIN_POINTS = 20  # losses, without which a curve says nothing
_WARMUP = 10  # losses from which the level at the start and its noise are taken


@dataclass(frozen=True)
class RangeTest:
    """What `analyse` found. Rates in the optimizer's unit; None where the losses do not show it (`notes` say why)."""

    lrs: list[float]  # as measured
    losses: list[float]
    smoothed: list[float]  # exponential averages of the losses; NaN from the first loss that is not finite
    centres: list[float]  # the rate at which each of these averages stands
    beta: float
    steepest: float | None  # rate of the steepest descent
    tenth_of_minimum: float | None  # a tenth of the rate of the lowest smoothed loss
    minimum: float | None  # that rate itself
    diverges: float | None  # first rate at which the loss has diverged
    notes: list[str]

    def __str__(self) -> str:
        rates = {
            "steepest descent": self.steepest,
            "a tenth of the minimum's rate": self.tenth_of_minimum,
            "minimum": self.minimum,
            "diverges": self.diverges,
        }
        lines = [f"{name}: {'-' if rate is None else f'{rate:.2e}'}" for name, rate in rates.items()]
        return "\n".join([*lines, *self.notes])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a range test itself."""
    group = parser.add_argument_group("range test")
    group.add_argument("--output", required=True, help="path of the result, without .png and .json")
    group.add_argument("--start-lr", type=float, default=1e-7, help="learning rate of the first step")
    group.add_argument("--end-lr", type=float, default=1.0, help="of the last, unless the loss diverges before")
    group.add_argument("--steps", type=int, default=200, help="steps of training, at most")
    group.add_argument("--beta", type=float, default=0.9, help="of the average that smooths the losses")


def check_flags(args: argparse.Namespace) -> None:
    """ValueError for one that is out of its range."""
    if not 0 < args.start_lr < args.end_lr < math.inf:
        raise ValueError(f"--start-lr {args.start_lr} must be above 0 and below --end-lr {args.end_lr}")
    if args.steps < MIN_POINTS:
        raise ValueError(f"--steps must be at least {MIN_POINTS}, got {args.steps}")
    if not 0 <= args.beta < 1:
        raise ValueError(f"--beta must be at least 0 and below 1, got {args.beta}")
    folder = Path(args.output).expanduser().parent
    if not folder.is_dir():
        raise ValueError(f"--output: no folder {folder}")


def rates(start: float, end: float, steps: int) -> list[float]:
    """`steps` rates from start to end, equally far apart in their logarithm."""
    return [start * (end / start) ** (i / (steps - 1)) for i in range(steps)]


def smooth(losses: Sequence[float], beta: float = 0.9) -> list[float]:
    """Exponential average of the losses, corrected for its start at zero (Kingma & Ba 2015): s_i / (1 - beta^i).

    From the first loss that is not finite on, NaN. ValueError: beta is not in [0, 1).
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and less than 1, got {beta}")
    average, result = 0.0, []
    for i, loss in enumerate(losses, start=1):
        average = beta * average + (1 - beta) * loss if math.isfinite(loss) else math.nan
        result.append(average / (1 - beta**i))
    return result


def divergence(losses: Sequence[float], smoothed: Sequence[float], factor: float = 4.0) -> int | None:
    """Index of the first loss at which the run has diverged; None while it has not. Made to be asked after every step.

    Diverged means one of: a loss that is not finite; a smoothed loss above `factor` times the lowest one so far (fastai's rule);
    or one that had clearly fallen and is now clearly above where it began. Clearly: by three standard deviations of one loss.
    """
    best, start, margin = math.inf, math.nan, math.nan
    for i, value in enumerate(smoothed):
        if not math.isfinite(value):
            return i
        if i == _WARMUP:
            start, margin = float(np.mean(losses[:i])), 3 * _noise(losses[:i])
        if i >= _WARMUP:
            if best > 0 and value > factor * best:
                return i
            if start - best > margin and value > start + margin:
                return i
            best = min(best, value)
    return None


def _noise(losses: Sequence[float]) -> float:
    """Standard deviation of single losses around their curve: from neighbours, so that the curve itself counts little."""
    return float(np.sqrt(np.mean(np.diff(losses) ** 2) / 2))


def analyse(points: Sequence[tuple[float, float]], beta: float = 0.9) -> RangeTest:
    """Suggested learning rates from a range test.

    Args:
        points: (learning rate, loss of that step), the rates rising, best geometrically; at least MIN_POINTS losses before the
            first that is not finite. 100 to 300 points over five or more decades of rates are usual.
        beta: of the exponential average; 0 takes the losses as they are.

    Raises:
        ValueError: too few losses, or rates that are not positive and rising.
    """
    lrs, losses = [float(lr) for lr, _ in points], [float(loss) for _, loss in points]
    for i, lr in enumerate(lrs):
        if not 0 < lr < math.inf or (i and lr <= lrs[i - 1]):
            before = f" after {lrs[i - 1]:.3g}" if i else ""
            raise ValueError(f"range test: learning rates must be positive and rise; step {i + 1} has {lr:.3g}{before}")
    smoothed = smooth(losses, beta)
    finite = next((i for i, value in enumerate(smoothed) if not math.isfinite(value)), len(smoothed))
    if finite < MIN_POINTS:
        end = f", then a loss of {losses[finite]} at the rate {lrs[finite]:.3g}" if finite < len(losses) else ""
        raise ValueError(
            f"range test: {finite} finite losses{end}; at least {MIN_POINTS} are needed: more steps, or a lower first rate"
        )
    end = divergence(losses, smoothed)
    centres = [math.exp(value) for value in smooth([math.log(lr) for lr in lrs], beta)]
    steepest, minimum, notes = _suggestions(centres[:end], losses[:end], smoothed[:end], beta, end is not None)
    return RangeTest(
        lrs=lrs,
        losses=losses,
        smoothed=smoothed,
        centres=centres,
        beta=beta,
        steepest=steepest,
        tenth_of_minimum=None if minimum is None else minimum / 10,
        minimum=minimum,
        diverges=None if end is None else lrs[end],
        notes=notes,
    )


def _suggestions(
    centres: list[float], losses: list[float], smoothed: list[float], beta: float, diverged: bool
) -> tuple[float | None, float | None, list[str]]:
    """(rate of the steepest descent, rate of the minimum, notes), from the part before divergence."""
    values, logs = np.array(smoothed), np.log(centres)
    last, lowest = len(values) - 1, int(values.argmin())
    half = max(1, len(values) // 20)  # a fitted line takes 2 * half + 1 points
    first = max(3, len(values) // 10)  # fastai leaves out this part too: the average has not settled

    def slope(begin: int, end: int) -> float:
        return float(np.polyfit(logs[begin : end + 1], values[begin : end + 1], 1)[0])

    start = float(np.mean(losses[:first]))
    deviation = _noise(losses[: max(lowest, first)]) * math.sqrt(
        (1 - beta) / (1 + beta)
    )  # of an average, from noise alone
    if start - values[lowest] <= max(5 * deviation, 1e-3 * abs(start)):
        return (
            None,
            None,
            ["no suggestion: the loss never fell clearly (try a wider range, more steps, larger batches)"],
        )
    slopes = {i: slope(i - half, i + half) for i in range(first + half, min(lowest, last - half) + 1)}
    if not slopes or min(slopes.values()) >= 0:
        return (
            None,
            None,
            [f"no suggestion: the loss is lowest already at {centres[lowest]:.2e}; begin the range lower"],
        )
    steepest = min(slopes, key=slopes.get)
    if not diverged and lowest >= last - half // 2 and slope(last - half, last) < 0:
        notes = [f"no minimum: the loss still falls at {centres[-1]:.2e}; end the range higher"]
        if slopes[steepest] < 1.25 * slopes[max(slopes)]:  # clearly steeper than where the range ends
            return centres[steepest], None, notes
        return None, None, ["no steepest descent: it may lie beyond the range", *notes]
    return centres[steepest], centres[lowest], []


def write_json(result: RangeTest, path: str | os.PathLike) -> None:
    """Everything of the result as one JSON object; losses that are not finite become null."""
    content = asdict(result)
    for name in ("losses", "smoothed", "centres"):
        content[name] = [value if math.isfinite(value) else None for value in content[name]]
    write_whole(path, json.dumps(content, indent=1) + "\n")
