"""Tokens of pictures, kept by what the tower sees of them and by their budget."""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor

from llava_drip.assistant.expand import expand_placeholders
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
    """Projected tokens of pictures, least recently used first out, bounded in bytes.

    Each picture goes through the tower by itself, so that its tokens depend on nothing but itself, to the last bit.
    """

    def __init__(self, model, max_bytes: int):
        self.model, self.max_bytes, self.bytes = model, max_bytes, 0
        self.kept: OrderedDict[PictureKey, Tensor] = OrderedDict()
        self.hits = self.misses = 0

    def key(self, name: bytes, compression: float | None) -> PictureKey:
        return name, budget_of(self.model) if compression is None else compression

    def tokens(self, name: bytes, pixels: Tensor, compression: float | None) -> Tensor:
        """[n, language-model width]. name: the digest of pixels, [3, height, width]."""
        key = self.key(name, compression)
        if (found := self.kept.get(key)) is not None:
            self.hits += 1
            self.kept.move_to_end(key)
            return found
        self.misses += 1
        with at_compression(self.model, compression):
            # a clone: not a view into something larger
            values = self.model.encode_images(pixels[None]).values.clone()
        size = values.numel() * values.element_size()
        if size <= self.max_bytes:
            self.kept[key] = values
            self.bytes += size
            while self.bytes > self.max_bytes:
                _, old = self.kept.popitem(last=False)
                self.bytes -= old.numel() * old.element_size()
        return values


def splice(model, ids: Tensor, tokens: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """One conversation's embeddings, visual tokens in place.

    Args:
        ids: [L] int64 with one placeholder an image.
        tokens: [n_i, D] of each image.
    Returns:
        embeddings [1, L', D], ids [L'] with the placeholder on every visual position, is_image [L'] bool.
    """
    counts = torch.tensor([len(values) for values in tokens], dtype=torch.int64, device=ids.device)
    expanded = expand_placeholders(ids[None], torch.ones_like(ids)[None], model.config.image_token_id, counts)
    embeds = model.splice(expanded, torch.cat(tokens) if tokens else None)
    return embeds, expanded.input_ids[0], expanded.is_image[0]
