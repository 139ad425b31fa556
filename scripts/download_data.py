"""python scripts/download_data.py llava-pretrain llava-instruct-158k --dir data

Downloads the data sets of LLaVA's stages and benchmarks, in the layout that the recipes use. Licences, sizes and what is there
already are printed first. Interrupted, the same command goes on. Sizes and checksums are compared with the published ones, zips
are unpacked, rows and pictures counted. A file that cannot be reached does not keep the others, and what to put where by hand
is said.

    python scripts/download_data.py --list                          # the names
    python scripts/download_data.py llava-mix-665k --no_pictures    # the conversations alone
    python scripts/download_data.py gqa --mirror https://downloads.cs.stanford.edu=https://mirror.example.org/stanford

The formats, and what lies where afterwards: docs/guides/data.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llava_drip import cli
from llava_drip.datasets.download import Place, Step, check_room, plan, run
from llava_drip.datasets.registry import DATASETS, DataSet, chosen


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**7 else f"{size / 1e6:.2f} MB"


def print_list(console: Console) -> None:
    table = Table("name", "download", "what", "comes with")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for dataset in DATASETS.values():
        size = sum(source.size for source in dataset.sources)
        table.add_row(dataset.name, gigabytes(size), dataset.what, ", ".join(dataset.needs))
    console.print(table)


def print_plan(console: Console, datasets: list[DataSet], steps: list[Step]) -> None:
    table = Table("data set", "file", "size", "state")
    table.columns[1].overflow = "fold"
    for step in steps:
        table.add_row(step.dataset.name, step.source.place, gigabytes(step.source.size), step.state)
    console.print(table)
    for dataset in datasets:
        console.print(f"{dataset.name}: licence: {dataset.licence}", highlight=False)
        console.print(f"    see {dataset.about[0]}", highlight=False, soft_wrap=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="download_data.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets, by the names of --list")
    parser.add_argument("--list", action="store_true", help="print the names, and nothing else")
    parser.add_argument("--dir", type=Path, default=Path("data"), help="folder for all of them (default: data)")
    parser.add_argument("--yes", action="store_true", help="do not ask before the download")
    parser.add_argument("--no_pictures", action="store_true", help="conversations and questions alone")
    parser.add_argument("--endpoint", help="mirror of the Hugging Face Hub (default: HF_ENDPOINT, or the Hub)")
    parser.add_argument(
        "--mirror", action="append", default=[], metavar="FROM=TO", help="addresses that begin with FROM begin with TO"
    )
    parser.add_argument("--keep_zips", action="store_true", help="leave zips when they are unpacked")
    parser.add_argument(
        "--accept_changes", action="store_true", help="take files that are not of the published size, checksum or rows"
    )
    args = parser.parse_args(argv)
    if not args.list and not args.names:
        parser.error("give NAMEs of data sets; --list prints them")
    for mirror in args.mirror:
        if "=" not in mirror:
            parser.error(f"--mirror {mirror}: must be FROM=TO")
    return args


def main() -> None:
    args, console = parse(), Console()
    if args.list:
        return print_list(console)
    mirrors = tuple((begins, instead) for begins, _, instead in (mirror.partition("=") for mirror in args.mirror))
    place = Place(args.dir.expanduser(), args.endpoint, mirrors, args.accept_changes, args.keep_zips)
    datasets = chosen(args.names, not args.no_pictures)
    steps = plan(datasets, place)
    print_plan(console, datasets, steps)
    needed, to_come = check_room(steps, place), sum(step.download for step in steps)
    if to_come or needed:
        console.print(
            f"{gigabytes(to_come)} to download; about {gigabytes(needed)} of disk in {place.folder}", highlight=False
        )
        if not args.yes:
            if not sys.stdin.isatty():
                raise ValueError("nobody is there to ask: give --yes to download under these licences")
            if input("Download under these licences? [y/N] ").strip().lower() not in ("y", "yes"):
                raise ValueError("not downloaded")
    problems = run(steps, place)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise ValueError(f"{len(problems)} of {len(steps)} files are missing or not as published (above)")
    print(f"all {len(steps)} files are there: {place.folder}")


if __name__ == "__main__":
    cli.run(main, "download_data.py")
