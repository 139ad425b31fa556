"""TokenBatch: variable-length tokens of a batch of images, packed without padding.

The one thing that flows from a tower to the projector, the language model, the measurements and the drawings.

Shape legend, used in every room: B images, N patches of an image, P prefix tokens (class, registers), n_i tokens of image i,
T = sum(n_i) tokens of the batch, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor


class _made_once:
    """functools.cached_property without the lock that it has before Python 3.12, at which torch.compile breaks the graph."""

    def __init__(self, make: Callable):
        self.make, self.__doc__ = make, make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, packing: Packing | None, owner: type):
        if packing is None:
            return self
        value = self.make(packing)
        object.__setattr__(packing, self.name, value)  # found there from now on
        return value


@dataclass(frozen=True)
class Packing:
    """How a packed [T, ...] tensor divides into sequences. Lengths live on the host: reading them back is one sync.
    What kernels need of them on the device is made once and shared by all blocks.

    A frame that torch.compile has compiled is compiled anew for other lengths if it looked at them; so what differs from batch
    to batch is looked at in `of`, `grown_by` and the ragged ways of attention, which are not compiled.

    Attributes:
        lengths: tokens of each sequence. total: their sum. longest: the largest of them.
        uniform: all sequences are equally long: [T, ...] is then a view of [B, n, ...].
    """

    lengths: tuple[int, ...]
    device: torch.device
    total: int = field(init=False, compare=False, repr=False)
    longest: int = field(init=False, compare=False, repr=False)
    uniform: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self):
        longest, total = max(self.lengths, default=0), sum(self.lengths)
        for name, value in (("total", total), ("longest", longest), ("uniform", total == longest * len(self.lengths))):
            object.__setattr__(self, name, value)

    @staticmethod
    def equal(images: int, length: int, device: torch.device) -> Packing:
        """`images` sequences of one length."""
        return Packing((length,) * images, device)

    @staticmethod
    def of(lengths: Tensor) -> Packing:
        """lengths: [B] integers, any device."""
        return _packing_of(lengths)

    def grown_by(self, count: int) -> Packing:
        """Sequences longer by `count` (shorter, where it is negative)."""
        if self.uniform:
            return Packing.equal(len(self.lengths), self.longest + count, self.device)
        return self._each_grown_by(count)

    @torch.compiler.disable
    def _each_grown_by(self, count: int) -> Packing:
        packing = Packing(tuple(n + count for n in self.lengths), self.device)
        object.__setattr__(packing, "lengths_tensor", self.lengths_tensor + count)
        return packing

    @_made_once
    def lengths_tensor(self) -> Tensor:
        """[B] int64, the lengths on the device."""
        if self.uniform:
            return torch.full((len(self.lengths),), self.longest, dtype=torch.int64, device=self.device)
        return self._lengths_on_device()

    @torch.compiler.disable
    def _lengths_on_device(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.device)

    @_made_once
    def cu_seqlens(self) -> Tensor:
        """[B + 1] int32 cumulative lengths from 0, as variable-length attention kernels take them."""
        return F.pad(self.lengths_tensor.cumsum(0, dtype=torch.int32), (1, 0))

    @_made_once
    def image_of_token(self) -> Tensor:
        """[T] int64: the image each packed token belongs to."""
        images = torch.arange(len(self.lengths), device=self.device)
        return images.repeat_interleave(self.lengths_tensor, output_size=self.total)

    @_made_once
    def place_of_token(self) -> Tensor:
        """[T] int64: the place of each packed token within its image, from 0."""
        return torch.arange(self.total, device=self.device) - self.cu_seqlens[:-1].long()[self.image_of_token]

    @_made_once
    def units_of_token(self) -> Tensor:
        """[T] int64: how many tokens the image of each packed token has."""
        return self.lengths_tensor.repeat_interleave(self.lengths_tensor, output_size=self.total)

    def pad(self, x: Tensor, fill: float) -> Tensor:
        """[T, ...] → [B, longest, ...] with `fill` behind each image's last token."""
        if self.uniform:
            return x.unflatten(0, (len(self.lengths), self.longest))
        return self._pad_ragged(x, fill)

    @torch.compiler.disable
    def _pad_ragged(self, x: Tensor, fill: float) -> Tensor:
        padded = x.new_full((*self.mask.shape, *x.shape[1:]), fill)
        padded[self.mask] = x
        return padded

    def unpad(self, x: Tensor) -> Tensor:
        """[B, longest, ...] → [T, ...]."""
        return x.flatten(0, 1) if self.uniform else self._unpad_ragged(x)

    @torch.compiler.disable
    def _unpad_ragged(self, x: Tensor) -> Tensor:
        return x[self.mask]

    @_made_once
    def mask(self) -> Tensor:
        """[B, longest] bool, True on real tokens; row-major True positions are the packed order."""
        return torch.arange(self.longest, device=self.device)[None] < self.lengths_tensor[:, None]


@torch.compiler.disable
def _packing_of(lengths: Tensor) -> Packing:
    packing = Packing(tuple(lengths.tolist()), lengths.device)
    object.__setattr__(packing, "lengths_tensor", lengths.long())  # known already
    return packing


@dataclass
class TokenBatch:
    """Packed tokens of B images.

    Attributes:
        values: [T, D] tokens of image 0, then of image 1, and so on.
        lengths: [B] int64, tokens of each image (T = lengths.sum()).
        segments: [B, N] int64 or None: the token (0 .. lengths[b] - 1) into which each patch was pooled, -1 for a patch that was
            dropped; patches in raster order.
        rate_loss: [B] fp32, what the boundaries ask to be added to the task's loss: the boundary-rate loss and, weighted, what
            pooling loses (of the entropy rule, its head's cross-entropy); zeros in eval and for towers without boundaries.
        prefix: [B, P, D] or None: class and register tokens. Never pooled, not part of `values`.
        boundary_probs: [B, N] fp32 or None: how probable it is that a segment ends with each patch (raster order); 1 for the
            last of the scan. No gradient. None where there was nothing to decide. The entropy rule has scores instead, above 1/2
            where it cuts.
        token_maps: [B, S, H, W] fp32 or None: the weight of each patch in each of S learned tokens (TokenLearner). No gradient.
    """

    values: Tensor
    lengths: Tensor
    segments: Tensor | None = None
    rate_loss: Tensor | None = None
    prefix: Tensor | None = None
    boundary_probs: Tensor | None = None
    token_maps: Tensor | None = None
    _packing: Packing | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if self.rate_loss is None:
            self.rate_loss = self.values.new_zeros(len(self.lengths), dtype=torch.float32)

    @property
    def packing(self) -> Packing:
        if self._packing is None:
            self._packing = Packing.of(self.lengths)
        return self._packing

    def __len__(self) -> int:
        return len(self.lengths)

    def with_values(self, values: Tensor) -> TokenBatch:
        """The same tokens with other contents, [T, any width]; the prefix, of the old width, is dropped."""
        assert len(values) == len(self.values), f"{len(values)} values for {len(self.values)} tokens"
        return replace(self, values=values, prefix=None)

    def split(self) -> list[Tensor]:
        """One [n_i, D] view for each image."""
        return list(self.values.split(self.packing.lengths))

    def mean(self, over: str = "tokens") -> Tensor:
        """[B, D]: mean over the tokens of each image (each has at least one). Over "patches": each as often as it has patches,
        so that what covers most of a picture counts most, however few tokens it became; dropped patches count for nothing."""
        assert over in ("tokens", "patches"), over
        packing = self.packing
        # Where there are as many tokens as patches each is one patch.
        weighted = over == "patches" and (self.segments is None or packing.total != self.segments.numel())
        if packing.uniform and not weighted:
            return self.values.view(len(self), packing.longest, -1).mean(1)
        # Sums in fp32: an image may have hundreds of tokens.
        values = self.values.float()
        count = self.lengths
        if weighted:
            values, count = values * self.sizes[:, None], (self.segments >= 0).sum(1)
        sums = values.new_zeros(len(self), values.shape[1]).index_add(0, packing.image_of_token, values)
        return (sums / count[:, None]).to(self.values.dtype)

    @property
    def sizes(self) -> Tensor:
        """[T] fp32: patches of each token."""
        owners = self._owners("sizes").flatten()
        kept = (self.segments >= 0).flatten().float()
        return kept.new_zeros(len(self.values)).index_add(0, owners, kept)

    def _owners(self, what: str) -> Tensor:
        """[B, N] int64: row of `values` of each patch's token; of a dropped patch, which has none, the first of its image."""
        if self.segments is None:
            raise ValueError(f"{what}: these tokens carry no segments, so it is not known which patches they came from")
        return self.segments.clamp(min=0) + self.packing.cu_seqlens[:-1].long()[:, None]

    def to_padded(self) -> tuple[Tensor, Tensor]:
        """tokens [B, longest, D] with zeros behind each image's last token, mask [B, longest] bool (True on real tokens)."""
        mask = self.packing.mask
        tokens = self.values.new_zeros(*mask.shape, self.values.shape[-1])
        tokens[mask] = self.values
        return tokens, mask

    def unpool(self) -> Tensor:
        """[B, N, D]: each patch, in raster order, gets the token it went into, a dropped patch zeros. For maps over the image,
        and dense targets."""
        return self.values[self._owners("unpool")].masked_fill((self.segments < 0)[..., None], 0)

    def means_of(self, patches: Tensor) -> Tensor:
        """Something of each patch, [B, N, D], raster order → its mean over the patches that each token stands for, [T, D]; zeros
        for a token of no patch, as SeNaTra has them."""
        kept = (self.segments >= 0)[..., None]
        owners = self._owners("means_of").flatten()
        sums = patches.new_zeros(len(self.values), patches.shape[-1], dtype=torch.float32)
        sums = sums.index_add(0, owners, (patches.float() * kept).flatten(0, 1))
        return (sums / self.sizes.clamp(min=1)[:, None]).to(patches.dtype)

    @classmethod
    def from_padded(cls, tokens: Tensor, mask: Tensor) -> TokenBatch:
        """Pack tokens [B, L, D] where mask [B, L] bool is True; the True positions may lie anywhere in a row."""
        if mask.shape != tokens.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool of shape {tuple(tokens.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        return cls(values=tokens[mask], lengths=mask.sum(1))
