"""python eval/report.py RESULT.json [RESULT.json ...] [--output report.html report.md] [--samples N]

One page over result files of eval/llava_bench.py, science_qa.py, pope.py, zero_shot.py and retrieval.py (their --json): scores
with intervals, visual tokens, seconds, what each file says of itself, and runs of one benchmark side by side: differences with
paired intervals, and answers that changed. Each further run is compared with the first of its benchmark, if both answered the
same data.

    --output        .html, .md, or both; each is one file that needs no other, nor the network
    --samples N     N questions of each benchmark beside their pictures, with the segments that the model saw. The runs' own
                    checkpoints draw them, on the runs' own pictures; what is not there any more, or another by its hash, is left
                    out, and the page says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava_drip import cli
from llava_drip.files import write_whole
from llava_drip.reports.evaluation import page, records, samples
from llava_drip.reports.evaluation.results import read_result


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="report", description="A page over result files; see the top of this file.")
    parser.add_argument("results", nargs="+", type=Path, help="files that the other programs wrote with --json")
    parser.add_argument("--labels", nargs="+", help="what to call the runs, one a file; default the files' names")
    parser.add_argument(
        "--output", nargs="+", type=Path, default=[Path("report.html"), Path("report.md")], help="files to write"
    )
    parser.add_argument("--title", default="Evaluation", help="of the page")
    parser.add_argument("--changed", type=int, default=10, help="of answers that changed, show so many a comparison")
    parser.add_argument("--samples", type=int, default=0, help="questions to show with their pictures, a benchmark")
    drawing = parser.add_argument_group("with --samples")
    drawing.add_argument(
        "--images", nargs="+", type=Path, default=[], help="folders of pictures, where they are not where they were"
    )
    drawing.add_argument(
        "--checkpoints",
        nargs="+",
        type=Path,
        default=[],
        help="folders of assistants, where they are not where they were",
    )
    drawing.add_argument("--device", help="default: cuda where there is one, else cpu")
    args, given = parser.parse_given()
    if args.labels and len(args.labels) != len(args.results):
        parser.error(f"--labels: {len(args.labels)} for {len(args.results)} result files")
    for name in ("changed", "samples"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)}: must be 0 or more")
    if not args.samples and (unread := sorted(given & {"images", "checkpoints", "device"})):
        parser.error(f"--{unread[0]} is for --samples")
    for path in args.output:
        if path.suffix not in page.ENDINGS:
            parser.error(f"--output {path}: must end in {' or '.join(page.ENDINGS)}")
        if not path.parent.is_dir():
            parser.error(f"--output {path}: no folder {path.parent}")
    for flag in ("images", "checkpoints"):
        if missing := [path for path in getattr(args, flag) if not path.exists()]:
            parser.error(f"--{flag} {missing[0]}: not there")
    return args


def labels_of(args: argparse.Namespace) -> list[str]:
    """The files' names; with their folders' where two would be the same."""
    labels = args.labels or [path.stem for path in args.results]
    if not args.labels and len(set(labels)) < len(labels):
        labels = [f"{path.resolve().parent.name}/{path.stem}" for path in args.results]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two runs are called {max(labels, key=labels.count)!r}; give other --labels")
    return labels


def main() -> None:
    args = parse_args()
    results = [read_result(path, label) for path, label in zip(args.results, labels_of(args))]
    found = page.sections(results)
    for section in found:
        if args.samples and records.keeps_questions(section.results[0]):
            usable, section.missing = samples.usable(section.results, section.records)
            if usable:
                places = (args.images, args.checkpoints, args.device)
                section.samples, missing = samples.take(*zip(*usable), args.samples, *places)
                section.missing = [*missing, *section.missing]
        for line in [*section.warnings, *section.missing]:
            print(f"report: warning: {section.benchmark.name}: {line}", file=sys.stderr)
    for path in args.output:
        write_whole(path, page.write(found, path, args.title, args.changed))
        print(path)


if __name__ == "__main__":
    cli.run(main, "report")
