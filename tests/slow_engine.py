"""Answers that take their time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from llava_drip.engine import Engine


@contextlib.contextmanager
def slow(engine: Engine, seconds: float = 0.01) -> Iterator[None]:
    """Through the real code, but each step takes longer and no token ends a reply."""
    handle = engine.model.language_model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    eos, engine.model.generation_config.eos_token_id = engine.model.generation_config.eos_token_id, None
    try:
        yield
    finally:
        handle.remove()
        engine.model.generation_config.eos_token_id = eos
