"""python scripts/convert_captions.py --input 'DIR/train-{00000..00005}.tar' --output DIR [--limit 512]

Puts pictures with captions into the format of LLaVA's 558K alignment set, for `pretrain_projector.py`:

    DIR/chat.json           [{"id", "image", "conversations": [{"from": "human", ...}, {"from": "gpt", ...}]}, ...]
    DIR/images/<id>.jpg     the original bytes, of pictures that come out of tars or a folder with captions.jsonl

`--input` is webdataset shards (a path with {00000..00005} ranges; samples of jpg, png or webp plus txt), or a folder whose
captions.jsonl has one object per line: "image" (or "file_name"), a path inside the folder, and "caption" (or "text", or
"captions", a list). Every picture is decoded once, so that a broken one is found now and by name. Or it is a listing, whose
pictures (`--images`) stay where they are, unless they lie in tars:

    --input coco/annotations/captions_train2017.json --images coco/train2017     # COCO; Karpathy's splits with --split train
    --input Flickr8k.token.txt --images Flicker8k_Dataset                        # Flickr8k as published, and Flickr30k
    --input captions.jsonl --images 'DIR/*.tar' --split train                    # "image_id", "captions", "split" a line
    --input captions.csv --images DIR                                            # a column for the path, one for the caption

DIR appears only when it is complete. Formats, with examples: docs/guides/data.md.
"""

from __future__ import annotations

from pathlib import Path

from llava_drip import cli
from llava_drip.instruct.captions import CHOICES, convert


def main() -> None:
    parser = cli.ArgumentParser(prog="convert_captions", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--input", required=True, help="shards, such as 'train-{00000..00005}.tar', a folder, or a listing"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--images", help="of a listing: folder or tar shards of its pictures (default: beside it)")
    parser.add_argument("--split", help="of a listing that names splits")
    parser.add_argument(
        "--captions", choices=CHOICES, default="first", help="which of a picture's; all: a row for each"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the requests, and of --captions random")
    parser.add_argument("--limit", type=int, help="stop after this many pictures")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: must be at least 1")
    made = convert(args.input, args.output, args.images, args.split, args.captions, args.seed, args.limit)
    kind = "rows" if args.captions == "all" else "pictures"
    print(f"{made.rows} {kind}: {made.data_path} (--data_path), {made.image_folder} (--image_folder)")


if __name__ == "__main__":
    cli.run(main, "convert_captions")
