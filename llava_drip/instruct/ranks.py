"""The processes of a run: how they join, leave, and agree. Without a launcher there is one, and nothing is sent."""

from __future__ import annotations

import os
import socket
import sys
import time

import torch
import torch.distributed as dist
from transformers import TrainingArguments


def join_ranks(args: TrainingArguments) -> None:
    """Start the process group of a distributed run, also DeepSpeed's, which transformers leaves out on CPU ranks."""
    launched = {"RANK", "OMPI_COMM_WORLD_RANK"} & set(os.environ)
    if args.deepspeed and not launched:  # plain python: what a launcher does, for one rank
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = args.device
    if args.deepspeed and device.type == "cpu":
        import deepspeed

        # Else DeepSpeed compiles it first, for minutes: a shared-memory all-reduce, which inference alone would use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=args.ddp_backend or "gloo", verbose=False)


def leave_ranks() -> None:
    """End the process group of a run that succeeded, or that all ranks agreed to stop.

    A gloo worker thread that drops its last tensors while Python exits aborts the process ("terminate called without an
    active exception"), and a launcher then reports a run that failed. Not for a run that did fail: its other ranks may be
    within a collective, and to wait for them is to hang.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    comm = sys.modules.get("deepspeed.comm")
    (comm if comm is not None and comm.is_initialized() else dist).destroy_process_group()
    time.sleep(0.2)  # under ZeRO-3 hooks keep the group's threads alive: time for them to let go


def rank_and_ranks() -> tuple[int, int]:
    """This process's rank and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def largest(value: int, device: torch.device) -> int:
    """The largest of the ranks' values. No rank returns before all have called."""
    if rank_and_ranks()[1] == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. No rank returns before all have called."""
    return bool(largest(int(flag), device))


def wait_for_ranks(device: torch.device) -> None:
    """Return when all ranks have called."""
    largest(0, device)


def on_all_ranks(value: object) -> list:
    """What each rank passed, in the order of ranks."""
    if rank_and_ranks()[1] == 1:
        return [value]
    values = [None] * rank_and_ranks()[1]
    dist.all_gather_object(values, value)
    return values
