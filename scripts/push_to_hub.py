"""python scripts/push_to_hub.py RUN --repo user/name --licence apache-2.0

Uploads a trained model with a model card to the Hugging Face Hub. RUN is one of

    a run's folder of scripts/train_imagenet.py    its best/ tower, else last/ (timm's format); RUN/last for the other
    a run's folder of scripts/train_clip.py        the CLIP (open_clip's format); RUN/tower for its tower alone (timm's)
    a tower's directory, or an assistant's         (transformers' format; scripts/finetune.py)

Only the model goes up: no optimizer states, no logs; local paths are shown as their last component. The card tells the command,
data, numbers and versions that the run recorded, and how to load the model. Token: `hf auth login`, or HF_TOKEN.

    python scripts/push_to_hub.py RUN --repo user/name --licence apache-2.0 --dry-run

writes the folder that would be uploaded (--output, default hub/name) and lists it; nothing is sent.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars

from llava_drip import cli
from llava_drip.reports import hub
from llava_drip.reports.bundle import Bundle, find_bundle, stage
from llava_drip.reports.card import known_licence, write_card


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="push_to_hub.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a model's directory")
    parser.add_argument("--repo", required=True, help="user/name on the Hub; made where there is none")
    parser.add_argument(
        "--licence",
        "--license",
        help="of the weights, as the Hub names it: apache-2.0, mit, cc-by-nc-4.0, llama3, other, ...",
    )
    parser.add_argument("--datasets", nargs="+", default=[], help="their names on the Hub, for the card's metadata")
    parser.add_argument("--private", action="store_true", help="if the repository is made")
    parser.add_argument("--revision", help="branch; made where there is none (main)")
    parser.add_argument("--message", default="Upload model", help="of the commit (Upload model)")
    parser.add_argument("--dry-run", action="store_true", help="write the folder, send nothing")
    parser.add_argument("--output", help="keep the folder here (default: hub/NAME with --dry-run, else it is not kept)")
    return parser.parse_args(argv)


def fill(folder: Path, bundle: Bundle, args: argparse.Namespace, licence: str, kept: bool) -> None:
    """The model's files and its card; prints what lies there."""
    write_card(folder, bundle, args.repo, licence, args.datasets)
    files = stage(bundle, folder, shutil.copyfile if kept else hub.link)
    for file in files:
        print(f"{file.stat().st_size:>14,}  {file.relative_to(folder)}")


def new_folder(path: str) -> Path:
    """ValueError where something lies there already."""
    folder = Path(path).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"--output {path}: exists already; remove it, or give another")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    args = parse()
    hub.check_repo(args.repo)
    bundle = find_bundle(args.run)
    licence = args.licence or known_licence(bundle)
    if licence is None:
        raise ValueError(
            f"--licence: none is known for {args.run}; give the weights' licence, e.g. --licence apache-2.0"
        )
    if not args.dry_run:
        hub.check_token()
    print(f"{bundle.kind} in {bundle.directory}, licence {licence}:")
    if args.dry_run or args.output:
        folder = new_folder(args.output or str(Path("hub", args.repo.split("/")[-1])))
        fill(folder, bundle, args, licence, kept=True)
        if args.dry_run:
            print(f"wrote {folder}; nothing was sent")
            return
        print("uploaded:", hub.upload(folder, args.repo, args.private, args.revision, args.message))
        return
    with tempfile.TemporaryDirectory(prefix="push-to-hub-") as folder:
        fill(Path(folder), bundle, args, licence, kept=False)
        print("uploaded:", hub.upload(Path(folder), args.repo, args.private, args.revision, args.message))


if __name__ == "__main__":
    disable_progress_bars()
    cli.run(main, "push_to_hub.py")
