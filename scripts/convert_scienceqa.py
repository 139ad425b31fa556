"""python scripts/convert_scienceqa.py --input data/scienceqa --split train --prompt_format QCM-LEA --output scienceqa_llava

ScienceQA's problems.json and pid_splits.json as conversations for `finetune.py`, worded as LLaVA's own converter words them:

    OUTPUT/llava_train_QCM-LEA.json      [{"id", "image", "conversations": [...]}, ...]; ids are the problems'
    OUTPUT/images/<id>/image.jpg         of pictures that lie in a tar; those in a folder stay where they are

QCM-LEA answers with lecture, explanation and answer; QCM-LEPA the same with headings; QCM-A with "The answer is B."; CQM-A with
the letter alone, worded as the test file of LLaVA-1.5; QCM-T, ours, with the choice's text. `--no_pictures` asks everything
without pictures. `--orders 8` asks each problem eight times, its choices in other orders, so that a small model learns contents
and not letters. See docs/guides/data.md.
"""

from __future__ import annotations

from pathlib import Path

from llava_drip import cli
from llava_drip.instruct.scienceqa import FORMATS
from llava_drip.instruct.scienceqa_rows import convert


def main() -> None:
    parser = cli.ArgumentParser(prog="convert_scienceqa", description=__doc__.split("\n\n")[1])
    parser.add_argument("--input", required=True, type=Path, help="folder of problems.json and pid_splits.json")
    parser.add_argument("--split", required=True, help="train, val, test, minival, minitest: of pid_splits.json")
    parser.add_argument("--prompt_format", choices=FORMATS, default="QCM-LEA", help="Q question, C context, M choices")
    parser.add_argument("--output", required=True, type=Path, help="folder for the result")
    parser.add_argument("--images", help="folder or uncompressed tar of the pictures, unless in INPUT")
    parser.add_argument("--no_pictures", action="store_true", help="ask every problem without its picture")
    parser.add_argument(
        "--orders", type=int, default=1, help="times each problem is asked, in other orders of its choices"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the orders")
    args = parser.parse_args()
    if args.orders < 1:
        parser.error(f"--orders {args.orders}: must be at least 1")
    if args.no_pictures and args.images:
        parser.error("--no_pictures leaves out what --images gives; leave one of them out")
    made = convert(
        args.input,
        args.split,
        args.prompt_format,
        args.output,
        args.images,
        pictures=not args.no_pictures,
        orders=args.orders,
        seed=args.seed,
    )
    folder = f", {made.image_folder} (--image_folder)" if made.image_folder else ""
    print(f"{made.rows} rows, {made.pictures} with a picture: {made.data_path} (--data_path){folder}")


if __name__ == "__main__":
    cli.run(main, "convert_scienceqa")
