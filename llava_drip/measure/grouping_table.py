"""Tables of what SeNaTra's grouping layers cost, and of whole towers beside the trunk that they are built on."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch

from llava_drip.measure.grouping import LayerCost, senatra_macs
from llava_drip.measure.published import NAT


def layer_table(costs: Sequence[LayerCost], batch: int = 1) -> str:
    """Markdown: a row a layer and size. What is linear in pixels has the same figure per pixel at every size.

    batch: pictures of which `seconds` is the time.
    """
    head = (
        "layer",
        "grouping",
        "pixels",
        "tokens in → out",
        "M MACs",
        "MACs a pixel",
        "of these pairs",
        "ms (range)",
        "ns a pixel",
        "largest tensor, MiB",
        "bytes a pixel",
    )
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for cost in sorted(costs, key=lambda cost: (cost.layer, cost.size)):
        pixels = cost.size**2
        cells = (
            f"{cost.layer} → {cost.layer + 1}",
            "dense" if cost.window is None else f"local, {cost.window} x {cost.window}",
            f"{cost.size} x {cost.size}",
            f"{cost.tokens_in:,} → {cost.tokens_out:,}",
            f"{cost.macs / 1e6:.1f}",
            f"{cost.macs / pixels:,.0f}",
            f"{cost.pair_macs / pixels:,.0f}",
            f"{1000 * cost.seconds:.1f} ({1000 * cost.low:.1f} - {1000 * cost.high:.1f})",
            f"{1e9 * cost.seconds / batch / pixels:.0f}",
            f"{cost.largest_mib:.2f}",
            f"{cost.largest_mib * 2**20 / pixels:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tower_rows(names: Sequence[str]) -> list[dict]:
    """What each tower costs at its own size, by part (senatra_macs), with 1,000 classes. Shapes only: nothing is computed."""
    rows = []
    for name in names:
        with torch.device("meta"):
            tower = timm.create_model(name)
        convolutions = sum(stage.grouping.init.weight.numel() for stage in tower.stages[1:])
        layers = sum(p.numel() for stage in tower.stages[1:] for p in stage.grouping.parameters())
        parts, run = senatra_macs(tower), senatra_macs(tower, masked=True)
        rows.append(
            {
                "name": name,
                "parameters": sum(p.numel() for p in tower.parameters()),
                "grouping_parameters": layers - convolutions,
                "macs": sum(parts.values()),
                "grouping_macs": parts["grouping"],
                "macs_as_run": sum(run.values()),
                "parts": parts,
            }
        )
    return rows


def tower_table(rows: Sequence[dict]) -> str:
    """Markdown: parameters and GMACs, whole and without grouping, beside NAT's published figures."""
    lines = [
        "| tower | M parameters | of these grouping | GMACs | of these grouping | trunk: M parameters, GMACs | published for the "
        "trunk | deviation | GMACs as run |",
        f"|{' --- |' * 9}",
    ]
    for row in rows:
        parameters = (row["parameters"] - row["grouping_parameters"]) / 1e6
        macs = (row["macs"] - row["grouping_macs"]) / 1e9
        published = deviation = ""
        if row["name"] in NAT:
            trunk, millions, billions = NAT[row["name"]]
            published = f"{trunk}: {millions}, {billions}"
            deviation = f"{parameters / millions - 1:+.1%}, {macs / billions - 1:+.1%}"
        cells = [
            row["name"],
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['grouping_parameters'] / 1e6:.2f}",
            f"{row['macs'] / 1e9:.2f}",
            f"{row['grouping_macs'] / 1e9:.2f}",
            f"{parameters:.2f}, {macs:.2f}",
            published,
            deviation,
            f"{row['macs_as_run'] / 1e9:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
