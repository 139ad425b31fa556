"""Arguments of towers, each checked by itself: ValueError naming it and what it must be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

_UNITS = {"compression": " (patches per token)"}


def numbers(name: str, values: Iterable[Any], least: float) -> None:
    """Each a finite number from `least` on; numpy's scalars are numbers, bools are none."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < least:
            raise ValueError(f"{name} must be a number, at least {least}{_UNITS.get(name, '')}, got {value!r}")


def whole(name: str, value: Any, least: int, default: str = "") -> None:
    """A whole number from `least` on. default: what None would mean, for the message; None itself is not taken."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        hint = f" (or None: {default})" if default else ""
        raise ValueError(f"{name} must be a whole number, at least {least}{hint}, got {value!r}")


def switches(**values: Any) -> None:
    """Each True or False: as a condition, a text like "no" would be true."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
