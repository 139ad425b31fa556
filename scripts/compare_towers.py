"""python scripts/compare_towers.py RECIPE.yaml --train-data train/ --val-data val/ --output runs/compare --seeds 0 1 2

Trains a list of towers (any timm models) by one protocol: the same steps, pictures in the same order, augmentation and
optimizer for all. Writes to --output

    results.jsonl   a row for each variant and seed: top-1 at every budget, tokens, loss, seconds, settings
    table.md        means ± sample standard deviations over the seeds, beside the dense reference
    results.png     accuracy against tokens

after each run. Started again, it goes on with what is missing; only the run in which it was stopped begins anew. Several
processes may share --output, each with its --only. The recipe (YAML): scripts/recipes/compare_cifar10.yaml is one. Pictures are
decoded once and kept in memory: a folder with a sub-folder a class, Hugging Face parquet files, or webdataset shards of .jpg and
.cls. --table trains nothing: it writes table.md and results.png anew.
"""

from __future__ import annotations

import argparse
import fnmatch
import logging
import sys
from pathlib import Path

from llava_drip import cli
from llava_drip.classification.arguments import KINDS
from llava_drip.files import write_whole


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="compare_towers.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="protocol and variants")
    parser.add_argument("--train-data", help="labelled pictures: a folder, parquet files, or webdataset shards")
    parser.add_argument("--val-data", help="labelled pictures that top-1 is measured on")
    parser.add_argument(
        "--dataset-type", choices=["auto", *KINDS], default="auto", help="of both (auto: by what is there)"
    )
    parser.add_argument("--classes", help="file of class names, by label, where the data do not tell them")
    parser.add_argument("--label-key", help="column or ending of the labels (cls or label)")
    parser.add_argument("--output", required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each of every variant (0)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these variants, in this order ('4x*': all that begin so)"
    )
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--table", action="store_true", help="train nothing: write table.md and results.png anew")
    args = parser.parse_args(argv)
    for flag in ("train_data", "val_data"):
        if not args.table and getattr(args, flag) is None:
            parser.error(f"--{flag.replace('_', '-')} is needed, except with --table")
    return args


def write_reports(comparison, output: Path) -> str:
    """table.md and results.png from the rows that are there; returns the table."""
    from llava_drip.classification.compare import RESULTS, finished_rows
    from llava_drip.draw.comparison import TokenPoint, draw_comparison
    from llava_drip.reports.comparison import entries, markdown, provenance
    from llava_drip.training.records import Records

    rows = list(finished_rows(Records(output / RESULTS), comparison).values())
    if not rows:
        raise ValueError(f"--table: {output / RESULTS} holds no row of this recipe's variants")
    found = entries(rows, list(comparison.variants), comparison.dense)
    table = markdown(found, comparison.dense)
    write_whole(output / "table.md", f"{table}\n\n{provenance(rows)}\n")
    points = [
        TokenPoint(entry.variant, entry.tokens, entry.mean, entry.deviation)
        for entry in found
        if entry.top1 and entry.tokens is not None
    ]
    reference = next((entry.mean for entry in found if entry.variant == comparison.dense and entry.top1), None)
    if points:
        named = None if reference is None else (comparison.dense, reference)
        draw_comparison(output / "results.png", "top-1 accuracy", points, named)
    return table


def main() -> None:
    args = parse()
    from llava_drip.classification.compare import compare
    from llava_drip.classification.compare_recipe import read_comparison
    from llava_drip.measure.flops import count_macs

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    comparison = read_comparison(args.recipe, args.steps)
    names = list(comparison.variants)
    for pattern in args.only or ():
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"--only: {pattern} is none of the recipe's variants ({', '.join(names)})")
    if args.only:
        names = list(dict.fromkeys(name for pattern in args.only for name in fnmatch.filter(names, pattern)))
    output = Path(args.output).expanduser()
    if not args.table:
        compare(comparison, names, args, sys.argv, count_macs, lambda: write_reports(comparison, output))
    print(write_reports(comparison, output))


if __name__ == "__main__":
    cli.run(main, "compare_towers.py")
