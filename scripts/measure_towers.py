"""python scripts/measure_towers.py vit_base_patch16_224 'drip_base_patch16_224 compression=4' runs/4x --output measured

Measures towers side by side: parameters, multiply-accumulates and tokens of an image, latency and throughput, time of a training
step, peak memory; on CPUs and GPUs, in fp32 and bf16, all towers in turn, round after round. Writes to --output

    towers.json   every figure, with what was asked for, where, and how busy the machine was
    towers.md     the tables
    towers.png    accuracy (--accuracy), or else multiply-accumulates, against tokens

A TOWER is a timm name (random weights), the directory of a tower or the folder of a run, or a pretrained ViT
(ViT-B-32/laion2b_s34b_b79k, openai/clip-vit-large-patch14, a directory of theirs); its arguments follow in the same word. The
first is the one that others are compared with. With --images DIR the tower decides what each of those images costs.

    python scripts/measure_towers.py --presets --output measured

counts every tower of this package at its own picture size and puts published figures (224 px) beside, into presets.json and
presets.md; --presets 'drip_*' those alone.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from llava_drip import cli
from llava_drip.files import write_results


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked: whatever is wrong with them is said before minutes of measuring."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="measure_towers.py", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("towers", nargs="*", metavar="TOWER", help="'NAME_OR_DIRECTORY [KEY=VALUE ...]'")
    add("--labels", nargs="+", metavar="TEXT", help="one a tower, for tables and plots (default: as given)")
    add("--presets", nargs="*", metavar="PATTERN", help="count this package's towers instead, beside published figures")
    add("--output", type=Path, help="folder of the results (default: they are printed only)")
    add("--img-size", type=int, help="pixels of a side (default: each tower's own)")
    add("--num-classes", type=int, default=1000, help="of the classifier (1000); 0: none, and no training")
    add("--devices", nargs="+", metavar="DEVICE", help="cpu, cuda (default: cuda if there is one, else cpu)")
    add("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"], help="(float32)")
    add("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"], help="(both)")
    add("--batches", type=int, nargs="+", default=[1, 8], help="images of a pass (1 8)")
    add("--rounds", type=int, default=10, help="counted rounds of each setting (10); 0: no pass is timed, only counted")
    add("--warmup", type=int, default=2, help="rounds before them (2)")
    add(
        "--spread",
        type=float,
        default=0.25,
        help="std / mean of an image's tokens in inference, where they vary (0.25)",
    )
    add(
        "--no-memory", action="store_true", help="leave out peak memory, which takes a process for each figure on a CPU"
    )
    add("--threads", type=int, help="of a CPU (default: torch's own)")
    add("--images", metavar="DIR", help="also the mean cost of the pictures in this folder")
    add("--max-images", type=int, default=100, help="of them (100)")
    add(
        "--accuracy",
        metavar="FILE",
        help="top-1 of towers by label or name, JSON or CSV (name,top1), for table and plot",
    )
    args = parser.parse_args(argv)
    if bool(args.towers) == (args.presets is not None):
        parser.error("give TOWERs to measure, or --presets")
    if args.presets is not None:  # all else would be ignored
        others = set(vars(args)) - {"towers", "presets", "img_size", "output"}
        for flag in sorted(name for name in others if getattr(args, name) != parser.get_default(name)):
            parser.error(f"--{flag.replace('_', '-')}: has no meaning beside --presets; leave it out")
    for flag in ("devices", "dtypes", "modes", "batches"):
        if getattr(args, flag):
            setattr(args, flag, list(dict.fromkeys(getattr(args, flag))))
    if args.labels and len(args.labels) != len(args.towers):
        parser.error(f"--labels: {len(args.labels)} for {len(args.towers)} towers; give one a tower")
    least = {
        "batches": 1,
        "rounds": 0,
        "warmup": 0,
        "spread": 0,
        "max_images": 1,
        "num_classes": 0,
        "img_size": 1,
        "threads": 1,
    }
    parser.check_least(args, least)
    if args.num_classes == 0 and args.rounds and "training" in args.modes:
        parser.error("--num-classes 0: without a classifier there is nothing to train; give --modes inference")
    return args


def main() -> None:
    args = parse()
    import torch  # after parsing: --help is quick

    from llava_drip.draw.comparison import TokenPoint, draw_comparison
    from llava_drip.measure.speed import Setting
    from llava_drip.measure.subjects import Subject
    from llava_drip.measure.survey import Plan, preset_costs, read_accuracy, survey
    from llava_drip.measure.survey_table import markdown, presets_markdown

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.presets is not None:
        result = preset_costs(args.presets, args.img_size)
        print(presets_markdown(result))
        if args.output is not None:
            write_results(args.output, "presets", result, presets_markdown(result))
        return
    devices = [str(cli.checked_device(device)) for device in args.devices or [None]]
    settings = (
        [Setting(*each) for each in product(devices, args.dtypes, args.modes, args.batches)] if args.rounds else []
    )
    subjects = [
        Subject.parse(*each) for each in zip(args.towers, args.labels or [None] * len(args.towers), strict=True)
    ]
    accuracy = read_accuracy(args.accuracy) if args.accuracy else None
    names = ("rounds", "warmup", "spread", "images", "max_images", "num_classes", "img_size")
    plan = Plan(settings, memory=not args.no_memory, **{name: getattr(args, name) for name in names})

    def keep(result: dict) -> None:
        if args.output is not None:
            write_results(args.output, "towers", result, markdown(result))

    result = survey(subjects, plan, accuracy, keep)
    print(markdown(result))
    keep(result)
    measured = [(row, (row["images"] or row)["tokens"]) for row in result["towers"]]
    measured = [(row, tokens) for row, tokens in measured if tokens]
    if accuracy is not None:
        points = [TokenPoint(row["label"], tokens, row["top1"]) for row, tokens in measured if row["top1"] is not None]
        title, percent = "top-1 accuracy", True
    else:
        points = [TokenPoint(row["label"], tokens, (row["images"] or row)["gmacs"]) for row, tokens in measured]
        title, percent = "GMACs of an image", False
    if args.output is not None and points:
        draw_comparison(args.output / "towers.png", title, points, percent=percent)


if __name__ == "__main__":
    cli.run(main, "measure_towers.py")
