"""The whole pipeline at the size of a laptop: what `make demo` runs.

    python scripts/quickstart.py [--output demo_output]

Renders a world of pictures with known truth, then calls what the other programs call: CLIP training of a DRIP tower and of its
dense twin, a small LLaMA warmed up on the texts, projector alignment, instruction tuning, and the evaluation on scenes with
combinations of colour and shape that training never showed. Nothing is downloaded.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from llava_drip import cli
from llava_drip.assistant.processing import IMAGE_TOKEN
from llava_drip.contrastive.checkpoint import load_clip_tower
from llava_drip.contrastive.train import train as train_clip
from llava_drip.draw.overlay import overlay_grid
from llava_drip.instruct.language import train_small_llama
from llava_drip.instruct.stage import run_stage
from llava_drip.measure.stages import StageLog
from llava_drip.towers.io import save_tower
from llava_drip.world.dataset import WorldPaths, build_world
from llava_drip.world.score import answer_questions

TOWERS = {"DRIP 4x": "DRIP-mini-8-4x", "dense": "DRIP-mini-8-1x"}
