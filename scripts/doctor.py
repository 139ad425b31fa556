"""What this machine has of what the package needs, whether it works, and how to get what is missing.

    python scripts/doctor.py
    python scripts/doctor.py --extra train serve --json

Ends with status 1 if something needed is missing. It loads no model and fetches nothing.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def load_doctor():
    """llava_drip/doctor by itself: `import llava_drip` needs what may be missing here."""
    folder = Path(__file__).resolve().parents[1] / "llava_drip" / "doctor"
    places = {"submodule_search_locations": [str(folder)]}
    spec = importlib.util.spec_from_file_location("llava_drip_doctor", folder / "__init__.py", **places)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return importlib.import_module("llava_drip_doctor.report")


def main() -> None:
    parser = Parser(prog="doctor.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--extra",
        nargs="+",
        default=["train"],
        metavar="NAME",
        help="extras whose packages must be there (default: train); those of others are noted",
    )
    parser.add_argument("--compile", action="store_true", help="try torch.compile too (half a minute on a CPU)")
    parser.add_argument("--json", action="store_true", help="{ok, checks: [{section, name, state, value, advice}]}")
    args = parser.parse_args()
    report = load_doctor()
    try:
        checks = report.examine(args.extra, args.compile)
    except ValueError as error:
        parser.exit(1, f"doctor.py: error: {error}\n")
    if args.json:
        print(json.dumps(report.as_json(checks), indent=1))
    else:
        report.print_report(checks)
    sys.exit(0 if report.good(checks) else 1)


if __name__ == "__main__":
    main()
