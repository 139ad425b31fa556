"""Drip's arguments, checked: what is unknown, and what has no meaning beside the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_drip.towers.checks import numbers, switches, whole
from llava_drip.towers.places import RELATIVE
from llava_drip.towers.rate import RATE_LOSSES
from llava_drip.towers.rules import RULES
from llava_drip.towers.scan import SCANS

SAMPLING = ("gumbel", "topk")


def check_arguments(
    boundary: str,
    rate_loss: str | None,
    rate_spread: float | None,
    rate_interval: Sequence[float] | None,
    predictor_dim: int | None,
    scan: str,
    relative: str,
    elastic: Sequence[float] | None,
    size_bias: bool,
    position_scale: float,
) -> None:
    """ValueError naming an argument of Drip that is unknown, or has no meaning beside the others."""
    for name, value, known in (
        ("boundary", boundary, RULES),
        ("rate_loss", rate_loss or "binomial", RATE_LOSSES),
        ("scan", scan, SCANS),
        ("relative", relative, RELATIVE),
    ):
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{name} must be one of {sorted(known)}, got {value!r}")
    switches(size_bias=size_bias)
    numbers("position_scale", (position_scale,), least=0)
    if predictor_dim is not None:
        whole("predictor_dim", predictor_dim, least=1, default="a quarter of the width")
    if boundary == "uniform" and predictor_dim is not None:
        raise ValueError('predictor_dim has no meaning with boundary="uniform", which learns nothing; leave it out')
    if not RULES[boundary].samples:
        for name, value in (("rate_loss", rate_loss), ("rate_spread", rate_spread), ("rate_interval", rate_interval)):
            if value is not None:
                raise ValueError(
                    f'{name} has no meaning with boundary="{boundary}", whose rate no loss decides; leave it out'
                )
    for name, value, loss in (
        ("rate_spread", rate_spread, "lower_bound"),
        ("rate_interval", rate_interval, "interval"),
    ):
        if value is not None and rate_loss != loss:
            raise ValueError(f'{name} belongs to rate_loss="{loss}"; leave it out')
    if rate_spread is not None:
        numbers("rate_spread", (rate_spread,), least=0)
    for name, value, least in (("rate_interval", rate_interval, 0), ("elastic", elastic, 1)):
        if value is None:
            continue
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise ValueError(f"{name} must be (low, high), got {value!r}")
        numbers(name, value, least)
        if value[0] > value[1]:
            raise ValueError(f"{name} must be (low, high) with low <= high, got {value}")


def check_sampling(boundary: str, sampling: str | None, detail_weight: float | None, blend: float | None) -> None:
    """The same, of what training does with the boundaries of a rule that is sampled."""
    given = {"sampling": sampling, "detail_weight": detail_weight, "blend": blend}
    for name, value in given.items():
        if value is not None and not RULES[boundary].samples:
            raise ValueError(
                f'{name} has no meaning with boundary="{boundary}", which the task does not train; leave it out'
            )
    if sampling is not None and sampling not in SAMPLING:
        raise ValueError(f"sampling must be one of {SAMPLING}, got {sampling!r}")
    if detail_weight is not None:
        numbers("detail_weight", (detail_weight,), least=0)
    if blend is not None:
        numbers("blend", (blend,), least=0)
        if blend > 1:
            raise ValueError(f"blend must be between 0 and 1, got {blend}")


def asked_compression(compression: float | Tensor | None, own: float) -> Tensor:
    """What set_compression is asked for, or else the tower's own: fp32, () or [B]. On the CPU even where the model is being built
    on another device: it decides how many tokens there are, which the host has to know. ValueError: below 1, no number, or of
    other dimensions."""
    asked = own if compression is None else compression
    if not isinstance(asked, Tensor):
        numbers("compression", (asked,), least=1)
    asked = torch.as_tensor(asked, dtype=torch.float32, device="cpu")
    if not bool((asked >= 1).all() and asked.isfinite().all()):
        raise ValueError(f"compression must be at least 1 (patches per token), got {compression}")
    if asked.ndim > 1:
        raise ValueError(f"compression must be one number, or [B] of them, got a tensor of shape {tuple(asked.shape)}")
    return asked
