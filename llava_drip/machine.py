"""Where something was measured, with what, and how busy the machine was: what stands beside every figure."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import timm
import torch


def where(devices: Iterable[str]) -> dict:
    """{"machine": device → what it is, "versions", "date"}."""
    machines = {}
    for device in dict.fromkeys(devices):
        on_cuda = torch.device(device).type == "cuda"
        cpu = f"{_cpu()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
        machines[device] = torch.cuda.get_device_name(device) if on_cuda else cpu
    return {"machine": machines, "versions": versions(), "date": datetime.date.today().isoformat()}


def versions() -> str:
    return f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"


def load() -> float | None:
    """Processes that want a core, mean of the last minute: what else a machine was doing."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def described(found: dict, loads: tuple[float | None, float | None]) -> str:
    """A sentence of `where` and of the load before and after."""
    machines = "; ".join(f"{device}: {machine}" for device, machine in found["machine"].items())
    return f"{machines}. {found['versions']}. {found['date']}. Load {loads[0]} before, {loads[1]} after."


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"{platform.machine()} CPU"
