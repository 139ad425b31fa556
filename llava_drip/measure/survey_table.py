"""A survey, and the presets' costs, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from llava_drip.machine import described

COUNTED = (
    "GMACs: 1e9 multiply-accumulates of one image, of convolutions, linear layers, matrix products and attention, each with its\n"
    "projections; boundaries simulated, exactly as many tokens as the tower's compression says. Norms etc.: norms, pooling and\n"
    "operations element by element, in 1e9, not part of it. SeNaTra's neighborhood attention is counted as it is run, by\n"
    "tiles, with the pairs that a mask then drops; scripts/measure_grouping.py counts windows alone, as papers do.\n"
)


def markdown(result: dict) -> str:
    """Of survey.survey: what towers are, then a table for each device and dtype."""
    rows, plan = result["towers"], result["plan"]
    parts = [_what_they_are(rows), COUNTED]
    if plan["images"] is not None:
        shown = rows[0]["images"]["images"]
        parts.append(f"On images: means over the first {shown} of {plan['images']}, 5th .. 95th percentile.\n")
    places = dict.fromkeys((one["device"], one["dtype"]) for row in rows for one in row["passes"])
    parts += [f"### {device}, {dtype}\n\n{_passes(rows, device, dtype)}" for device, dtype in places]
    for row in rows:
        for one in row["passes"]:
            if one["error"]:
                what = f"{one['device']} {one['dtype']}, {one['mode']}, batch {one['batch']}"
                parts.append(f"{row['label']}, {what}: {one['error']}\n")
    if places:
        parts.append(
            f"Median of {plan['rounds']} rounds after {plan['warmup']} to warm up, quartiles in parentheses; all towers in turn\n"
            f"within each round. Against: {rows[0]['label']}'s time over its own, median over rounds. Training step:\n"
            "forward, backward, AdamW. Memory: on a CPU what a process of its own rises to over its libraries,\n"
            "on a GPU torch.cuda.max_memory_allocated. In inference the tokens of an image, where they vary from image to\n"
            f"image (DRIP), do so around the compression with a standard deviation of {plan['spread']:g} of their mean.\n"
        )
        parts.append(f"{described(result, result['load'])}\n")
    return "\n".join(parts)


def _what_they_are(rows: Sequence[dict]) -> str:
    heads = ["tower", "parameters (M)", "pixels", "tokens", "GMACs", "norms etc."]
    on_images, accurate = any(row["images"] for row in rows), any(row["top1"] is not None for row in rows)
    heads += ["tokens on images", "GMACs on images"] * on_images + ["top-1"] * accurate
    lines = []
    for row in rows:
        cells = _cost_cells(row)
        if on_images:
            cells += [_spread(row["images"], "tokens", ".1f"), _spread(row["images"], "gmacs", ".3f")]
        if accurate:
            cells.append(number(None if row["top1"] is None else 100 * row["top1"], ".2f", " %"))
        lines.append(cells)
    return table(heads, lines)


def _cost_cells(row: dict) -> list[str]:
    pixels = " x ".join(map(str, dict.fromkeys(row["image_size"])))
    cells = [row["label"], number(row["parameters"] / 1e6, ".2f"), pixels, number(row["tokens"], "d")]
    return cells + [number(row["gmacs"], ".3f"), number(row["gmacs_other"], ".3f")]


def _spread(values: dict, name: str, form: str) -> str:
    if values[name] is None:
        return "-"
    return f"{values[name]:{form}} ({values[f'{name}_p5']:{form}} .. {values[f'{name}_p95']:{form}})"


def _passes(rows: Sequence[dict], device: str, dtype: str) -> str:
    here = [[one for one in row["passes"] if (one["device"], one["dtype"]) == (device, dtype)] for row in rows]
    heads, lines = ["tower"], [[row["label"]] for row in rows]
    for place, setting in enumerate(here[0]):
        mode, batch = setting["mode"], setting["batch"]
        what = {"inference": "latency" if batch == 1 else "inference", "training": "training step"}[mode]
        heads += [f"{what}, batch {batch} (ms)"]
        heads += [f"images/s, batch {batch}"] * (mode == "inference" and batch > 1)
        heads += ["against", "memory (GiB)"]
        for line, passes in zip(lines, here, strict=True):
            one = passes[place]
            failed = one["milliseconds"] is None
            line.append("failed" if failed else f"{one['milliseconds']:.1f} ({one['q1']:.1f} .. {one['q3']:.1f})")
            if mode == "inference" and batch > 1:
                line.append(number(one["images_per_second"], ".1f"))
            line += [number(one["speed_up"], ".2f", "x"), number(one["peak_memory_gib"], ".2f")]
    return table(heads, lines)


def presets_markdown(result: dict) -> str:
    """Of survey.preset_costs: a line for each preset, and for each further figure that there is of it."""
    heads = ["tower", "parameters (M)", "pixels", "tokens", "GMACs", "norms etc.", "published", "deviation", "source"]
    lines = []
    for row in result["towers"]:
        for figure in row["published"] or [None]:
            cells = _cost_cells(row)
            if figure is None:
                lines.append([*cells, "-", "-", ""])
                continue
            if figure["part"] is not None:
                cells[0] += f", {figure['part']}"
                cells[4] = number(figure["counted"], ".3f")
            source = figure["source"] + (f"; why: {figure['reason']}" if figure["reason"] else "")
            lines.append([*cells, f"{figure['gmacs']:g}", f"{100 * figure['deviation']:+.1f} %", source])
    return f"{table(heads, lines)}\n{COUNTED}\n{result['versions']}\n"


def number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Text in the first column and in one called "source", numbers in the others."""
    align = ["---" if i == 0 or head == "source" else "---:" for i, head in enumerate(heads)]
    cells = [heads, align, *([cell.replace("|", r"\|") for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"
