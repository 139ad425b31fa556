"""What a run of clients against an API comes to: throughput, times to the first token, lost and different answers, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_drip.serving_cost.clients import Got
from llava_drip.serving_cost.server import Sample
from llava_drip.serving_cost.workload import KINDS, Ask

SHOWN = 5  # errors, and differing answers
COUNTED = ("prefilled_tokens", "cached_tokens", "decoded_tokens", "steps", "parked", "refused", "failed")


@dataclass(frozen=True)
class Phase:
    """Requests by `clients` at once, between two perf_counters; answers that came later are checked, and not counted as speed.

    counts: what the server's own counts grew by. client_cpu: seconds of this process.
    """

    name: str
    clients: int
    began: float
    ended: float
    got: list[Got]
    counts: dict[str, float]
    client_cpu: float = 0.0


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """{"p50", "p95", "p99"} in milliseconds; None of nothing."""
    if not len(seconds):
        return None
    return {f"p{q}": round(1000 * float(np.percentile(seconds, q)), 2) for q in (50, 95, 99)}


def phase_summary(phase: Phase, asks: Sequence[Ask], alone: dict[int, str]) -> dict:
    """alone: the answer of each number of the pool, as the server gave it with nothing else to do.

    Returns:
        {"name", "clients", "seconds", "requests": answered, "requests_per_second", "tokens_per_second": written ones, "first_ms",
        "total_ms": percentiles, "visual_tokens": of a picture, "refused": 429s, "lost", "errors": how many, "error_examples",
        "compared", "same": as alone, "different": examples, "right": {kind: {"asked", "right", "right_alone"}}, "cpu_ms",
        "client_cpu_ms": of the server and of its clients for a request, "counts"}
    """
    answered, seconds = [got for got in phase.got if got.answered], phase.ended - phase.began
    in_time = [got for got in answered if got.ended <= phase.ended]
    errors = [got.error for got in phase.got if got.error is not None]
    compared = [got for got in answered if got.number in alone]
    other = [got for got in compared if got.text != alone[got.number]]
    right = {}
    for kind in KINDS:
        mine = [got for got in compared if asks[got.number].kind == kind and asks[got.number].truth is not None]
        if mine:
            judged = {"right": lambda got: got.text, "right_alone": lambda got: alone[got.number]}
            right[kind] = {"asked": len(mine)} | {
                name: sum(asks[got.number].is_right(text(got)) for got in mine) for name, text in judged.items()
            }
    pictures = [got.visual for got in answered if got.visual]
    return {
        "name": phase.name,
        "clients": phase.clients,
        "seconds": round(seconds, 2),
        "requests": len(answered),
        "requests_per_second": round(len(in_time) / seconds, 2),
        "tokens_per_second": round(sum(got.tokens for got in in_time) / seconds, 2),
        "first_ms": percentiles([got.first - got.sent for got in answered if got.first is not None]),
        "total_ms": percentiles([got.ended - got.sent for got in answered]),
        "visual_tokens": round(float(np.mean(pictures)), 2) if pictures else None,
        "refused": sum(got.refused for got in phase.got),
        "lost": sum(got.error is None and not got.answered for got in phase.got),
        "errors": len(errors),
        "error_examples": list(dict.fromkeys(errors))[:SHOWN],
        "compared": len(compared),
        "same": len(compared) - len(other),
        "different": [{"number": g.number, "alone": alone[g.number], "here": g.text} for g in other[:SHOWN]],
        "right": right,
        "client_cpu_ms": round(1000 * phase.client_cpu / max(1, len(answered)), 2),
        "cpu_ms": round(1000 * phase.counts.get("process_cpu_seconds_total", 0.0) / max(1, len(answered)), 2),
        "counts": {name: phase.counts.get(f"llava_drip_engine_{name}", 0.0) for name in COUNTED},
    }


def memory_summary(samples: Sequence[Sample], began: float, ended: float) -> dict | None:
    """Resident memory between two perf_counters; None of fewer than two samples.

    Returns:
        {"median_mib", "least_mib", "most_mib", "deviation": largest from the median, as a share of it, "mib_per_minute": slope
        of a least-squares line, "samples"}
    """
    mine = [sample for sample in samples if began <= sample.at <= ended]
    if len(mine) < 2:
        return None
    at, mib = np.array([[sample.at - began, sample.resident / 2**20] for sample in mine]).T
    median = float(np.median(mib))
    return {
        "median_mib": round(median, 2),
        "least_mib": round(float(mib.min()), 2),
        "most_mib": round(float(mib.max()), 2),
        "deviation": round(float(np.abs(mib - median).max()) / median, 5),
        "mib_per_minute": round(60 * float(np.polyfit(at, mib, 1)[0]), 3),
        "samples": len(mine),
    }


def busy(samples: Sequence[Sample], began: float, ended: float) -> dict[str, float] | None:
    """{"running", "waiting"}: requests in the server's scheduler, mean over samples; None of no sample."""
    mine = [(sample.running, sample.waiting) for sample in samples if began <= sample.at <= ended]
    return dict(zip(("running", "waiting"), np.mean(mine, 0).round(2).tolist())) if mine else None


def over_time(phases: Sequence[Phase], samples: Sequence[Sample], pieces: int = 60) -> dict:
    """For a plot: {"phases": [{"name", "clients", "from", "to"}], "seconds": ends of pieces, "tokens_per_second", "first_p50_ms",
    "first_p95_ms": in each piece, None where there is nothing, "memory": [[second, MiB]]}; seconds from the first phase on."""
    start, end = phases[0].began, phases[-1].ended
    edges = np.linspace(start, end, pieces + 1)
    got = [got for phase in phases for got in phase.got if got.answered]
    where = np.clip(np.searchsorted(edges, [one.ended for one in got]) - 1, 0, pieces - 1)
    firsts, tokens = [[] for _ in range(pieces)], np.zeros(pieces)
    for place, one in zip(where, got):
        if one.ended <= end:
            tokens[place] += one.tokens
            firsts[place] += [] if one.first is None else [one.first - one.sent]
    found = [percentiles(piece) for piece in firsts]
    return {
        "phases": [
            {"name": p.name, "clients": p.clients, "from": round(p.began - start, 2), "to": round(p.ended - start, 2)}
            for p in phases
        ],
        "seconds": [round(float(edge - start), 2) for edge in edges[1:]],
        "tokens_per_second": [round(float(value), 2) for value in tokens / ((end - start) / pieces)],
        "first_p50_ms": [None if one is None else one["p50"] for one in found],
        "first_p95_ms": [None if one is None else one["p95"] for one in found],
        "memory": [
            [round(one.at - start, 2), round(one.resident / 2**20, 2)] for one in samples if start <= one.at <= end
        ],
    }


def ratios(before: dict, load: dict, after: dict) -> dict:
    """Of the load to the mean of what went before and after, and to each: {"requests": {"mean", "before", "after"}, "tokens",
    "requests by CPU seconds": of the server's, which count where others use the machine too}."""

    def speeds(phase: dict) -> dict[str, float]:
        by_cpu = 1000 / phase["cpu_ms"] if phase["cpu_ms"] else 0.0
        names = {name: phase[f"{name}_per_second"] for name in ("requests", "tokens")}
        return names | {"requests by CPU seconds": by_cpu}

    first, loaded, last = map(speeds, (before, load, after))
    found = {}
    for name, speed in loaded.items():
        against = {"mean": (first[name] + last[name]) / 2, "before": first[name], "after": last[name]}
        found[name] = {which: round(speed / value, 3) if value else None for which, value in against.items()}
    return found


def table(result: dict) -> str:
    """The record of scripts/load_api.py as text: where, phases, what is compared, memory."""
    lines = [
        result["where"],
        "",
        "| phase | clients | s | requests | requests/s | tokens/s | CPU (ms) a request, server + clients "
        "| first token p50, p95, p99 (ms) | whole answer (ms) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for phase in result["phases"]:
        first, total = (_three(phase[name]) for name in ("first_ms", "total_ms"))
        lines.append(
            f"| {phase['name']} | {phase['clients']} | {phase['seconds']:.0f} | {phase['requests']} | "
            f"{phase['requests_per_second']:.1f} | {phase['tokens_per_second']:.1f} | {phase['cpu_ms']:.1f} + "
            f"{phase['client_cpu_ms']:.1f} | {first} | {total} |"
        )
    lines += [
        "",
        "| phase | 429s | lost | errors | as alone | right | of the same alone | steps | tokens read / cached / written |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- | ---: | ---: |",
    ]
    for phase in result["phases"]:
        counts, right = phase["counts"], phase["right"].items()
        here, alone = (
            ", ".join(f"{kind} {one[name]} of {one['asked']}" for kind, one in right)
            for name in ("right", "right_alone")
        )
        lines.append(
            f"| {phase['name']} | {phase['refused']} | {phase['lost']} | {phase['errors']} | {phase['same']} of "
            f"{phase['compared']} | {here} | {alone} | {counts['steps']:.0f} | {counts['prefilled_tokens']:.0f} / "
            f"{counts['cached_tokens']:.0f} / {counts['decoded_tokens']:.0f} |"
        )
    lines.append("")
    for name, found in result["ratios"].items():
        lines.append(
            f"{name[0].upper()}{name[1:]}, {result['clients']} clients against one: {found['mean']}x (the one before "
            f"{found['before']}x, the one after {found['after']}x)."
        )
    if (memory := result["memory"]) is not None:
        lines.append(
            f"Memory of the server under load, after {result['settle']:.0f} s: {memory['median_mib']:.1f} MiB "
            f"({memory['least_mib']:.1f} .. {memory['most_mib']:.1f}), at most {100 * memory['deviation']:.2f} % from it, "
            f"{memory['mib_per_minute']:+.2f} MiB a minute, {memory['samples']} samples."
        )
    if (work := result["busy"]) is not None:
        lines.append(
            f"In its scheduler under load: {work['running']:.1f} requests at work and {work['waiting']:.1f} in the queue."
        )
    for phase in result["phases"]:
        for one in phase["different"]:
            lines.append(
                f"Different ({phase['name']}, request {one['number']}): {one['here']!r}, alone {one['alone']!r}."
            )
        lines += [f"Error ({phase['name']}): {error}" for error in phase["error_examples"]]
    return "\n".join([*lines, ""])


def _three(found: dict | None) -> str:
    return "" if found is None else ", ".join(f"{value:.0f}" for value in found.values())
