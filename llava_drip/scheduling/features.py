"""Tokens of pictures, kept by what the tower sees of them and by their budget."""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from llava_drip.towers.contract import budget_kept

PictureKey = tuple[bytes, float | None]  # digest of the pixels; patches per token, None: the tower decides


def digest(pixels: Tensor) -> bytes:
    """16 bytes that name preprocessed pixels."""
    return hashlib.blake2b(pixels.contiguous().cpu().numpy().tobytes(), digest_size=16).digest()


@contextlib.contextmanager
def at_compression(model, compression: float | None) -> Iterator[None]:
    """The model's tower with another budget for a while; None: with its own. The caller has the model to itself."""
    with budget_kept(model.vision_tower):
        if compression is not None:
            model.vision_tower.set_compression(compression)  # not the model's, which writes into the configuration
        yield


def budget_of(model) -> float | None:
    """Patches per token that the model's tower is set to."""
    budget = getattr(model.vision_tower, "budget", None)
    return float(budget) if isinstance(budget, Tensor) and budget.ndim == 0 else budget


class FeatureCache:
    """Projected tokens of pictures, least recently used first out, bounded in bytes."""

    def __init__(self, model, max_bytes: int):
        self.model, self.max_bytes, self.bytes = model, max_bytes, 0
        self.kept: OrderedDict[PictureKey, Tensor] = OrderedDict()
        self.hits = self.misses = 0

    def key(self, name: bytes, compression: float | None) -> PictureKey:
        return name, budget_of(self.model) if compression is None else compression

    def tokens(self, wanted: list[tuple[bytes, Tensor, float | None]]) -> list[tuple[PictureKey, Tensor]]:
        """Keys and tokens [n, language-model width] of pictures; those that are not kept go through the tower together.

        wanted: (digest, pixels [3, height, width], compression) of each.
        """
        keys = [self.key(name, compression) for name, _, compression in wanted]
        found = {key: self.kept[key] for key in keys if key in self.kept}
        self.hits += sum(key in found for key in keys)
        self.misses += sum(key not in found for key in keys)
        missing: dict[float | None, dict[PictureKey, Tensor]] = {}
        for key, (_, pixels, compression) in zip(keys, wanted):
            if key not in found:
                missing.setdefault(compression, {})[key] = pixels
        for compression, pictures in missing.items():
            with at_compression(self.model, compression):
                tokens = self.model.encode_images(torch.stack(list(pictures.values())))
            found |= {key: values.clone() for key, values in zip(pictures, tokens.split())}  # no views of all of them
        for key in keys:
            self._keep(key, found[key])
        return [(key, found[key]) for key in keys]

    def _keep(self, key: PictureKey, values: Tensor) -> None:
        if key not in self.kept:
            self.bytes += _size(values)
        self.kept[key] = values
        self.kept.move_to_end(key)
        while self.bytes > self.max_bytes:
            self.bytes -= _size(self.kept.popitem(last=False)[1])


def _size(values: Tensor) -> int:
    return values.numel() * values.element_size()


def splice(model, ids: Tensor, tokens: list[Tensor]) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """One conversation's embeddings, visual tokens in place: what model.splice makes of a batch, for one row without padding.

    Args:
        ids: [L] int64 on the CPU with one placeholder an image.
        tokens: [n_i, D] of each image, on the model's device.
    Returns:
        embeddings [L', D] on that device, ids [L'] with the placeholder on every visual position, is_image [L'] bool.
    """
    ids = ids.numpy()
    placeholders = ids == model.config.image_token_id
    if placeholders.sum() != len(tokens):
        raise ValueError(f"the conversation has {placeholders.sum()} <image> placeholders and {len(tokens)} images")
    repeats = np.ones_like(ids)
    repeats[placeholders] = [len(values) for values in tokens]
    expanded, is_image = ids.repeat(repeats), placeholders.repeat(repeats)
    embeds = model.get_input_embeddings()(torch.from_numpy(np.where(is_image, 0, expanded)).to(model.device))
    if tokens:
        embeds[torch.from_numpy(np.flatnonzero(is_image)).to(model.device)] = torch.cat(tokens).to(embeds)
    return embeds, expanded, is_image
