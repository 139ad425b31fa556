"""Keys and values of many sequences of different lengths, one in each slot, as a cache that transformers' decoders take.

Every sequence starts at column 0 of its slot, so a token's column is its position, joining and leaving move nothing of the
others, and the mask is one comparison. New tokens are written in place; DynamicCache would copy everything at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

STEP = 64  # columns are added in multiples of it

KeysValues = list[tuple[Tensor, Tensor]]  # of each layer, [heads, tokens, head width] each


@dataclass
class Pass:
    """Which tokens go through the model now: B sequences, each with new tokens up to a padding on the right.

    Attributes:
        slots: of the sequences.
        starts: how many tokens each has in the cache.
        counts: how many each gets.
    """

    slots: list[int]
    starts: list[int]
    counts: list[int]
    device: torch.device

    def __post_init__(self):
        self.queries = max(self.counts)
        self.width = max(start + count for start, count in zip(self.starts, self.counts))
        self.columns = max(self.starts) + self.queries  # that padding may write to
        steps = torch.arange(self.queries, device=self.device)
        self.positions = torch.tensor(self.starts, device=self.device)[:, None] + steps  # [B, Q] int64
        # What the model is told: padding has the place of its row's last token, lest it lie behind the last there is.
        ends = torch.tensor([start + count - 1 for start, count in zip(self.starts, self.counts)], device=self.device)
        self.places = torch.minimum(self.positions, ends[:, None])
        first, last = self.slots[0], self.slots[-1]
        self.range = slice(first, last + 1) if self.slots == list(range(first, last + 1)) else None
        self.rows = torch.tensor(self.slots, device=self.device)

    def mask(self) -> Tensor:
        """[B, 1, Q, width] bool: a token attends to the columns up to its own."""
        return (torch.arange(self.width, device=self.device) <= self.positions[..., None])[:, None]


class SlotLayer(CacheLayerMixin):
    """One layer: keys and values [slots, heads, columns, head width]."""

    is_sliding = False

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros: what is masked is multiplied by 0, and 0 times a nan that lay in the memory would be a nan.
        self.keys, self.values = (self._empty(x, *self.cache.size) for x in (key_states, value_states))
        self.is_initialized = True

    @staticmethod
    def _empty(like: Tensor, slots: int, columns: int) -> Tensor:
        return like.new_zeros(slots, like.shape[1], columns, like.shape[3])

    def resize(self, slots: int, columns: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._empty(old, slots, columns)
            used = (slice(min(slots, old.shape[0])), slice(None), slice(min(columns, old.shape[2])))
            new[used] = old[used]
            setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """key_states, value_states: [B, heads, Q, head width], of the tokens of the cache's pass → all up to its width."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        now = self.cache.now
        return self._write(self.keys, key_states, now), self._write(self.values, value_states, now)

    @staticmethod
    def _write(store: Tensor, new: Tensor, now: Pass) -> Tensor:
        if len(now.slots) == 1:
            start = now.starts[0]
            store[now.slots[0], :, start : start + now.queries] = new[0]
        else:
            store[now.rows[:, None], :, now.positions] = new.transpose(1, 2)
        seen = store[:, :, : now.width]
        return seen.index_select(0, now.rows) if now.range is None else seen[now.range]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.now.width, 0

    def get_seq_length(self) -> int:
        return max(self.cache.now.starts)

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """What the language model is given as past_key_values; `now` says which tokens a forward brings."""

    def __init__(self, layers: int, max_slots: int, max_tokens: int):
        """max_tokens: slots times columns that are held, unless what is in use needs more."""
        self.max_slots, self.max_tokens, self.now = max_slots, max_tokens, None
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])
        self.size = (0, 0)  # slots, columns

    def make_room(self, slots: int, columns: int) -> None:
        """slots, columns: what is in use, and about to be."""
        had_slots, had_columns = self.size
        if slots <= had_slots and columns <= had_columns:
            return
        more_slots = max(slots, min(2 * had_slots, self.max_slots)) if slots > had_slots else had_slots
        more_columns = _rounded(max(columns, 3 * had_columns // 2)) if columns > had_columns else had_columns
        if more_slots * more_columns > self.max_tokens:
            more_slots, more_columns = slots, _rounded(columns)
        self.size = more_slots, more_columns
        for layer in self.layers:
            if layer.is_initialized:
                layer.resize(*self.size)

    def take(self, slot: int, length: int) -> KeysValues:
        """A copy of the first tokens of a slot."""
        return [(layer.keys[slot, :, :length].clone(), layer.values[slot, :, :length].clone()) for layer in self.layers]

    def put(self, slot: int, kept: KeysValues, length: int) -> None:
        """The first tokens of what `take` gave, into a slot that `begin` has made."""
        for layer, (keys, values) in zip(self.layers, kept):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.keys[slot, :, :length] = keys[:, :length]
            layer.values[slot, :, :length] = values[:, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """A sequence to another slot, over what is there."""
        for layer in self.layers:
            for store in (layer.keys, layer.values):
                store[target, :, :length] = store[source, :, :length]

    def clear(self, slot: int, first: int = 0) -> None:
        """Zeros from a column on, lest something broken of one sequence reach the next in its slot."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[slot, :, first:] = 0
                layer.values[slot, :, first:] = 0

    def drop(self) -> None:
        """Frees the memory."""
        self.size, self.now = (0, 0), None
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False


def _rounded(columns: int) -> int:
    return -(-columns // STEP) * STEP
