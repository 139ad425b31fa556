"""python scripts/check_data.py chat.json --image_folder images --decode --model_name_or_path MODEL

Checks a conversation file as training would, but names every bad row, not the first: no conversation, roles out of turn, empty
turns, placeholders that do not match the images, missing images, with --decode images that cannot be decoded, and with
--model_name_or_path rows of which the length limit leaves no answer. Prints counts and a histogram of lengths. Exit code 1 where
a row is bad; `--write_good FILE` keeps the others, which training then takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llava_drip import cli
from llava_drip.files import write_whole
from llava_drip.instruct.data import read_records
from llava_drip.instruct.data_check import (
    Problem,
    Report,
    check_rows_of,
    check_template_of,
    encoder_for,
    histogram,
    quantiles,
    write_good,
)
from llava_drip.instruct.elastic import check_range
from llava_drip.instruct.templates import TEMPLATES


def parse() -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="check_data.py", description=__doc__.split("\n\n")[1])
    parser.add_argument("data_path", type=Path, metavar="FILE", help="conversations in LLaVA's format, .json or .jsonl")
    parser.add_argument("--image_folder", type=Path, help="folder that the rows' image paths start from")
    parser.add_argument("--decode", action="store_true", help="decode every image")
    parser.add_argument("--model_name_or_path", help="assistant or language model: lengths in tokens, and what is cut")
    parser.add_argument("--version", choices=sorted(TEMPLATES), help="chat template; the model's own unless given")
    parser.add_argument("--model_max_length", type=int, help="positions of a row, as in training")
    parser.add_argument(
        "--image_tokens", type=int, help="tokens that an image takes at most; the assistant's unless given"
    )
    parser.add_argument(
        "--elastic_compression", type=float, nargs=2, metavar=("LOW", "HIGH"), help="as in training: images take more"
    )
    parser.add_argument("--unique_ids", action="store_true", help="a repeated id makes a row bad, not only noted")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    parser.add_argument("--show", type=int, default=20, help="rows to print of each kind")
    parser.add_argument("--json", type=Path, help="file for the whole report, every row named")
    parser.add_argument("--write_good", type=Path, metavar="FILE", help="file for the rows without a problem")
    args = parser.parse_args()
    parser.check_least(args, {"workers": 0, "show": 0, "model_max_length": 1, "image_tokens": 1})
    for flag in ("version", "model_max_length", "image_tokens", "elastic_compression"):
        if getattr(args, flag) is not None and not args.model_name_or_path:
            parser.error(f"--{flag}: goes with --model_name_or_path")
    if args.elastic_compression is not None:
        check_range(args.elastic_compression)
        if args.image_tokens is not None:
            parser.error("--elastic_compression says what --image_tokens would; leave one of them out")
    return args


def check_outputs(args: argparse.Namespace) -> None:
    """ValueError: what is to be written could not be, or would take the place of rows; before hours of checking."""
    for flag in ("json", "write_good"):
        path = getattr(args, flag)
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir():
            why = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise ValueError(f"--{flag} {path}: {why}")
        if path.exists() and path.samefile(args.data_path.expanduser()):
            raise ValueError(f"--{flag} {path}: is the file that is checked; give another")
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"--{flag} {path}: {path.parent} may not be written to")
    if args.write_good is not None:
        if args.write_good.exists():
            raise ValueError(f"--write_good {args.write_good}: exists; give another, or remove it")
        if args.json is not None and args.json.absolute() == args.write_good.absolute():
            raise ValueError(f"--json {args.json}: is --write_good's file too; give another")


def print_rows(problems: list[Problem], report: Report, show: int, heading: str) -> None:
    for kind, rows in report.counts(problems).items():
        those = [problem for problem in problems if problem.kind == kind]
        print(f"\n{heading}: {kind}: {rows:,} rows")
        for problem in those[:show]:
            print(f"    {problem.message}")
        if len(those) > show:
            print(f"    ... and {len(those) - show:,} more (--json has them all)")


def print_report(report: Report, show: int, console: Console) -> None:
    print_rows(report.problems, report, show, "bad")
    print_rows(report.notes, report, show, "note")
    counts = Table("what", "rows")
    lines = {"rows": report.rows, "without an image": report.text_only, "bad": len(report.bad_rows)}
    kinds = {f"  {kind}": number for kind, number in report.counts(report.problems).items()}
    notes = {f"note: {kind}": number for kind, number in report.counts(report.notes).items()}
    for what, number in {**lines, **kinds, **notes}.items():
        counts.add_row(what, f"{number:,}")
    print()
    console.print(counts)
    bars = Table(f"{report.unit} of a row", "rows", "")
    steps = histogram(report.lengths)
    most = max((rows for _, _, rows in steps), default=1)
    for low, high, rows in steps:
        bars.add_row(f"{low:,} to {high:,}", f"{rows:,}", "█" * round(40 * rows / most))
    if steps:
        console.print(bars)
        found = quantiles(report.lengths, report.unit)
        named = {"median": "p50", "95 %": "p95", "99 %": "p99", "longest": "max"}
        print(", ".join(f"{name} {found[key]:,.0f}" for name, key in named.items()), report.unit)


def main() -> None:
    args, console = parse(), Console()
    if args.image_folder and not args.image_folder.expanduser().is_dir():
        raise ValueError(f"--image_folder {args.image_folder}: no such folder")
    folder = args.image_folder and args.image_folder.expanduser()
    records, encoder = read_records(args.data_path), None
    check_outputs(args)
    if args.model_name_or_path:
        encoder = encoder_for(
            records,
            args.model_name_or_path,
            args.version,
            args.model_max_length,
            args.image_tokens,
            args.elastic_compression,
        )
        check_template_of(encoder)
    report = check_rows_of(args.data_path, records, folder, args.decode, encoder, args.workers, args.unique_ids)
    print_report(report, args.show, console)
    if args.json:
        write_whole(args.json, json.dumps(report.record(), ensure_ascii=False, indent=1))
    if args.write_good:
        print(f"{write_good(records, report, args.write_good):,} good rows: {args.write_good}")
    sys.stdout.flush()
    if report.problems:
        raise ValueError(f"{args.data_path}: {len(report.bad_rows):,} of {report.rows:,} rows are bad (above)")


if __name__ == "__main__":
    cli.run(main, "check_data.py")
