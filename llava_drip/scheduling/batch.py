"""The rows that the model works on: they join, their prompts are read piece by piece, each gets one token a step, they leave."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from llava_drip.scheduling.row import Row
from llava_drip.scheduling.slots import KeysValues, Pass, SlotCache

MASKED_ATTENTION = ("sdpa", "eager")  # that take a mask [B, 1, Q, columns]


def why_one_at_a_time(language_model) -> str | None:
    """Why requests cannot share a batch of this model; None where they can."""
    config = language_model.config.get_text_config(decoder=True)
    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:  # a family's own kind of configuration
        return f"its cache is not known ({type(error).__name__})"
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        kinds = {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__}
        return f"its cache is not plain keys and values ({', '.join(sorted(kinds)) or 'no layers'})"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds & {"dynamic", "longrope"}:
        return f"its rotary frequencies follow the longest row ({', '.join(sorted(kinds))})"
    if config._attn_implementation not in MASKED_ATTENTION:
        return f"attention {config._attn_implementation!r} takes no mask of our own"
    if getattr(config, "alibi", False):
        return "its attention has biases (alibi) in the place of a mask"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "its local attention looks back from the longest row"
    if config.model_type == "doge":
        return "its attention chooses among all columns of a batch"
    missing = {"position_ids", "past_key_values"} - _arguments(language_model)
    if missing:
        return f"its forward takes no {' and '.join(sorted(missing))}"
    return None


def _arguments(language_model) -> set[str]:
    inner = language_model.get_base_model() if hasattr(language_model, "get_base_model") else language_model
    return set(inspect.signature(inner.forward).parameters)


class RunningBatch:
    """Rows in slots: the first `decoding` are writing, the others still read their prompts. A row's place is its slot."""

    def __init__(self, language_model, max_rows: int, max_tokens: int):
        self.model, self.max_rows, self.max_tokens = language_model, max_rows, max_tokens
        config = language_model.config.get_text_config(decoder=True)
        self.cache = SlotCache(len(DynamicCache(config=config).layers), max_rows, max_tokens)
        self.device = next(language_model.parameters()).device
        self.eager = config._attn_implementation == "eager"
        self.keeps_logits = "logits_to_keep" in _arguments(language_model)
        self.rows: list[Row] = []
        self.decoding = 0

    def fits(self, row: Row) -> bool:
        """Whether one more may join. A row alone always may."""
        longest = max([row.reserved, *(other.reserved for other in self.rows)])
        return not self.rows or (len(self.rows) < self.max_rows and longest * (len(self.rows) + 1) <= self.max_tokens)

    def join(self, row: Row) -> None:
        """With `row.kept`, its first `row.length` tokens, where there are some; the rest of the prompt is read from there."""
        self.rows.append(row)
        row.quantum = 0
        if row.kept is not None:
            slot = len(self.rows) - 1
            self.cache.make_room(len(self.rows), max(other.length for other in self.rows))
            self.cache.put(slot, row.kept, row.length)
            row.kept = None
        if row.prefilled:  # it was parked
            self._promote(len(self.rows) - 1)

    def _promote(self, place: int) -> None:
        """A row that has read its prompt comes to stand behind those that write."""
        target, rows = self.decoding, self.rows
        if place != target:
            other = rows[target]
            aside = self.cache.take(target, other.length) if other.length else None
            self.cache.move(place, target, rows[place].length)
            self.cache.clear(target, rows[place].length)
            if aside is not None:
                self.cache.put(place, aside, other.length)
            self.cache.clear(place, other.length)
            rows[target], rows[place] = rows[place], other
        self.decoding += 1

    def leave(self, row: Row) -> None:
        """Frees its slot; the last ones move up."""
        place = self.rows.index(row)
        if place < self.decoding:
            self.decoding -= 1
            self._fill(place, self.decoding)
            place = self.decoding
        self._fill(place, len(self.rows) - 1)
        if len(self.rows) - 1 < self.cache.size[0]:
            self.cache.clear(len(self.rows) - 1)
        self.rows.pop()
        if not self.rows:
            self.cache.drop()

    def _fill(self, place: int, source: int) -> None:
        if place != source:
            if self.rows[source].length:
                self.cache.move(source, place, self.rows[source].length)
            if place < self.cache.size[0]:
                self.cache.clear(place, self.rows[source].length)
            self.rows[place] = self.rows[source]

    def take(self, row: Row) -> KeysValues:
        """A copy of its keys and values."""
        return self.cache.take(self.rows.index(row), row.length)

    def reset(self) -> list[Row]:
        """Everything out, after a failure. Returns the rows."""
        rows, self.rows, self.decoding = self.rows, [], 0
        self.cache.drop()
        return rows

    def prefill(self, tokens: int) -> list[tuple[Row, Tensor]]:
        """Reads up to so many tokens of prompts (see prompt_shares). Returns the rows that are through, with the logits [V] of
        their last token."""
        rows = self.rows[self.decoding :]
        oldest = min(range(len(rows)), key=lambda number: rows[number].started)
        shares = prompt_shares([row.prompt_length - row.length for row in rows], tokens, oldest)
        reading = range(self.decoding, len(self.rows))
        longest_first = sorted(((share, place) for share, place in zip(shares, reading) if share), reverse=True)
        through, group = [], []
        for number, (share, place) in enumerate(longest_first):
            group.append((share, place))
            following = longest_first[number + 1][0] if number + 1 < len(longest_first) else 0
            if 2 * following < group[0][0]:  # more than half of its row would be padding
                through += self._read(sorted(group, key=lambda pair: pair[1]))
                group = []
        for row, _ in sorted(through, key=lambda pair: self.rows.index(pair[0])):
            self._promote(self.rows.index(row))
        return through

    def _read(self, group: list[tuple[int, int]]) -> list[tuple[Row, Tensor]]:
        """(tokens, place) of each row, by place."""
        rows, counts = [self.rows[place] for _, place in group], [share for share, _ in group]
        now = Pass([place for _, place in group], [row.length for row in rows], counts, self.device)
        embeds = rows[0].embeds.new_zeros(len(rows), now.queries, rows[0].embeds.shape[1])
        for number, (row, count) in enumerate(zip(rows, counts)):
            embeds[number, :count] = row.embeds[row.length : row.length + count]
        ends = sorted({count - 1 for count in counts})
        keep = torch.tensor(ends, device=self.device)
        logits = self._forward(now, keep if self.keeps_logits else None, inputs_embeds=embeds)
        if not self.keeps_logits:
            logits = logits[:, keep]
        through = []
        for number, (row, count) in enumerate(zip(rows, counts)):
            row.length += count
            if row.prefilled:
                row.embeds = None
                through.append((row, logits[number, ends.index(count - 1)]))
        return through

    def decode(self) -> Tensor:
        """Reads the last token of every row that writes; [decoding, V]: the logits of the next."""
        rows = self.rows[: self.decoding]
        now = Pass(list(range(len(rows))), [row.length for row in rows], [1] * len(rows), self.device)
        ids = torch.tensor([[row.tokens[-1]] for row in rows], device=self.device)
        logits = self._forward(now, None, input_ids=ids)[:, -1]
        for row in rows:
            row.length += 1
        return logits

    def _forward(self, now: Pass, keep: Tensor | None, **inputs) -> Tensor:
        self.cache.make_room(len(self.rows), max([now.columns, *(row.length for row in self.rows)]))
        self.cache.now = now
        mask = now.mask()
        if self.eager:  # which adds it
            dtype = next(self.model.parameters()).dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        if keep is not None:
            inputs["logits_to_keep"] = keep
        out = self.model(
            attention_mask=mask, position_ids=now.places, past_key_values=self.cache, use_cache=True, **inputs
        )
        return out.logits


def prompt_shares(wanted: list[int], total: int, oldest: int) -> list[int]:
    """Divides the tokens of a step: half of them for the oldest, which so is never starved; the others go to the shortest first,
    which so are never held up by long ones, nor by each other."""
    shares, left = [0] * len(wanted), total
    for place, most in [
        (oldest, -(-total // 2)),
        *((place, total) for place in sorted(range(len(wanted)), key=wanted.__getitem__)),
    ]:
        more = min(wanted[place] - shares[place], most, left)
        shares[place] += more
        left -= more
    return shares
