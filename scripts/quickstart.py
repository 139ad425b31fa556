"""The whole pipeline at the size of a laptop: what `make demo` runs.

    python scripts/quickstart.py [--output demo_output] [--elastic]

Renders a world of pictures with known truth, then calls what the other programs call: CLIP training of a DRIP tower and of its
dense twin, a small LLaMA warmed up on the texts, projector alignment, instruction tuning, and the evaluation on scenes with
pairs of shapes that training never showed together. Nothing is downloaded. --elastic trains a third assistant, whose
pictures get another number of visual tokens at each step, and asks it all questions at several budgets.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Idle OpenMP threads sleep instead of spinning: on two cores they would fight the image-decoding workers for time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from llava_drip import cli
from llava_drip.contrastive.checkpoint import load_clip_tower
from llava_drip.contrastive.train import train as train_clip
from llava_drip.conversation import user_turn
from llava_drip.draw.overlay import overlay_grid
from llava_drip.engine import Engine
from llava_drip.files import write_whole
from llava_drip.images import load_image
from llava_drip.instruct.language import conversation_texts, train_small_llama
from llava_drip.instruct.stage import run_stage
from llava_drip.jsonl import read_jsonl
from llava_drip.measure.stages import StageLog
from llava_drip.record import described
from llava_drip.towers.io import save_tower
from llava_drip.world.dataset import WorldPaths, build_world, clear_leftovers
from llava_drip.world.edges import BoundaryScores, score_boundaries, true_boundaries
from llava_drip.world.scenes import render, scene_at

TOWERS = {"drip-4x": "DRIP-mini-8-4x", "dense": "DRIP-mini-8-1x"}
ELASTIC = {"elastic": "DRIP-mini-8-elastic"}
BUDGETS = (1, 2, 4, 10)  # patches a visual token, asked of one assistant
SCENES_DRAWN = 6


@dataclass(frozen=True)
class Size:
    """How much of everything; chosen so that the whole takes minutes on two cores."""

    train_scenes: int = 8000
    test_scenes: int = 150
    language_steps: int = 60
    clip_epochs: int = 4
    clip_batch: int = 256
    align_steps: int = 40
    tune_steps: int = 600


# The world's is its own; of the stages, the Trainer's default.
SEEDS = {"world": 0, "language_model": 0, "towers": 0, "stages": 42}
_STAGE_FLAGS = (
    *("--per_device_train_batch_size", "32", "--learning_rate", "3e-3", "--adam_beta2", "0.98"),
    *("--seed", str(SEEDS["stages"]), "--save_strategy", "no", "--logging_steps", "20"),
    *("--dataloader_num_workers", "1", "--report_to", "none"),
)


def train_tower(model: str, world: WorldPaths, out: Path, size: Size) -> Path:
    """CLIP training of one tower, on open_clip's trainer; returns the tower's directory."""
    shards = world.root / "clip" / f"train-{{00000..{len(world.clip_shards) - 1:05d}}}.tar"
    run = train_clip(
        [
            *("--model", model, "--train-data", str(shards), "--dataset-type", "webdataset"),
            *("--train-num-samples", str(size.train_scenes), "--epochs", str(size.clip_epochs)),
            *("--batch-size", str(size.clip_batch), "--lr", "2.5e-3", "--wd", "0.1", "--warmup", "30"),
            *("--grad-clip-norm", "1.0", "--workers", "1", "--precision", "fp32", "--seed", str(SEEDS["towers"])),
            *("--logs", str(out), "--name", "clip", "--log-every-n-steps", "10"),
        ]
    )
    tower, info = load_clip_tower(run, model)
    return save_tower(tower, out / "tower", info["mean"], info["std"])


def align(
    tower: Path, language_model: Path, world: WorldPaths, out: Path, size: Size, flags: Sequence[str] = ()
) -> Path:
    """Stage 1: scripts/pretrain_projector.py."""
    return run_stage(
        "pretrain",
        [
            *("--model_name_or_path", str(language_model), "--vision_tower", str(tower), "--version", "plain"),
            *("--mm_segment_positions", "true"),
            *("--data_path", str(world.caption_train), "--image_folder", str(world.images)),
            *("--output_dir", str(out / "aligned"), "--max_steps", str(size.align_steps)),
            *_STAGE_FLAGS,
            *flags,
        ],
    )


def tune(aligned: Path, world: WorldPaths, out: Path, size: Size, flags: Sequence[str] = ()) -> Path:
    """Stage 2: scripts/finetune.py."""
    return run_stage(
        "finetune",
        [
            *("--model_name_or_path", str(aligned), "--data_path", str(world.instruct_train)),
            *("--image_folder", str(world.images), "--output_dir", str(out / "assistant")),
            *("--max_steps", str(size.tune_steps), "--lr_scheduler_type", "warmup_stable_decay"),
            *("--lr_scheduler_kwargs", json.dumps({"num_decay_steps": size.tune_steps * 3 // 10})),
            *_STAGE_FLAGS,
            *flags,
        ],
    )


def evaluate(engine: Engine, world: WorldPaths, blind: bool = False, batch_size: int = 64) -> dict[str, float]:
    """Ask all held-out questions. Returns the share of exact answers by category and over "all", and "tokens", the mean
    number of visual tokens an image.

    blind: withhold the image.
    """
    truth = {row["question_id"]: row["text"] for _, row in read_jsonl(world.test_answers)}
    questions = [row for _, row in read_jsonl(world.test_questions)]
    right: dict[str, list[bool]] = {"all": []}
    tokens = []
    for start in tqdm(range(0, len(questions), batch_size), desc="blind" if blind else "questions", leave=False):
        batch, requests = questions[start : start + batch_size], []
        for row in batch:
            images = [] if blind else [load_image(world.images / row["image"])]
            requests.append(([user_turn(row["text"], len(images))], images))
        for row, reply in zip(batch, engine.answer_batch(requests, max_new_tokens=6)):
            correct = reply.text.strip().lower() == truth[row["question_id"]]
            right.setdefault(row["category"], []).append(correct)
            right["all"].append(correct)
            tokens.append(reply.usage.visual_tokens)
    return {name: float(np.mean(rows)) for name, rows in right.items()} | {"tokens": float(np.mean(tokens))}


def draw_segments(engine: Engine, world: WorldPaths, path: Path, scenes: int) -> BoundaryScores:
    """Save a picture of some test scenes' segments; return how all `scenes` test scenes' boundaries agree with the objects."""
    images, segments, titles, predicted, true = [], [], [], [], []
    for index in range(scenes):
        pixels, mask = render(scene_at(0, "test", index))
        image = load_image(world.images / f"test_{index:06d}.png")
        assert np.array_equal(np.asarray(image), pixels)
        _, owner, grid = engine.segments(image)
        predicted.append((owner[1:] != owner[:-1]).numpy())
        true.append(true_boundaries(mask, grid))
        if index < SCENES_DRAWN:
            images.append(image)
            segments.append(owner)
            titles.append(f"scene {index + 1}")
    overlay_grid(images, segments, engine.grid_size, titles, path)
    return score_boundaries(np.stack(predicted), np.stack(true))


def show(console: Console, results: dict[str, dict[str, float]], edges: BoundaryScores) -> None:
    """Accuracy by category, and where the borders of segments lie."""
    columns = {"drip-4x": "DRIP at 4x", "dense": "dense tower", "blind": "blind (image withheld)"}
    table = Table(title="Held-out questions answered right", title_justify="left")
    table.add_column("questions about")
    for name in columns:
        table.add_column(columns[name], justify="right")
    for category in sorted(set(results["dense"]) - {"all", "tokens"}) + ["all"]:
        table.add_row(category, *(f"{results[name][category]:.1%}" for name in columns), end_section=category == "all")
    table.add_row("visual tokens per image", *(f"{results[name]['tokens']:.1f}" for name in columns))
    console.print(table)
    console.print(
        f"Segment borders on the objects' borders: {edges.precision:.0%} of them, where chance would have "
        f"{edges.chance_precision:.0%} (F1 {edges.f1:.2f}, by chance {edges.chance_f1:.2f})"
    )


def show_budgets(console: Console, budgets: dict[str, dict[str, dict[str, float]]]) -> None:
    """One assistant tuned at all budgets beside one tuned at a single one, at each budget."""
    table = Table(title="Held-out questions answered right, by budget", title_justify="left")
    for column in ("patches per visual token", "tokens per image", "elastic", "drip-4x at that budget"):
        table.add_column(column, justify="right")
    for budget, elastic in budgets["elastic"].items():
        cells = (f"{elastic['tokens']:.1f}", f"{elastic['all']:.1%}", f"{budgets['drip-4x'][budget]['all']:.1%}")
        table.add_row(budget, *cells)
    console.print(table)


def show_stages(console: Console, log: StageLog) -> None:
    table = Table(title="Stages", title_justify="left")
    for column in ("stage", "seconds", "peak memory, GiB"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in log.stages:
        table.add_row(stage.name, f"{stage.seconds:.0f}", f"{stage.host_gib:.1f}")
    table.add_section()
    table.add_row("all", f"{log.seconds:.0f}", f"{log.host_gib:.1f}")
    console.print(table)


def evaluate_budgets(assistant: Path, world: WorldPaths) -> dict[str, dict[str, float]]:
    """`evaluate` at each of BUDGETS, and at "image" where each image decides, all from one checkpoint."""
    engine, results = Engine.load(assistant), {}
    for budget in (*BUDGETS, None):
        engine.model.set_compression(budget)
        results["image" if budget is None else f"{budget}x"] = evaluate(engine, world)
    return results


def run_demo(out: Path, size: Size, elastic: bool = False) -> dict:
    """The whole demo into folder `out`; returns what it also writes to results.json.

    elastic: also an assistant tuned at all budgets from 1 to 10 patches a visual token, asked at BUDGETS.
    Raises:
        ValueError: `out` holds something that an earlier demo did not make.
    """
    log, console = StageLog(), Console(width=100)
    clear_leftovers(out / "world")  # of a demo that was killed
    if out.is_dir() and any(out.iterdir()) and not (out / "world" / "manifest.json").is_file():
        raise ValueError(f"--output {out}: exists and is not an earlier demo's folder; name another")
    for name in (*TOWERS, *ELASTIC, "language_model"):  # of an earlier run
        shutil.rmtree(out / name, ignore_errors=True)
    with log.stage("render the world"):
        world = build_world(out / "world", size.train_scenes, size.test_scenes)
    with log.stage("train the language model"):
        texts = conversation_texts(world.instruct_train) + conversation_texts(world.caption_train)
        llama = train_small_llama(
            texts,
            out / "language_model",
            hidden_size=96,
            layers=2,
            steps=size.language_steps,
            seed=SEEDS["language_model"],
        )
    results, assistants, budgets = {}, {}, {}
    for name, model in (TOWERS | ELASTIC if elastic else TOWERS).items():
        flags = ("--elastic_compression", str(min(BUDGETS)), str(max(BUDGETS))) if name in ELASTIC else ()
        torch.manual_seed(SEEDS["towers"])
        with log.stage(f"{name}: CLIP training of the tower"):
            tower = train_tower(model, world, out / name, size)
        with log.stage(f"{name}: align the projector"):
            aligned = align(tower, llama, world, out / name, size, flags)
        with log.stage(f"{name}: tune on questions"):
            assistants[name] = tune(aligned, world, out / name, size, flags)
        if name in TOWERS:
            with log.stage(f"{name}: evaluate"):
                results[name] = evaluate(Engine.load(assistants[name]), world)
    engine = Engine.load(assistants["drip-4x"])
    with log.stage("drip-4x: evaluate blind"):
        results["blind"] = evaluate(engine, world, blind=True)
    with log.stage("drip-4x: draw segments"):
        edges = draw_segments(engine, world, out / "segments.png", size.test_scenes)
    for name in ("elastic", "drip-4x") if elastic else ():
        with log.stage(f"{name}: evaluate at each budget"):
            budgets[name] = evaluate_budgets(assistants[name], world)
    show(console, results, edges)
    if elastic:
        show_budgets(console, budgets)
    show_stages(console, log)
    record = {
        **described(
            checkpoint=assistants["drip-4x"], device=str(engine.device), packages=("open_clip_torch",), seeds=SEEDS
        ),
        "accuracy": results,
        **({"accuracy_by_budget": budgets} if elastic else {}),
        "edges": edges._asdict(),
        "size": asdict(size),
        "stages": list(map(asdict, log.stages)),
    }
    write_whole(out / "results.json", json.dumps(record, indent=1))
    console.print(
        f"Segments drawn: {out / 'segments.png'}\nAssistant:      {assistants['drip-4x']}\n\nNext:\n"
        f"  .venv/bin/python -m serve.gradio_app --model {assistants['drip-4x']}\n"
        f"  .venv/bin/python eval/llava_bench.py --model {assistants['drip-4x']} --bench coco --data DIR --judge none",
        soft_wrap=True,
    )
    return record


def main() -> None:
    parser = cli.ArgumentParser(prog="quickstart.py", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for everything the demo makes")
    parser.add_argument("--elastic", action="store_true", help="also one assistant for every budget of visual tokens")
    args = parser.parse_args()
    run_demo(args.output, Size(), args.elastic)


if __name__ == "__main__":
    cli.run(main, "quickstart.py")
