"""Towers trained by one protocol: the rows of scripts/compare_towers.py as a table, means and deviations over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A variant at one budget, over its seeds.

    top1: one share a seed. ratio: mean top-1 as a share of the dense reference's, None without one. tokens, gmacs: means; None
    where unknown. diverged: seeds whose loss became no number, and that are in none of the means.
    """

    variant: str
    label: str
    seeds: tuple[int, ...]
    top1: tuple[float, ...]
    diverged: int
    tokens: float | None
    gmacs: float | None
    step_seconds: float | None
    parameters: int
    ratio: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None for one alone."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None


def entries(rows: Sequence[dict], order: Sequence[str], dense: str | None) -> list[Entry]:
    """One for each variant and budget that has rows, in the recipe's order.

    Args:
        rows: of results.jsonl, one for each variant and seed.
        order: names of all variants.
        dense: the reference's name; the ratio is that of the means.
    """
    found = []
    for name in order:
        members = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["seed"])
        if not members:
            continue
        good = [row for row in members if row["readings"]]
        for place, budget in enumerate(members[0]["settings"]["read_at"] or [None]):
            readings = [row["readings"][place] for row in good]
            found.append(
                Entry(
                    variant=name,
                    label=_label(name, members[0]["settings"]["read_at"], budget),
                    seeds=tuple(row["seed"] for row in good),
                    top1=tuple(reading["top1"] for reading in readings),
                    diverged=len(members) - len(good),
                    tokens=_mean([reading["tokens"] for reading in readings]),
                    gmacs=_mean([reading["gmacs"] for reading in readings]),
                    step_seconds=_median([row["step_seconds"] for row in good]),
                    parameters=members[0]["parameters"],
                )
            )
    reference = next((entry.mean for entry in found if entry.variant == dense and entry.top1), None)
    if not reference:
        return found
    return [Entry(**{**vars(entry), "ratio": entry.mean / reference}) if entry.top1 else entry for entry in found]


def _label(name: str, read_at: list | None, budget: float | None) -> str:
    if read_at is None:
        return name
    return f"{name}, read freely" if budget is None else f"{name}, read at {budget:g}x"


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values or not values else statistics.fmean(values)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def markdown(found: Sequence[Entry], dense: str | None) -> str:
    """The table, columns aligned. Top-1 is the mean ± sample standard deviation over the seeds."""
    heads = [
        "variant",
        "top-1 (%)",
        "seeds",
        f"% of {dense}" if dense else None,
        "tokens",
        "GMACs",
        "params (M)",
        "step (s)",
    ]
    lines = []
    for entry in found:
        spread = "" if entry.deviation is None else f" ± {100 * entry.deviation:.2f}"
        top1 = f"{100 * entry.mean:.2f}{spread}" if entry.top1 else "-"
        seeds = f"{len(entry.seeds)}" + (f" ({entry.diverged} diverged)" if entry.diverged else "")
        ratio = _format(entry.ratio and 100 * entry.ratio, ".1f") if dense else None
        cells = [entry.label.replace("|", r"\|"), top1, seeds, ratio, _format(entry.tokens, ".1f")]
        cells += [_format(entry.gmacs, ".3g"), f"{entry.parameters / 1e6:.2f}", _format(entry.step_seconds, ".3f")]
        lines.append(cells)
    rows = [[cell for cell in cells if cell is not None] for cells in (heads, *lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = [f"{'':->{widths[0]}}", *(f"{'':->{width - 1}}:" for width in widths[1:])]
    padded = [[rows[0][0].ljust(widths[0]), *(c.ljust(w) for c, w in zip(rows[0][1:], widths[1:]))], rule]
    padded += [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))] for row in rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def provenance(rows: Sequence[dict]) -> str:
    """What stands below the table: protocol, data, machines, versions, commands."""
    protocol = dict(rows[0]["settings"]["protocol"])
    moves = {key: value for key, value in protocol.pop("augmentation").items() if value}
    weight = protocol.pop("rate_loss_weight")  # a variant may have its own
    weight = "each tower's own" if weight is None else weight
    words = ", ".join(f"{key} {value}" for key, value in {**protocol, **moves}.items() if value is not None)
    data = rows[0]["data"]
    lines = [
        f"Protocol: {words}, rate_loss_weight {weight}; AdamW, cosine to 0.",
        f"Data: {data['train']:,} pictures to train on, {data['val']:,} to evaluate, {len(data['classes'])} classes.",
        "Top-1: mean ± sample standard deviation over the seeds. Tokens: of a picture in evaluation. GMACs: 1e9 "
        "multiply-accumulates of a picture at those tokens. Step: median wall-clock time, waiting included.",
    ]
    dates = sorted(row["finished"][:10] for row in rows)
    versions = {", ".join(f"{key} {value}" for key, value in row["versions"].items()) for row in rows}
    machines = {row["machine"] for row in rows}
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    lines.append(f"Run: {span}; {'; '.join(sorted(machines))}; {'; '.join(sorted(versions))}.")
    lines += [f"Command: `{command}`" for command in dict.fromkeys(" ".join(row["command"]) for row in rows)]
    return "\n\n".join(lines)


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
