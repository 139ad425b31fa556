"""python scripts/train_language_model.py --data_path chat.json [more.json ...] --output DIR

A small language model of one's own, where no pretrained one can be had: a byte-level BPE tokenizer and a LLaMA, trained on what
conversation files say, pictures left out. DIR is an ordinary model directory: `--model_name_or_path` of the two stages.
"""

from __future__ import annotations

from pathlib import Path

from llava_drip import cli
from llava_drip.instruct.language import conversation_texts, train_small_llama

AT_LEAST_ONE = {
    "hidden_size": (128, "width"),
    "layers": (4, "blocks"),
    "heads": (4, "attention heads; they divide the width"),
    "vocab_size": (2048, "tokens of the tokenizer"),
    "context": (1024, "positions that it can be used with"),
    "steps": (500, "optimizer steps"),
    "batch_size": (32, "blocks a step"),
    "block": (256, "tokens a block: texts are joined and cut into these"),
}


def main() -> None:
    parser = cli.ArgumentParser(prog="train_language_model", description=__doc__.split("\n\n")[1])
    parser.add_argument("--data_path", required=True, nargs="+", help="conversations in LLaVA's JSON format")
    parser.add_argument("--output", required=True, type=Path, help="folder of the model")
    for name, (default, what) in AT_LEAST_ONE.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    parser.add_argument("--dropout", type=float, default=0.0, help="of attention, in this and all later training")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in AT_LEAST_ONE:
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.hidden_size % (2 * args.heads):
        parser.error(f"--hidden_size {args.hidden_size}: must be a multiple of twice --heads {args.heads}")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout {args.dropout}: must be at least 0 and below 1")
    if args.output.exists() and any(args.output.iterdir()):
        parser.error(f"--output {args.output}: holds files already; name another folder")
    texts = [text for path in args.data_path for text in conversation_texts(path)]
    sizes = {name: getattr(args, name) for name in (*AT_LEAST_ONE, "dropout", "learning_rate", "seed")}
    train_small_llama(texts, args.output, **sizes)
    print(f"{len(texts):,} texts: {args.output} (--model_name_or_path)")


if __name__ == "__main__":
    cli.run(main, "train_language_model")
