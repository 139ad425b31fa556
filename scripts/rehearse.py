"""Kill a training run at chosen points, resume it, and see whether it is the run that was not killed.

    python scripts/rehearse.py --kill_at 7 12 --kill_saving 10 --output rehearsal -- \\
        deepspeed --num_gpus 2 scripts/finetune.py RECIPE.yaml --max_steps 20 --save_steps 5 --logging_steps 1 ...

What stands after -- is the command as you would start it (python, torchrun or deepspeed), of few steps, without --output_dir.
Writes rehearsal.md and rehearsal.json to --output; exits with 1 where a resumed run is another, or the base of a
LoRA run was changed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from llava_drip import cli
from llava_drip.files import write_results


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = cli.ArgumentParser(
        prog="rehearse.py",
        description=__doc__.splitlines()[0],
        usage="%(prog)s [flags] -- COMMAND ...",
    )
    parser.add_argument("--kill_at", type=int, nargs="*", default=[], help="kill once so many steps are logged")
    parser.add_argument(
        "--kill_saving", type=int, nargs="*", default=[], help="kill as soon as the checkpoint of this step appears"
    )
    parser.add_argument("--output", type=Path, default=Path("rehearsal"), help="folder for the runs and the table")
    own, mark, command = argv, "", []
    if "--" in argv:
        place = argv.index("--")
        own, mark, command = argv[:place], "--", argv[place + 1 :]
    args = parser.parse_args(own)
    if not mark or not command:
        parser.error("no command: write -- and then what starts the training")
    if not args.kill_at and not args.kill_saving:
        parser.error("no kill: give --kill_at or --kill_saving")
    args.command = command
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    from llava_drip.instruct.rehearsal import Kill, rehearse  # after parsing: --help is quick
    from llava_drip.instruct.rehearsal_table import table_of
    from llava_drip.machine import described, load, where

    kills = [Kill(step) for step in args.kill_at] + [Kill(step, while_saving=True) for step in args.kill_saving]
    before = load()
    result = rehearse(args.command, kills, args.output)
    loads, machine = (before, load()), where(["cpu"])
    text = f"    {' '.join(args.command)}\n\n{table_of(result)}\n{described(machine, loads)}\n"
    print(text)
    write_results(args.output, "rehearsal", {**machine, "load": loads, **asdict(result)}, text)
    if not result.exact:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, "rehearse.py")
