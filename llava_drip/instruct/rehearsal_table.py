"""A rehearsal as Markdown."""

from __future__ import annotations

from llava_drip.instruct.rehearsal import FOLLOWED, Rehearsal

_HEAD = ("killed", "checkpoints left", "resumed from", f"next {FOLLOWED} losses", "all losses", "weights")


def table_of(result: Rehearsal) -> str:
    """What was trained, and a row for each kill: largest differences from the run that was not killed."""
    first, last = result.ends()
    parts = ", ".join(f"{part} {changed} of {total}" for part, (changed, total) in result.changed.items())
    lines = [
        f"{len(result.losses)} steps, {result.seconds:.0f} s with its start. Loss {first:.3f} (mean of the first {FOLLOWED}) to "
        f"{last:.3f} (of the last {FOLLOWED}). Tensors that training changed: {parts}.",
        *(f"Its base {path}: {_kept(before, after)}." for path, (before, after) in result.bases.items()),
        "",
        "Largest difference of a resumed run from the one that was not killed:",
        "",
        f"| {' | '.join(_HEAD)} |",
        f"|{' --- |' * len(_HEAD)}",
    ]
    for recovery in result.recoveries:
        cells = (
            recovery.kill,
            ", ".join(name.removeprefix("checkpoint-") for name in recovery.left) or "none",
            f"step {recovery.resumed_from}" if recovery.resumed_from else "the beginning",
            *(f"{value:.2g}" for value in (recovery.next_losses, recovery.all_losses, recovery.weights)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _kept(before: str, after: str) -> str:
    return (
        f"not changed, fingerprint {after}"
        if before == after
        else f"CHANGED, fingerprint {before} before, {after} after"
    )
