"""python scripts/plot_results.py runs/drip_4x runs/dense --labels 'DRIP 4x' 'dense ViT' --output results

Compares training runs (folders of scripts/train_imagenet.py or scripts/train_clip.py). Draws

    epochs   the metric against epochs
    gmacs    the metric against multiply-accumulates of an image, at the tokens that its tower really made of it

and writes the numbers as a Markdown table, which it prints, and as JSON. --output names a folder (for epochs.png, gmacs.png,
results.md and results.json) or a file (NAME.png, .svg or .pdf with both plots; NAME.md and NAME.json come beside it).

Several seeds: give the runs of each tower the same label and --group; lines are means, bands go from the lowest to the highest.

    python scripts/plot_results.py runs/a0 runs/a1 runs/b0 runs/b1 --labels A A B B --group --metric top1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from llava_drip import cli
from llava_drip.draw.results import ENDINGS, Curve, Point, draw_results
from llava_drip.files import write_whole
from llava_drip.reports.run import SHARES, TITLES, Run, choose_metric, number, open_run
from llava_drip.reports.table import describe, grouped, markdown


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="plot_results.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--labels", nargs="+", help="one a run (default: names of the folders; with --group, of the models)"
    )
    parser.add_argument(
        "--metric", choices=list(TITLES), metavar="NAME", help=f"default: first that all have of {', '.join(TITLES)}"
    )
    parser.add_argument(
        "--at", choices=["last", "best"], default="last", help="epoch that the table and gmacs show (last)"
    )
    parser.add_argument("--group", action="store_true", help="runs of one label are seeds of one")
    parser.add_argument("--output", default="results", help="folder, or file that ends in .png, .svg or .pdf (results)")
    args = parser.parse_args(argv)
    if args.labels and len(args.labels) != len(args.runs):
        parser.error(f"--labels: {len(args.labels)} for {len(args.runs)} runs; give one a run")
    suffix = Path(args.output).suffix
    if suffix not in ENDINGS and suffix and not Path(args.output).is_dir():
        parser.error(f"--output {args.output}: must be a folder, or end in {', '.join(ENDINGS)}")
    return args


def label(args: argparse.Namespace, runs: Sequence[Run]) -> list[str]:
    """A label for each run. ValueError: one is there twice, without --group."""
    labels = args.labels or [run.model if args.group else run.name for run in runs]
    if not args.group and len(set(labels)) < len(labels):
        twice = next(name for name in labels if labels.count(name) > 1)
        raise ValueError(f"--labels: {twice!r} names two runs; give others, or --group to take them as seeds of one")
    return labels


def curves(runs: Sequence[Run], labels: Sequence[str], metric: str) -> list[Curve]:
    """One for each label; of several runs the mean and range, at the epochs that all have."""
    result = []
    for name in dict.fromkeys(labels):
        members = [run for run, its in zip(runs, labels, strict=True) if its == name]
        series = [
            {int(row["epoch"]): value for row in run.epochs if (value := number(row, metric)) is not None}
            for run in members
        ]
        epochs = sorted(set(series[0]).intersection(*series))
        values = [[one[epoch] for one in series] for epoch in epochs]
        means = [sum(of_epoch) / len(of_epoch) for of_epoch in values]
        band = {"low": list(map(min, values)), "high": list(map(max, values))} if len(members) > 1 else {}
        if epochs:
            result.append(Curve(name, epochs, means, **band))
    return result


def points(rows: Sequence[dict], metric: str) -> list[Point]:
    """One for each row whose tower is known."""
    result = []
    for row in rows:
        if row["gmacs"] is not None:
            low, high = row.get("spread", {}).get(metric, (None, None))
            note = "" if row["tokens"] is None else f"{row['tokens']:.0f} tokens, {row['compression']:.1f}x"
            result.append(Point(row["label"], row["gmacs"], row["metrics"][metric], low, high, note))
    return result


def main() -> None:
    args = parse()
    runs = [open_run(folder) for folder in args.runs]
    labels = label(args, runs)
    metric = choose_metric(runs, args.metric)
    rows = [describe(run, name, metric, args.at) for run, name in zip(runs, labels, strict=True)]
    if args.group:
        rows = grouped(rows)

    output = Path(args.output)
    single = output.suffix in ENDINGS
    folder = output.parent if single else output
    folder.mkdir(parents=True, exist_ok=True)
    lines, marks = curves(runs, labels, metric), points(rows, metric)
    title, percent = TITLES[metric], metric in SHARES
    written = []
    if single:
        draw_results(output, title, lines, marks, percent)
        written, base = [output], output.with_suffix("")
    else:
        base = output / "results"
        for name, content in (("epochs.png", (lines, ())), ("gmacs.png", ((), marks))):
            if any(content):
                draw_results(output / name, title, *content, percent)
                written.append(output / name)
    table = markdown(rows, metric)
    write_whole(base.with_name(base.name + ".md"), table + "\n")
    write_whole(
        base.with_name(base.name + ".json"),
        json.dumps({"metric": metric, "at": args.at, "rows": rows}, indent=1) + "\n",
    )
    written += [base.with_name(base.name + ending) for ending in (".md", ".json")]
    print(table)
    for row in rows:
        if row["gmacs"] is None:
            print(
                f"{row['label']}: not among the points, its run keeps no ViT whose multiply-accumulates could be counted"
            )
    print("wrote", ", ".join(map(str, written)))


if __name__ == "__main__":
    cli.run(main, "plot_results.py")
