"""Do boundaries mean something? Trains small towers on rendered scenes and scores where they cut against the known objects.

python scripts/measure_boundaries.py --output OUT [--rules gumbel similarity ...] [--rate-losses binomial ...] \
    [--scans raster serpentine hilbert] [--tasks patches quadrants] [--seeds 0 1 2] [--steps 240]

Every combination is a tower (a cell); OUT/results.jsonl gets a row as each is finished, and a second start goes on with what is
missing. OUT/table.md and OUT/TASK.png (TASK-2.png, ... of other settings) are written anew after each cell. Rules "random" and
"objects" are references whose boundaries are given: random places, and every true change first. See
llava_drip/measure/boundaries.py.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from functools import partial
from pathlib import Path

from llava_drip import cli
from llava_drip.files import write_whole
from llava_drip.measure.boundaries import REFERENCES, Cell, cells, measure, missing, plain
from llava_drip.measure.boundary_table import Group, grouped, sections, table
from llava_drip.measure.scene_tasks import TASKS
from llava_drip.towers.rate import RATE_LOSSES
from llava_drip.towers.rules import RULES
from llava_drip.towers.scan import SCANS
from llava_drip.training.records import Records


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="measure_boundaries.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the results; goes on with one it has begun"
    )
    parser.add_argument(
        "--rules", nargs="+", default=[*RULES, *REFERENCES], choices=[*RULES, *REFERENCES], help="rules and references"
    )
    parser.add_argument(
        "--rate-losses",
        nargs="+",
        default=list(RATE_LOSSES),
        choices=list(RATE_LOSSES),
        help="of rules that are sampled",
    )
    parser.add_argument("--detail-weights", type=float, nargs="+", default=[0.0, 0.3], help="the tower's detail_weight")
    parser.add_argument("--scans", nargs="+", default=list(SCANS), choices=SCANS, help="orders of the patches")
    parser.add_argument(
        "--tasks", nargs="+", default=["patches"], choices=list(TASKS), help="what towers are trained for"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, scenes and order")
    parser.add_argument("--compression", type=float, default=4.0, help="patches per token")
    parser.add_argument("--steps", type=int, default=240, help="of training, for each cell")
    parser.add_argument("--batch-size", type=int, default=32, help="scenes a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest of the cycle")
    parser.add_argument(
        "--rate-loss-weight", type=float, help="of what the tower adds to the task's loss (default: its own)"
    )
    parser.add_argument("--train-scenes", type=int, default=4096, help="to train on, of each seed")
    parser.add_argument("--test-scenes", type=int, default=512, help="to score on, others than those")
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="other arguments of the tower, e.g. pool_after=0 depth=3",
    )
    parser.add_argument(
        "--table", action="store_true", help="train nothing: write table and plots of the rows there are"
    )
    args = parser.parse_args()
    for flag in ("steps", "batch_size", "train_scenes", "test_scenes", "lr"):
        if not 0 < getattr(args, flag) < math.inf:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be above 0, and finite")
    if not 1 <= args.compression < math.inf:
        parser.error(f"--compression {args.compression}: must be at least 1 (patches per token), and finite")
    for flag in ("rate_loss_weight", "detail_weights"):
        value = getattr(args, flag)
        if not all(0 <= one < math.inf for one in (value if isinstance(value, list) else [value or 0])):
            parser.error(f"--{flag.replace('_', '-')} {value}: must be 0 or more, and finite")
    return args


def main() -> None:
    args = parse_args()
    from tqdm import tqdm  # after parsing: --help is quick

    from llava_drip.machine import versions

    tower = cli.key_values(args.model_kwargs, "--model-kwargs")
    shared = ("compression", "steps", "batch_size", "lr", "rate_loss_weight", "train_scenes", "test_scenes")
    wanted = [
        cell
        for task in args.tasks
        for cell in cells(
            dict.fromkeys(args.rules),
            list(dict.fromkeys(args.rate_losses)),
            list(dict.fromkeys(args.detail_weights)),
            dict.fromkeys(args.scans),
            dict.fromkeys(args.seeds),
            task=task,
            tower=tower,
            **{name: getattr(args, name) for name in shared},
        )
    ]
    records = Records(args.output / "results.jsonl")
    rows = records.read()
    left = [] if args.table else list(missing(wanted, rows))
    if args.table and not rows:
        raise ValueError(f"{records.path}: no rows yet; start without --table")
    args.output.mkdir(parents=True, exist_ok=True)
    with tqdm(left, unit="cell", disable=not left) as bar:
        for cell in bar:
            bar.set_description(name_of(cell))
            steps = partial(tqdm, desc="steps", leave=False)
            row = {"cell": plain(cell), **measure(cell, steps), "versions": versions()}
            records.add(row)
            rows.append(row)
            write_results(args.output, rows)
    write_results(args.output, rows)
    print(table(grouped(rows)))
    print(f"{len(rows)} rows in {records.path}; table.md and plots beside it")


def name_of(cell: Cell) -> str:
    detail = f"detail {cell.detail_weight:g}" if cell.detail_weight else None
    parts = (cell.rule, cell.rate_loss, detail, cell.scan, cell.task, f"seed {cell.seed}")
    return " ".join(part for part in parts if part)


def write_results(folder: Path, rows: list[dict]) -> None:
    """Table, and a plot of each of its sections (TASK.png, TASK-2.png, ...), each whole."""
    from llava_drip.draw.boundary_scores import draw_boundary_scores

    groups, seen = grouped(rows), Counter()
    write_whole(folder / "table.md", table(groups))
    for section in sections(groups):
        seen[section.task] += 1
        name = section.task if seen[section.task] == 1 else f"{section.task}-{seen[section.task]}"
        members = [scored(group) for group in section.groups]
        title = f"Task: {section.task}\n{section.settings}"
        draw_boundary_scores(folder / f"{name}.png", members, title, TASKS[section.task].metric)


def scored(group: Group):
    """A boundary_scores.Scored."""
    from llava_drip.draw.boundary_scores import Scored

    f1, task, chance = (group.values("trained", "exact", name) for name in ("f1", "task", "chance_f1"))
    untrained = group.values("untrained", "exact", "f1")
    return Scored(group.label, group.cell["rule"], group.cell["scan"], f1, untrained, sum(chance) / len(chance), task)


if __name__ == "__main__":
    cli.run(main, "measure_boundaries.py")
