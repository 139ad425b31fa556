"""The whole pipeline at the size of a laptop: what `make demo` runs.

    python scripts/quickstart.py [--output demo_output]

Renders a world of pictures with known truth, then calls what the other programs call: CLIP training of a DRIP tower and of its
dense twin, a small LLaMA warmed up on the texts, projector alignment, instruction tuning, and the evaluation on scenes with
combinations of colour and shape that training never showed. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

# Idle OpenMP threads sleep instead of spinning: on two cores they would fight the image-decoding workers for time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table

from llava_drip import cli
from llava_drip.contrastive.checkpoint import load_clip_tower
from llava_drip.contrastive.train import train as train_clip
from llava_drip.draw.overlay import overlay_grid
from llava_drip.engine import Engine
from llava_drip.images import load_image
from llava_drip.instruct.language import train_small_llama
from llava_drip.instruct.stage import run_stage
from llava_drip.measure.stages import StageLog
from llava_drip.towers.io import save_tower
from llava_drip.world.dataset import WorldPaths, build_world


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    train_scenes: int = 6000
    test_scenes: int = 200
    clip_epochs: int = 8
    warmup_steps: int = 150
    align_steps: int = 80
    tune_steps: int = 450


def train_tower(model: str, world: WorldPaths, out: Path, size: Size) -> Path:
    """CLIP training of one tower; returns the tower's directory."""
    shards = world.root / "clip" / f"train-{{00000..{len(world.clip_shards) - 1:05d}}}.tar"
    run = train_clip(
        [
            *("--model", model, "--train-data", str(shards), "--dataset-type", "webdataset"),
            *("--train-num-samples", str(size.train_scenes), "--epochs", str(size.clip_epochs)),
            *("--batch-size", "128", "--lr", "1e-3", "--wd", "0.1", "--warmup", "30", "--grad-clip-norm", "1.0"),
            *("--workers", "1", "--precision", "fp32", "--logs", str(out), "--name", f"clip-{model}"),
            *("--log-every-n-steps", "20", "--seed", "0"),
        ]
    )
    tower, info = load_clip_tower(run, model)
    return save_tower(tower, out / f"tower-{model}", info["mean"], info["std"])


def align(tower: Path, language_model: Path, world: WorldPaths, out: Path, size: Size) -> Path:
    """Stage 1."""
    return run_stage(
        "pretrain",
        [
            *("--model_name_or_path", str(language_model), "--vision_tower", str(tower), "--version", "plain"),
            *("--data_path", str(world.caption_train), "--image_folder", str(world.images), "--output_dir", str(out)),
            *("--max_steps", str(size.align_steps), "--per_device_train_batch_size", "32", "--learning_rate", "2e-3"),
            *("--save_strategy", "no", "--logging_steps", "10", "--dataloader_num_workers", "1", "--report_to", "none"),
        ],
    )


def tune(aligned: Path, world: WorldPaths, out: Path, size: Size) -> Path:
    """Stage 2."""
    return run_stage(
        "finetune",
        [
            *("--model_name_or_path", str(aligned), "--data_path", str(world.instruct_train)),
            *("--image_folder", str(world.images), "--output_dir", str(out)),
            *("--max_steps", str(size.tune_steps), "--per_device_train_batch_size", "32", "--learning_rate", "2e-3"),
            *("--save_strategy", "no", "--logging_steps", "25", "--dataloader_num_workers", "1", "--report_to", "none"),
        ],
    )


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluate(engine: Engine, world: WorldPaths, blind: bool = False, batch_size: int = 64) -> dict[str, float]:
    """Share of held-out questions answered exactly, by category and over "all"; and mean visual tokens an image."""
    truth = {row["question_id"]: row["text"] for row in read_jsonl(world.test_answers)}
    questions = read_jsonl(world.test_questions)
    right: dict[str, list[bool]] = {}
    tokens = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        requests = []
        for row in batch:
            parts = [{"type": "text", "text": row["text"]}]
            images = [] if blind else [load_image(world.images / row["image"])]
            requests.append(([{"role": "user", "content": [{"type": "image"}] * len(images) + parts}], images))
        for row, reply in zip(batch, engine.answer_batch(requests, max_new_tokens=8)):
            correct = reply.text.strip().lower() == truth[row["question_id"]]
            right.setdefault(row["category"], []).append(correct)
            right.setdefault("all", []).append(correct)
            tokens.append(reply.usage.visual_tokens)
    return {name: sum(rows) / len(rows) for name, rows in right.items()} | {"tokens": sum(tokens) / len(tokens)}


def main() -> None:
    parser = cli.ArgumentParser(prog="quickstart.py", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for everything the demo makes")
    out = parser.parse_args().output
    size, log = Size(), StageLog()
    results = {}
    with log.stage("render the world"):
        world = build_world(out / "world", size.train_scenes, size.test_scenes)
    with log.stage("language model"):
        lm = train_small_llama(world.texts.read_text().splitlines(), out / "language_model", steps=size.warmup_steps)
    for name, model in {"DRIP 4x": "DRIP-mini-8-4x", "dense": "DRIP-mini-8-1x"}.items():
        with log.stage(f"{name}: CLIP"):
            tower = train_tower(model, world, out, size)
        with log.stage(f"{name}: align"):
            aligned = align(tower, lm, world, out / f"aligned-{model}", size)
        with log.stage(f"{name}: tune"):
            tuned = tune(aligned, world, out / f"assistant-{model}", size)
        engine = Engine.load(tuned)
        with log.stage(f"{name}: evaluate"):
            results[name] = evaluate(engine, world)
        if name == "DRIP 4x":
            with log.stage(f"{name}: blind"):
                results["blind"] = evaluate(engine, world, blind=True)
        print(name, results)
        for s in log.stages:
            print(s)


if __name__ == "__main__":
    cli.run(main, "quickstart.py")
