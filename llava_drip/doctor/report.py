"""All checks together, as text or as JSON."""

from __future__ import annotations

import os
import sys

from .checks import NOTE, OK, PROBLEM, Check, machine_checks, package_checks, tool_checks
from .locks import lock_checks
from .probes import PROBES, QUICK, TRAINING, run_probes

_SIGNS = {OK: ("ok  ", "32"), NOTE: ("note", "33"), PROBLEM: ("MISS", "1;31")}


def examine(wanted: list[str], compiling: bool = False) -> list[Check]:
    """Every check. wanted: extras whose packages must be there. compiling: torch.compile is tried too.

    Raises:
        ValueError: an extra that the package does not have.
    """
    checks = [*package_checks(wanted), *machine_checks()]
    trains = "train" in wanted
    probed = [
        Check(*found) for found in run_probes(PROBES if compiling else QUICK, optional=() if trains else TRAINING)
    ]
    cuda = any(check.name.startswith("cuda:") for check in probed)
    checks += [*tool_checks(cuda, trains), *lock_checks(trains), *probed]
    if any(check.name == "GPU 0" for check in checks) and any(check.name == "CUDA" for check in checks):
        advice = "its driver is too old for this torch, or torch is built for CPUs: pytorch.org/get-started"
        checks.append(Check("devices", "GPU", PROBLEM, "nvidia-smi lists one, torch does not use it", advice))
    return checks


def as_json(checks: list[Check]) -> dict:
    return {"ok": good(checks), "checks": [check.as_dict() for check in checks]}


def good(checks: list[Check]) -> bool:
    return all(check.state != PROBLEM for check in checks)


def print_report(checks: list[Check]) -> None:
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for section in dict.fromkeys(check.section for check in checks):
        print(section)
        for check in (check for check in checks if check.section == section):
            sign, colour = _SIGNS[check.state]
            sign = f"\x1b[{colour}m{sign}\x1b[0m" if coloured else sign
            print(f"  {sign} {check.name}: {check.value}")
            if check.advice:
                print(f"         {check.advice}")
    missing = [check.name for check in checks if check.state == PROBLEM]
    notes = sum(check.state == NOTE for check in checks)
    print(f"needed and missing: {', '.join(missing)}" if missing else f"all that is needed is here ({notes} notes)")
