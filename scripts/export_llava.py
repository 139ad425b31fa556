"""An assistant as a stock LlavaForConditionalGeneration, and pictures as embeddings for servers that take them.

    python scripts/export_llava.py runs/assistant --output export
    python scripts/export_llava.py runs/assistant --output export --images photos/1.jpg photos/2.jpg --compression 4

OUTPUT/model is the stock checkpoint, OUTPUT/images/NAME.safetensors holds image_embeds [tokens, hidden]. A plain CLIP tower is in
the checkpoint; of any other, only its shape is: a server must be given the embeddings (docs/guides/assistant.md).
"""

from pathlib import Path

from llava_drip import cli


def main() -> None:
    parser = cli.ArgumentParser(prog="export_llava.py", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory of an assistant")
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument("--images", nargs="+", default=[], metavar="FILE", help="pictures to write embeddings of")
    parser.add_argument(
        "--compression", type=float, help="patches per visual token of those, for a tower that has budgets"
    )
    parser.add_argument("--only-images", action="store_true", help="write embeddings, and no checkpoint")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of what is written; the assistant's own"
    )
    args = parser.parse_args()
    if args.only_images and not args.images:
        raise ValueError("--only-images: there are none; give --images FILE ...")
    if args.compression is not None and not args.images:
        raise ValueError("--compression: is for --images; a stock checkpoint has no budget")
    output = Path(args.output).expanduser()
    if not args.only_images and (output / "model").exists():
        raise ValueError(f"--output {args.output}: holds a model already; remove it, or give another")
    run(args, output)


def run(args, output: Path) -> None:
    import torch  # late: most of a program's start

    from llava_drip.assistant.build import load_assistant
    from llava_drip.assistant.stock import embed_pictures, export

    model, processor = load_assistant(args.model, args.dtype and getattr(torch, args.dtype))
    if args.compression is not None:
        model.set_compression(args.compression)
    if args.images:
        folder = output / "images"
        folder.mkdir(parents=True, exist_ok=True)
        for file, tokens in embed_pictures(model, processor, [Path(name) for name in args.images], folder).items():
            print(f"{file}: {tokens} tokens")
    if not args.only_images:
        path, why_no_tower = export(model, processor, output / "model")
        print(f"wrote {path}")
        if why_no_tower:
            print(
                f"its vision tower has the shape of the assistant's and random weights ({why_no_tower}): give it embeddings"
            )


if __name__ == "__main__":
    cli.run(main, "export_llava.py")
