"""Wall-clock time of towers in one interleaved run: round after round, so that whatever else a machine does hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from llava_drip.cli import one_line
from llava_drip.towers.contract import lacks_of_tower
from llava_drip.towers.inputs import input_size
from llava_drip.towers.io import budget_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("inference", "training")
Name = TypeVar("Name")
# What torch raises where a model cannot run in a setting: out of memory and operators that are not there (RuntimeError and what
# derives from it), a batch normalization over one value (ValueError). Anything else is a mistake of this package, and stops it.
FAILURES = (RuntimeError, ValueError)


@dataclass(frozen=True)
class Setting:
    """What a pass is.

    Attributes:
        device: "cpu", "cuda", ...
        dtype: of DTYPES. In inference the weights have it; training keeps fp32 weights, under autocast.
        mode: "inference": a forward pass of `batch` images. "training": a step: forward, cross-entropy and what the tower itself
            asks for (rate_loss), backward, AdamW (fused) with its two moments, at a learning rate of 0.
    """

    device: str
    dtype: str
    mode: str
    batch: int


@dataclass(frozen=True)
class Timing:
    """One tower in one setting.

    Attributes:
        milliseconds: median of a pass over the rounds. q1, q3: quartiles.
        images_per_second: at the median.
        speed_up: seconds of the first tower / its own, median over rounds of the ratio within a round.
        tokens: of an image in these passes, mean; None where they are not counted.
        error: what the tower failed with, in a line; figures are then None. (speed_up, too, where the first tower failed.)
    """

    label: str
    milliseconds: float | None
    q1: float | None
    q3: float | None
    images_per_second: float | None
    speed_up: float | None
    tokens: float | None
    rounds: int
    error: str | None = None


def varied_counts(batch: int, patches: int, compression: float, spread: float, generator: torch.Generator) -> Tensor:
    """Token counts [batch] int64 that differ from image to image, and meet the rate on average (up to rounding).

    spread: standard deviation of an image's count over the mean; less, where that would ask for more than all patches.
    """
    noise = torch.randn(batch, generator=generator) * spread
    noise = noise - noise.mean()
    if batch > 1 and noise.any():  # none may want more tokens than there are patches, or none at all
        room = min((compression - 1) / float(noise.max()), (1 - compression / patches) / -float(noise.min()))
        noise = noise * min(1.0, max(0.0, room))
    factors = 1 + noise
    return (patches / compression * factors).round().clamp(1, patches).long()


def time_towers(
    models: Mapping[str, nn.Module], setting: Setting, rounds: int, warmup: int = 2, spread: float = 0.25
) -> list[Timing]:
    """Times models in one setting, in turn within each round. They are left on its device, in its dtype, without gradients.

    Args:
        models: label → a tower, or any model of timm.
        rounds: counted rounds, after `warmup` that are not.
        spread: of an image's tokens, see varied_counts: in inference a tower whose counts vary from image to image (Drip) gets
            budgets that differ so, with all that it does to meet them; others spend what they would spend anyway. In training it
            draws boundaries itself.
    """
    passes, errors = {}, {}
    try:
        for label, model in models.items():
            try:
                passes[label] = Pass(model, setting, spread)
            except FAILURES as error:  # its weights do not fit
                errors[label] = one_line(error)
        title = f"{setting.device} {setting.dtype}, {setting.mode}, batch {setting.batch}"
        ready = {label: one.ready for label, one in passes.items()}
        seconds = interleave(passes, rounds, warmup, setting.device, title, errors, ready)
    finally:
        for one in passes.values():
            one.end()
    first = seconds.get(next(iter(models)))
    result = []
    for label in models:
        if label in errors:
            result.append(Timing(label, None, None, None, None, None, None, rounds, errors[label]))
            continue
        own = seconds[label]
        median = statistics.median(own)
        q1, _, q3 = statistics.quantiles(own, n=4, method="inclusive") if rounds > 1 else (median,) * 3
        ratio = None if first is None else statistics.median(base / mine for base, mine in zip(first, own, strict=True))
        times = (1000 * median, 1000 * q1, 1000 * q3)
        result.append(Timing(label, *times, setting.batch / median, ratio, passes[label].tokens, rounds))
    return result


class Pass:
    """A pass that can be called again and again."""

    def __init__(self, model: nn.Module, setting: Setting, spread: float = 0.25):
        """Moves the model to the setting's device and dtype, and asks varied budgets of it where it takes them."""
        self.model, self.setting, self.lengths = model, setting, []
        self.trains, self.is_tower = setting.mode == "training", not lacks_of_tower(model)
        dtype = DTYPES[setting.dtype]
        self.autocast = self.trains and dtype != torch.float32
        model.to(setting.device, torch.float32 if self.trains else dtype).train(self.trains)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(setting.batch, *input_size(model), generator=generator)
        self.x = x.to(setting.device, torch.float32 if self.trains else dtype)
        self.labels = torch.zeros(setting.batch, dtype=torch.int64, device=setting.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) if self.trains else None
        self.budget, self.over = getattr(model, "budget", None), getattr(model, "over", "image")
        self.chosen = getattr(model, "counts_vary", False) and not model.is_dense and not self.trains
        if self.chosen:
            patches = model.patch_embed.num_patches
            rate = budget_of(model) or model.compression
            counts = varied_counts(setting.batch, patches, rate, spread, generator)
            model.set_compression(patches / counts, self.over)

    def __call__(self) -> None:
        if not self.trains:
            with torch.inference_mode():
                self._forward()
            return
        with torch.autocast(torch.device(self.setting.device).type, torch.bfloat16, enabled=self.autocast):
            logits, own_loss = self._forward()
            loss = own_loss + sum(_loss(part, self.labels) for part in logits)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _forward(self) -> tuple[list[Tensor], Tensor | float]:
        if not self.is_tower:
            answer = self.model(self.x)
            return [answer] if isinstance(answer, Tensor) else list(answer), 0.0  # deit_*_distilled has two heads
        tokens = self.model.forward_features(self.x)
        self.lengths.extend(tokens.packing.lengths)
        return [self.model.forward_head(tokens)], tokens.rate_loss.mean()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Around a pass, outside of its time: AdamW's moments, twice the weights, which not all towers can hold at once."""
        if not self.trains:
            yield
            return
        for parameter in self.model.parameters():
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self.optimizer.state[parameter] = {"step": step, **moments}
        try:
            yield
        finally:
            self.optimizer.state.clear()
            self.optimizer.zero_grad()

    @property
    def tokens(self) -> float | None:
        return statistics.fmean(self.lengths) if self.lengths else None

    def end(self) -> None:
        """The tower's own budget again."""
        if self.chosen:
            self.model.set_compression(self.budget, self.over)


def _loss(answer: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(answer.float(), labels) if answer.ndim == 2 else answer.float().square().mean()


def interleave(
    passes: Mapping[Name, Callable[[], object]],
    rounds: int,
    warmup: int,
    device: torch.device | str,
    title: str,
    errors: dict[Name, str] | None = None,
    ready: Mapping[Name, Callable[[], AbstractContextManager]] | None = None,
) -> dict[Name, list[float]]:
    """Seconds of each pass in each counted round; which one is first turns from round to round.

    errors: takes in what a pass failed with, which has no seconds then, and the others go on; None: a failure is raised.
    ready: what a pass is to stand in; not part of its time.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in passes}
    names = list(passes)
    for number in tqdm(range(warmup + rounds) if names else (), desc=title, leave=False, disable=None):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if errors is not None and name in errors:
                continue
            try:
                with nullcontext() if ready is None else ready[name]():
                    synchronize(device)
                    start = time.perf_counter()
                    passes[name]()
                    synchronize(device)
                    took = time.perf_counter() - start
            except FAILURES as error:
                if errors is None:
                    raise
                errors[name] = one_line(error)
                del seconds[name]
                continue
            if number >= warmup:
                seconds[name].append(took)
    return seconds


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
