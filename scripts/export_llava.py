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
    parser.add_argument("--device", help="where those are made, e.g. cpu; a GPU where there is one")
    parser.add_argument("--batch_size", type=int, help="of those at a time (8)")
    parser.add_argument("--only-images", action="store_true", help="write embeddings, and no checkpoint")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of what is written; the assistant's own"
    )
    args = parser.parse_args()
    if args.only_images and not args.images:
        raise ValueError("--only-images: there are none; give --images FILE ...")
    for name in ("compression", "device", "batch_size"):
        if getattr(args, name) is not None and not args.images:
            raise ValueError(f"--{name}: is for --images, and there are none; a stock checkpoint has no budget")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {args.batch_size}")
    output = Path(args.output).expanduser()
    if not args.only_images and (output / "model").exists():
        raise ValueError(f"--output {args.output}: holds a model already; remove it, or give another")
    if args.images and (output / "images").exists():
        raise ValueError(f"--output {args.output}: holds images already; remove them, or give another")
    run(args, output)


def run(args, output: Path) -> None:
    import torch  # late: most of a program's start

    from llava_drip.assistant.build import load_assistant
    from llava_drip.assistant.embeddings import embed_pictures
    from llava_drip.assistant.stock import check_export, export

    device = cli.checked_device(args.device)
    model, processor = load_assistant(args.model, args.dtype and getattr(torch, args.dtype))
    if not args.only_images:
        check_export(model)  # before an hour of pictures
    if args.compression is not None:
        model.set_compression(args.compression)
    if args.images:
        pictures, parts = [Path(name) for name in args.images], (model.vision_tower, model.multi_modal_projector)
        for part in parts:
            part.to(device)
        for file, tokens in embed_pictures(model, processor, pictures, output / "images", args.batch_size or 8).items():
            print(f"{file}: {tokens} tokens")
        for part in parts:
            part.cpu()
    if not args.only_images:
        path, why_no_tower = export(model, processor, output / "model")
        print(f"wrote {path}")
        if why_no_tower:
            print(
                f"its vision tower has the shape of the assistant's and random weights ({why_no_tower}): give it embeddings"
            )


if __name__ == "__main__":
    cli.run(main, "export_llava.py")
