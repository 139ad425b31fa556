"""What an epoch cost."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from llava_drip.training.meters import StepClock, TokenHistogram, describe


@pytest.mark.parametrize("images", [1, 2, 19, 20, 21, 100, 999])
def test_token_histogram_against_numpy(images):
    for seed in range(5):
        tokens = torch.randint(1, 50, (images,), generator=torch.Generator().manual_seed(seed))
        meter = TokenHistogram(49, "cpu")
        for part in tokens.split(8):
            meter.add(part)
        compression = 49 / tokens.double().numpy()
        low, high = np.percentile(compression, [5, 95], method="inverted_cdf")
        expected = {
            "tokens": tokens.double().mean().item(),
            "compression": 49 / tokens.double().mean().item(),
            "compression_p5": low,
            "compression_p95": high,
        }
        assert meter.summary() == pytest.approx(expected, rel=1e-12)


def test_no_image_no_figures():
    assert TokenHistogram(49, "cpu").summary() is None


def test_more_tokens_than_patches_is_no_figure():
    with pytest.raises((IndexError, RuntimeError)):
        TokenHistogram(49, "cpu").add(torch.tensor([50]))


def test_step_clock():
    clock = StepClock()
    assert math.isnan(clock.median())
    for pause in (0.0, 0.02, 0.2):
        time.sleep(pause)
        clock.tick()
    time.sleep(0.1)
    clock.restart()  # an evaluation is no step
    clock.tick()
    assert len(clock.seconds) == 4 and clock.seconds[3] < 0.1 and clock.seconds[2] >= 0.2
    assert 0 < clock.median() < 0.2


COST = """
import math, time, torch
from pathlib import Path
from llava_drip.training.meters import StepClock
assert math.isnan(StepClock().cost("cpu")["mean_peak_memory_gib"])
clock = StepClock()
clock.tick()
block = torch.ones(2**28, dtype=torch.uint8)  # 1/4 GiB, between steps
clock.restart()
del block
time.sleep(0.1)
clock.tick()
cost = clock.cost("cpu")
near = lambda a, b: abs(a - b) < 1e-6 * b
assert 0.1 < sum(clock.seconds) and near(sum(clock.seconds), 2 * cost["mean_step_seconds"]), cost
assert cost["step_seconds"] == clock.median() and len(clock.memory) == 2
assert near(cost["mean_peak_memory_gib"], sum(clock.memory) / 2)
assert cost["peak_memory_gib"] > clock.memory[0] + 0.2, (cost, clock.memory)
try:
    can_reset = Path("/proc/self/clear_refs").write_text("5") > 0
except OSError:  # not every kernel and container lets a process reset its peak; it is then that of the whole run
    can_reset = False
if can_reset:
    assert cost["mean_peak_memory_gib"] < cost["peak_memory_gib"] - 0.1, "what lies between steps is no step's"
"""


PEAKS = """
import torch
from pathlib import Path
from llava_drip.training.meters import peak_memory_gib, reset_peak_memory
try:
    can_reset = Path("/proc/self/clear_refs").write_text("5") > 0
except OSError:  # not every kernel and container lets a process reset its peak; it is then that of the whole run
    can_reset = False
reset_peak_memory()
before = peak_memory_gib()
block = torch.ones(2**28, dtype=torch.uint8)  # 1/4 GiB
held = peak_memory_gib()
del block
kept = peak_memory_gib()
reset_peak_memory()
after = peak_memory_gib()
assert (not can_reset or held >= before + 0.2) and kept >= held - 1e-3, (before, held, kept)
assert after < held - 0.2 if can_reset else after >= held - 1e-3, (can_reset, held, after)
"""


@pytest.mark.parametrize(
    "code", [pytest.param(COST, id="what steps cost", marks=pytest.mark.slow), pytest.param(PEAKS, id="peaks")]
)
def test_memory(code):
    """In a process of its own: what others have freed in this one may stay resident, and its peak may be higher."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_describe():
    record = {"step_seconds": 0.1234, "peak_memory_gib": 3.456}
    assert describe(record) == "step 0.123 s, peak memory 3.46 GiB"
    record |= {"mean_step_seconds": 0.2, "mean_peak_memory_gib": 3.1}
    assert describe(record) == "step 0.123 s (mean 0.200), peak memory 3.46 GiB (mean of steps 3.10)"
    record |= {"compression": 4.0, "compression_p5": 3.0, "compression_p95": 5.5}
    assert describe(record).startswith("compression 4.00 (3.00 .. 5.50), step")
