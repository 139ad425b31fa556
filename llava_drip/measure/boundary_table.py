"""What was measured of boundaries, over seeds: groups of rows, and a Markdown table of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from llava_drip.measure.scene_tasks import TASKS

VARIED = ("rule", "rate_loss", "detail_weight", "scan")  # what the rows of one table differ in


@dataclass(frozen=True)
class Group:
    """Cells that differ in their seed only. rows: as scripts/measure_boundaries.py writes them, by seed."""

    cell: dict
    rows: list[dict]

    @property
    def label(self) -> str:
        detail = self.cell["detail_weight"]
        parts = (self.cell["rule"], self.cell["rate_loss"], self.cell["scan"], f"detail {detail:g}" if detail else None)
        return " ".join(part for part in parts if part)

    def values(self, when: str, mode: str, name: str) -> list[float]:
        """One value a seed; none where there is no such mode. when: "untrained" or "trained". mode, name: see `score`."""
        return [row[when][mode][name] for row in self.rows if mode in row[when]]


def grouped(rows: Sequence[dict]) -> list[Group]:
    """Rows by all of their cell but the seed, in the order of first appearance."""
    groups: dict[str, Group] = {}
    for row in rows:
        cell = {key: value for key, value in row["cell"].items() if key != "seed"}
        groups.setdefault(json.dumps(cell, sort_keys=True), Group(cell, [])).rows.append(row)
    for group in groups.values():
        group.rows.sort(key=lambda row: row["cell"]["seed"])
    return list(groups.values())


@dataclass(frozen=True)
class Section:
    """Groups that differ in VARIED only: what may stand in one table, or one plot. settings: what they share, in words."""

    task: str
    settings: str
    groups: list[Group]


def sections(groups: Sequence[Group]) -> list[Section]:
    """One for each task, and for each setting of the rest, in the order of first appearance."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        rest = {key: value for key, value in group.cell.items() if key not in VARIED}
        found.setdefault(json.dumps(rest), []).append(group)
    result = []
    for rest, members in found.items():
        rest, own = json.loads(rest), "each rule's own"
        task = rest.pop("task")
        settings = ", ".join(f"{key} {own if value is None else value}" for key, value in rest.items())
        result.append(Section(task, settings, members))
    return result


def table(groups: Sequence[Group]) -> str:
    """Markdown, a table for each section: mean over seeds ± sample standard deviation, best F1 first."""
    return "\n".join([*map(_table, sections(groups)), NOTE])


NOTE = (
    "Exact (where nothing else is said): every image has the asked number of tokens. Free: each image decides. F1 is that of\n"
    'boundaries against true changes along the scan; "x chance" is F1 over that of as many boundaries put at random; "follows"\n'
    "is the correlation of an image's tokens with its number of true changes. Mean over seeds ± sample standard deviation.\n"
)


def _table(section: Section) -> str:
    metric = TASKS[section.task].metric
    head = ["rule", "rate loss", "detail", "scan", "seeds", "F1 untrained", "F1 trained", "x chance"]
    head += ["precision", "recall", metric, "free: F1", "tokens p5 .. p95", "follows", metric]
    lines = [f"### Task: {section.task}", "", section.settings, ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * 4 + " ---: |" * (len(head) - 4)]
    for group in sorted(section.groups, key=lambda group: -statistics.mean(group.values("trained", "exact", "f1"))):
        cell, exact = group.cell, partial(_mean, group, "trained", "exact")
        chance = group.values("trained", "exact", "chance_f1")
        ratio = [
            f1 / by_chance if by_chance else 0.0
            for f1, by_chance in zip(group.values("trained", "exact", "f1"), chance)
        ]
        detail = "" if cell["detail_weight"] is None else f"{cell['detail_weight']:g}"
        cells = [cell["rule"], cell["rate_loss"] or "", detail, cell["scan"], str(len(group.rows))]
        cells += [_mean(group, "untrained", "exact", "f1"), exact("f1"), _spread(ratio, 1)]
        cells += [exact("precision"), exact("recall"), exact("task"), _mean(group, "trained", "free", "f1")]
        low, high = (group.values("trained", "free", name) for name in ("tokens_p5", "tokens_p95"))
        cells += [f"{statistics.mean(low):.0f} .. {statistics.mean(high):.0f}" if low else ""]
        cells += [_mean(group, "trained", "free", name) for name in ("follows", "task")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _mean(group: Group, when: str, mode: str, name: str) -> str:
    return _spread(group.values(when, mode, name), 3)


def _spread(values: list[float], digits: int) -> str:
    """Mean ± sample standard deviation; the mean alone of one value, nothing of none."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
