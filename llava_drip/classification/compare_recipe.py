"""The recipe of scripts/compare_towers.py: one protocol, and the towers that are trained by it.

protocol: {img_size: 32, batch_size: 128, steps: 1000, lr: 1.0e-3, augmentation: {flip: true, shift: 4}}   (more: Protocol)
common: {model: drip_tiny_patch16_224, patch_size: 4}     # model and arguments of every variant, unless it has its own
dense: dense                                             # the variant that the others are compared with
variants:                                                # rate_loss_weight: of rate loss and detail loss together (step.py)
  dense: {compression: 1}
  elastic: {compression: 4, read_at: [2, 4, null]}        # evaluated at several compressions; null: each image decides
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llava_drip.classification.in_memory import Augmentation

PRECISIONS = ("fp32", "bf16")
_OWN = ("model", "read_at", "rate_loss_weight")  # of a variant; all else are arguments of its model


@dataclass(frozen=True)
class Protocol:
    """How every variant is trained: AdamW, `warmup_steps` of a rising rate, then a cosine to 0 at `steps`."""

    img_size: int
    batch_size: int
    steps: int
    lr: float
    warmup_steps: int = 0
    weight_decay: float = 0.05  # not of vectors, nor of what the model exempts (positions)
    clip_grad: float | None = None  # norm over all gradients
    augmentation: Augmentation = field(default_factory=Augmentation)
    precision: str = "fp32"
    # of what boundaries ask for: the rate loss and detail_weight times the detail loss; None: each tower's own
    rate_loss_weight: float | None = None

    def rate(self, step: int) -> float:
        """Share of `lr` at a step, from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / (self.steps - self.warmup_steps)))


@dataclass(frozen=True)
class Variant:
    """A tower by timm's name and arguments. read_at: compressions that it is evaluated at, None for the model as it is."""

    name: str
    model: str
    arguments: dict[str, Any]
    read_at: tuple[float | None, ...] | None = None
    rate_loss_weight: float | None = None  # None: the protocol's


@dataclass(frozen=True)
class Comparison:
    """A recipe as it was read. dense: name of the reference, None where the recipe has none."""

    protocol: Protocol
    variants: dict[str, Variant]
    dense: str | None

    def settings(self, name: str) -> dict:
        """What decides the result of a variant besides the seed and the data, as JSON holds it."""
        variant = self.variants[name]
        protocol = dataclasses.asdict(self.protocol)
        if variant.rate_loss_weight is not None:
            protocol["rate_loss_weight"] = variant.rate_loss_weight
        settings = {"protocol": protocol, "model": variant.model, "arguments": variant.arguments}
        return json.loads(json.dumps({**settings, "read_at": variant.read_at}))


def read_comparison(path: str | Path, steps: int | None = None) -> Comparison:
    """A recipe file. steps: instead of the protocol's.

    Raises:
        ValueError: naming the file and what is wrong in it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    try:
        recipe = _mapping(recipe, "the recipe")
        _known(recipe, ("protocol", "common", "dense", "variants"), "the recipe")
        given = _mapping(recipe.get("protocol"), "protocol")
        protocol = _protocol({**given, "steps": steps} if steps is not None else given)
        common = _mapping(recipe.get("common") or {}, "common")
        named = _mapping(recipe.get("variants"), "variants")
        variants = {name: _variant(name, {**common, **_mapping(own or {}, name)}) for name, own in named.items()}
        if not variants:
            raise ValueError("variants: names no tower")
        dense = recipe.get("dense")
        if dense is not None and dense not in variants:
            raise ValueError(f"dense: {dense!r} is none of the variants ({', '.join(variants)})")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Comparison(protocol, variants, dense)


def _mapping(value: object, what: str) -> dict:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what}: must be 'name: value' lines, with names that are texts")
    return value


def _known(given: dict, known: tuple[str, ...], what: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{what}: does not know {key!r}; it has {', '.join(known)}")


def _number(value: object, what: str, least: float, whole: bool = False, above: bool = False) -> Any:
    kinds = (int,) if whole else (int, float)
    if type(value) in kinds and math.isfinite(value) and (value > least if above else value >= least):
        return value if whole else float(value)
    kind = "a whole number" if whole else "a number"
    hint = " (YAML takes 1e-3 for a text: write 1.0e-3)" if isinstance(value, str) else ""
    raise ValueError(f"{what}: must be {kind} {'above' if above else 'of at least'} {least:g}, got {value!r}{hint}")


# Of the protocol: name → what its value must be.
_CHECKS: dict[str, Callable[[object, str], Any]] = {
    **{name: lambda v, what: _number(v, what, 1, whole=True) for name in ("img_size", "batch_size", "steps")},
    "lr": lambda v, what: _number(v, what, 0, above=True),
    "warmup_steps": lambda v, what: _number(v, what, 0, whole=True),
    "weight_decay": lambda v, what: _number(v, what, 0),
    "rate_loss_weight": lambda v, what: None if v is None else _number(v, what, 0),
    "clip_grad": lambda v, what: None if v is None else _number(v, what, 0, above=True),
    "augmentation": lambda v, what: _augmentation(v, what),
    "precision": lambda v, what: _one_of(v, what, PRECISIONS),
}


def _protocol(given: dict) -> Protocol:
    _known(given, tuple(_CHECKS), "protocol")
    for name in ("img_size", "batch_size", "steps", "lr"):
        if name not in given:
            raise ValueError(f"protocol: {name} is missing")
    protocol = Protocol(**{name: _CHECKS[name](value, f"protocol: {name}") for name, value in given.items()})
    if protocol.warmup_steps >= protocol.steps:
        raise ValueError(f"protocol: warmup_steps {protocol.warmup_steps} must be fewer than steps {protocol.steps}")
    return protocol


def _one_of(value: object, what: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{what}: must be one of {', '.join(known)}, got {value!r}")
    return value


def _augmentation(given: object, what: str) -> Augmentation:
    given = _mapping(given or {}, what)
    _known(given, ("flip", "shift", "scale"), what)
    flip, shift, scale = given.get("flip", False), given.get("shift", 0), given.get("scale")
    if type(flip) is not bool:
        raise ValueError(f"{what}: flip must be true or false, got {flip!r}")
    _number(shift, f"{what}: shift (pixels)", 0, whole=True)
    if scale is None:
        return Augmentation(flip, shift)
    if shift:
        raise ValueError(f"{what}: shift and scale: a random crop moves the picture already; give one of them")
    if not (isinstance(scale, list) and len(scale) == 2 and all(type(v) in (int, float) for v in scale)):
        raise ValueError(f"{what}: scale must be two shares of the area, [0.35, 1.0] say, got {scale!r}")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"{what}: scale must be two rising numbers above 0 and at most 1, got {scale}")
    return Augmentation(flip, 0, (float(scale[0]), float(scale[1])))


def _variant(name: str, given: dict) -> Variant:
    what = f"variant {name}"
    if not isinstance(given.get("model"), str):
        raise ValueError(f"{what}: model (a name that timm knows) is missing, here and in common")
    weight, read_at = given.get("rate_loss_weight"), given.get("read_at")
    if weight is not None:
        weight = _number(weight, f"{what}: rate_loss_weight", 0)
    if read_at is not None:
        if not isinstance(read_at, list) or not read_at:
            raise ValueError(
                f"{what}: read_at must be a list of compressions (null: each image decides), got {read_at!r}"
            )
        read_at = tuple(v if v is None else _number(v, f"{what}: read_at", 1) for v in read_at)
    arguments = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in given.items()
        if key not in _OWN and value is not None
    }
    return Variant(name, given["model"], arguments, read_at, weight)
