"""What SeNaTra's grouping layers cost at growing picture sizes, local and dense ones apart, and its sizes beside NAT's.

python scripts/measure_grouping.py [--model senatra_tiny_224] [--sizes 128 256 512] [--rounds 7] [--output grouping]

Writes grouping.md and grouping.json to --output. MACs are exact, in closed form; seconds are of inference with random weights.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from llava_drip import cli
from llava_drip.files import write_results

TOWERS = ["senatra_tiny_224", "senatra_small_224", "senatra_base_224"]


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="measure_grouping.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="senatra_tiny_224", help="timm name of the SeNaTra whose layers are measured"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512], help="pixels of a side")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, all sizes and layers in turn in each")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--towers", nargs="*", default=TOWERS, help="timm names whose parameters and MACs are listed")
    parser.add_argument("--output", type=Path, help="folder of the results (default: they are printed only)")
    args = parser.parse_args()
    for flag in ("rounds", "batch"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    device = cli.checked_device(args.device)
    import timm  # after parsing: --help is quick

    import llava_drip  # noqa: F401  (registers the towers)
    from llava_drip.machine import described, load, where
    from llava_drip.measure.grouping import measure_layers
    from llava_drip.measure.grouping_table import layer_table, tower_rows, tower_table

    for flag, names in (("model", [args.model]), ("towers", args.towers)):
        for name in names:
            if not timm.is_model(name) or not name.startswith("senatra_"):
                known = ", ".join(timm.list_models("senatra_*"))
                raise ValueError(f"--{flag} {name}: not a SeNaTra that timm knows; there are {known}")
    towers, before = tower_rows(args.towers), load()
    costs = measure_layers(args.model, sorted(set(args.sizes)), args.rounds, args.batch, device)
    loads = (before, load())
    machine = where([str(device)])
    text = f"{args.model}, batch {args.batch}, {args.rounds} rounds, float32. {described(machine, loads)}\n\n"
    text += f"{layer_table(costs, args.batch)}\n"
    if towers:
        text += f"\n{tower_table(towers)}\n"
    print(text)
    record = {**machine, "load": loads, "model": args.model, "batch": args.batch, "rounds": args.rounds}
    record |= {"layers": [asdict(cost) for cost in costs], "towers": towers}
    if args.output is not None:
        write_results(args.output, "grouping", record, text)


if __name__ == "__main__":
    cli.run(main, "measure_grouping.py")
