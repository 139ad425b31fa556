"""How much the scheduler takes on, and what it may keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GIB = 1024**3


@dataclass(frozen=True)
class Limits:
    """Bounds of the queue, the running batch and the caches.

    Attributes:
        max_waiting: requests in the queue, those not counted that get a place at once; one more is refused.
        max_rows: requests that the model works on at once.
        max_cached_tokens: tokens whose keys and values are held. Half of them are for the running batch (its rows times the
            longest that one of them may become), half for what it does not work on: parked replies and past conversations. A
            request alone is always taken. None: as many as half of the free GPU memory holds, or 2 GiB of a CPU's.
        image_bytes: of tokens of pictures.
        prefill_tokens: of new prompts that are read between two tokens of the running replies.
        quantum: tokens that a reply may write while others wait for its place; of its prompt it may read 16 times as many.
    """

    max_waiting: int = 64
    max_rows: int = 64
    max_cached_tokens: int | None = None
    image_bytes: int = 256 * 1024**2
    prefill_tokens: int = 1024
    quantum: int = 64

    def __post_init__(self):
        for name, least in (
            ("max_waiting", 0),
            ("max_rows", 1),
            ("image_bytes", 0),
            ("prefill_tokens", 1),
            ("quantum", 1),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_cached_tokens is not None and not self.max_cached_tokens >= 0:
            raise ValueError(f"max_cached_tokens must be at least 0, got {self.max_cached_tokens}")

    def cached_tokens(self, model) -> int:
        """max_cached_tokens, or what it comes to with a model that has been put on its device."""
        if self.max_cached_tokens is not None:
            return self.max_cached_tokens
        config = model.config.text_config
        heads = getattr(config, "num_attention_heads", 1)
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        size = torch.empty((), dtype=model.language_model.dtype).element_size()
        layers, heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads
        device = next(model.language_model.parameters()).device
        memory = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2 * GIB
        context = getattr(config, "max_position_embeddings", 4096)
        return min(memory // (2 * layers * heads * width * size), 2 * self.max_rows * context)
