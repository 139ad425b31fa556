"""python scripts/prepare_laion.py --input laion400m-meta/ --output laion26m/ --subset 26M --min-similarity 0.3 --min-side 200

Tables of picture addresses and captions (LAION's metadata: .parquet, .csv or .tsv with the columns URL and TEXT) → webdataset
shards for scripts/train_clip.py. Three steps, each of which a second run finds done:

    1. chooses rows: the filters, then --subset many by a seeded hash of the URL            OUTPUT/urls/
    2. downloads them with img2dataset: 10,000 rows a shard, each sample .jpg .txt .json    OUTPUT/00000.tar ...
    3. checks every shard, moves damaged ones to OUTPUT/damaged/ (the next run makes them
       again), and writes how many pairs each holds, and what failed and why                OUTPUT/sizes.json, summary.json

It ends with the flags for training. The check alone, of any shards of pictures and captions:

    python scripts/prepare_laion.py --check shards/

img2dataset is not installed with this package, whose versions it does not share: `python -m venv i2d && i2d/bin/pip install
img2dataset`, then `--img2dataset i2d/bin/img2dataset`. The whole way: docs/guides/laion.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from llava_drip import cli
from llava_drip.contrastive.shard_check import DAMAGED, SIZES, SUMMARY, braces, check
from llava_drip.contrastive.subset import Filters, parse_count, select


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="prepare_laion.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--input", help="a table, or a folder of them")
    parser.add_argument("--output", type=Path, help="folder of the shards")
    parser.add_argument("--check", type=Path, metavar="SHARDS", help="check the shards of a folder, and nothing else")
    parser.add_argument("--subset", metavar="ROWS", help="26M, 280M, 400k, 1000 (default: all that pass the filters)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another subset (default: 0)")
    parser.add_argument("--min-similarity", type=float, help="CLIP's cosine; LAION-400M was made with 0.3")
    parser.add_argument("--min-side", type=int, help="pixels of the shorter side, by the table")
    parser.add_argument("--max-aspect", type=float, help="longer side over shorter, by the table")
    parser.add_argument("--max-unsafe", type=float, help="punsafe, 0 .. 1")
    parser.add_argument("--max-watermark", type=float, help="pwatermark, 0 .. 1")
    parser.add_argument("--select-only", action="store_true", help="stop after step 1")
    parser.add_argument("--img2dataset", default="img2dataset", help="the program (default: the one on PATH)")
    parser.add_argument(
        "--image-size", type=int, default=256, help="shorter side after resizing, never up (default: 256)"
    )
    parser.add_argument("--quality", type=int, default=90, help="of JPEGs that are resized (default: 90)")
    parser.add_argument("--rows-per-shard", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument("--threads", type=int, default=64, help="downloads at once, of each process (default: 64)")
    parser.add_argument("--timeout", type=int, default=10, help="seconds for one picture (default: 10)")
    parser.add_argument("--retries", type=int, default=1, help="of a failed download (default: 1)")
    parser.add_argument("--decode", type=int, default=20, help="pictures to decode of each shard checked (default: 20)")
    parser.add_argument("--move-damaged", action="store_true", help=f"with --check: into {DAMAGED}/, else listed only")
    args = parser.parse_args(argv)
    if args.check is None and (args.input is None or args.output is None):
        parser.error("give --input and --output, or --check")
    if args.check is not None and (args.input or args.output):
        parser.error("--check goes without --input and --output")
    for flag in ("image_size", "rows_per_shard", "processes", "threads", "timeout"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    for flag, most in (("quality", 100), ("retries", 100), ("decode", 10**9)):
        if not 0 <= getattr(args, flag) <= most:
            parser.error(f"--{flag} {getattr(args, flag)}: must be 0 .. {most}")
    return args


def download(args: argparse.Namespace, urls: Path, program: str) -> None:
    """img2dataset over the chosen rows; shards that it has a record of are not made again."""
    for name in (SIZES, SUMMARY):  # it takes every *.json in its folder for a record
        (args.output / name).unlink(missing_ok=True)
    flags = {
        "url_list": urls.resolve(),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": args.output.resolve(),
        "number_sample_per_shard": args.rows_per_shard,
        "image_size": args.image_size,
        "resize_mode": "keep_ratio",  # the shorter side
        "resize_only_if_bigger": True,
        "encode_format": "jpg",
        "encode_quality": args.quality,
        "skip_reencode": True,  # a small JPEG stays as it was
        "extract_exif": False,
        "processes_count": args.processes,
        "thread_count": args.threads,
        "timeout": args.timeout,
        "retries": args.retries,
        "incremental_mode": "incremental",
        "enable_wandb": False,
    }
    done = subprocess.run([program, *(f"--{name}={value}" for name, value in flags.items())])
    if done.returncode != 0:
        raise ValueError(
            f"{program} ended with code {done.returncode}; what it printed says why. The same command goes on"
        )


def report(folder: Path, summary: dict, moved: bool, again: bool) -> None:
    """Prints what summary.json holds. moved: damaged shards were put aside; again: the same command makes them anew."""
    downloads = summary["downloads"]
    if downloads is not None:
        rows = max(1, downloads["rows"])
        print(f"{downloads['rows']:>14,} rows tried", f"{downloads['successes']:>14,} downloaded", sep="\n", end="")
        print(f" ({downloads['successes'] / rows:.1%})")
        for cause, number in downloads["causes"].items():
            print(f"{number:>14,} {cause}")
    print(f"{summary['pairs']:>14,} pairs of picture and caption in {summary['shards']:,} whole shards")
    if summary["incomplete"]:
        print(f"{summary['incomplete']:>14,} samples lack their picture or caption: training skips them")
    print(f"{summary['pictures_corrupt']:>14,} of {summary['pictures_tried']:,} pictures tried cannot be decoded")
    for example in summary["examples"]:
        print(f"{'':>15}{example}")
    for name, why in summary["damaged"].items():
        print(f"damaged: {name} {why}")
    if summary["damaged"]:
        note = "; the same command downloads them again" if again else ""
        print(f"(moved to {folder / DAMAGED}{note})" if moved else "(left out below)")


def main() -> None:
    args = parse()
    moved = args.check is None or args.move_damaged
    folder = args.check or args.output
    if args.check is None:
        count = None if args.subset is None else parse_count(args.subset)
        program = shutil.which(args.img2dataset) or shutil.which(args.img2dataset, path=Path(sys.executable).parent)
        if program is None and not args.select_only:
            raise ValueError(
                f"--img2dataset: no program {args.img2dataset}; pip install img2dataset (into an environment of its own)"
            )
        limits = ("min_similarity", "min_side", "max_aspect", "max_unsafe", "max_watermark")
        filters = Filters(**{name: getattr(args, name) for name in limits})
        args.output.mkdir(parents=True, exist_ok=True)
        chosen = select(args.input, args.output / "urls", count, filters, args.seed)
        print(f"{chosen['selected']:,} rows chosen of {chosen['passed']:,} that pass, of {chosen['rows']:,}")
        if args.select_only:
            return
        download(args, args.output / "urls", program)
    summary = check(folder, args.decode, args.processes, moved)
    report(folder, summary, moved, again=args.check is None)
    names = sorted(file.name for file in folder.glob("*.tar") if file.name not in summary["damaged"])
    print(f"\n--dataset-type webdataset --train-data '{folder}/{braces(names)}' --train-num-samples {summary['pairs']}")
    if summary["damaged"] and not moved:
        raise ValueError(f"{len(summary['damaged'])} damaged shards in {folder}; --move-damaged puts them aside")


if __name__ == "__main__":
    cli.run(main, "prepare_laion.py")
