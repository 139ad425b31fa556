"""Parameters that DeepSpeed's ZeRO-3 has divided among the ranks, whole for a while."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled


def gathered(parameters: Iterable[nn.Parameter], write: bool = False) -> AbstractContextManager:
    """Within it they are whole, which under ZeRO-3 they are not; all ranks call it.

    write: rank 0 changes them.
    """
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None)
