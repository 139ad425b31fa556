"""What a run gets done: samples and tokens a second, the share of them that is no padding, peak memory; beside each loss."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llava_drip.instruct.cost import EpochCost


class Throughput:
    """Counts what the language model is given, by a hook on it. Seconds are those of the steps, without checkpoints."""

    def __init__(self, language_model: nn.Module, cost: EpochCost):
        self.cost = cost
        self.samples, self.slots = 0, 0
        self.tokens: int | Tensor = 0  # on the device: nothing waits for it before it is logged
        language_model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        packing, mask = kwargs.get("packing"), kwargs.get("attention_mask")
        if not module.training or (packing is None and mask is None):
            return
        if packing is not None:
            self.samples, self.slots = self.samples + len(packing.lengths), self.slots + packing.total
            self.tokens = self.tokens + packing.total
        else:
            self.samples, self.slots = self.samples + len(mask), self.slots + mask.numel()
            self.tokens = self.tokens + mask.sum()

    def rates(self, device: torch.device) -> dict[str, float]:
        """Since the last call, over all ranks (a collective); empty before a step has ended.

        {"samples_per_second", "tokens_per_second": positions of the language model, visual tokens among them, without padding,
        "non_padding": their share of all positions, "step_peak_memory_gib": of the rank and step that had most}
        """
        seconds, memory = self.cost.recent()
        counts = torch.tensor([self.samples, float(self.tokens), self.slots], dtype=torch.float32, device=device)
        peaks = torch.tensor([seconds, memory], dtype=torch.float32, device=device)
        self.samples, self.slots, self.tokens = 0, 0, 0
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(peaks, dist.ReduceOp.MAX)
        (samples, tokens, slots), (seconds, memory) = counts.tolist(), peaks.tolist()
        if not seconds or not slots:
            return {}
        return {
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "non_padding": tokens / slots,
            "step_peak_memory_gib": memory,
        }
