"""Answers measured, round after round with all cases in turn: to the first token, tokens a second, memory; and the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch
import transformers
from tqdm import tqdm

from llava_drip.cli import one_line
from llava_drip.machine import described, load, where
from llava_drip.measure.memory import rise_in_fresh_process
from llava_drip.measure.speed import interleave
from llava_drip.serving_cost.answers import DENSE, STOCK, Answered, Case, Plan, make_cases, two_answers
from llava_drip.training.meters import peak_memory_gib, reset_peak_memory


def survey(plan: Plan, rounds: int, warmup: int = 1, memory: bool = True) -> dict:
    """Measures a plan's cases; each round gives all the same request, which nobody has had before.

    Args:
        rounds: counted ones, at least 1, after `warmup`. Which case is first turns.
        memory: peak memory too: on a CPU in a process of its own for each case, which is also how one that does not fit is left
            out and the others go on.
    Returns:
        {"machine", "versions", "date", "where", "plan", "rounds", "parameters": {"language_model", "vision_tower"}, "same_ids":
        how many first tokens of an answer by `generate` are the same from transformers' LLaVA and ours with a dense tower,
        "cases": [{"label", "visual_tokens", "prompt_tokens", "first_ms", "tokens_per_second", "first_ratio": of the dense case's
        time to its own, "speed_ratio": of its tokens a second to the dense case's, each {"median", "low", "high"} over rounds,
        "peak_gib", "error", "rounds": [Answered]}]}
    """
    before, on_cuda = load(), torch.device(plan.device).type == "cuda"
    peaks, errors = _peaks(plan) if memory and not on_cuda else ({}, {})
    cases = {case.label: case for case in make_cases(plan, [label for label in plan.labels if label not in errors])}
    same = None
    if {STOCK, DENSE} <= set(cases):
        ids = [cases[label].ids(0) for label in (STOCK, DENSE)]
        same = next((place for place, (one, other) in enumerate(zip(*ids)) if one != other), len(ids[0]))
    answered = _answers(cases, rounds, warmup, plan.device, errors)
    if memory and on_cuda:
        peaks = {
            label: _peak_on_cuda(case, rounds + warmup + 1) for label, case in cases.items() if label not in errors
        }
    found = where([plan.device])
    found["versions"] = f"{found['versions']}, transformers {transformers.__version__}"
    parameters = {}
    for case in cases.values():
        if hasattr(case.model, "multi_modal_projector"):
            for name in ("language_model", "vision_tower"):
                parameters[name] = sum(p.numel() for p in getattr(case.model, name).parameters())
    return {
        **found,
        "where": described(found, (before, load())),
        "plan": asdict(plan),
        "rounds": rounds,
        "parameters": parameters,
        "same_ids": same,
        "cases": [
            _summary(label, answered.get(label, []), answered.get(DENSE, []), peaks.get(label), errors.get(label))
            for label in plan.labels
        ],
    }


def _answers(
    cases: dict[str, Case], rounds: int, warmup: int, device: str, errors: dict[str, str]
) -> dict[str, list[Answered]]:
    """Of each case that did not fail, in the counted rounds."""
    got: dict[str, list[Answered]] = {label: [] for label in cases}

    def answer(label: str) -> None:
        got[label].append(cases[label].answer(len(got[label]) + 1))

    interleave({label: partial(answer, label) for label in cases}, rounds, warmup, device, "answers", errors)
    return {label: ones[warmup:] for label, ones in got.items() if label not in errors}


def _peaks(plan: Plan) -> tuple[dict[str, float], dict[str, str]]:
    """GiB of a process that has the case alone; and what those failed with that did not fit."""
    peaks, errors = {}, {}
    for label in tqdm(plan.labels, desc="memory", unit=" cases", leave=False, disable=None):
        try:
            peaks[label] = rise_in_fresh_process(partial(two_answers, plan, label), label)
        except RuntimeError as error:
            errors[label] = one_line(error).removeprefix(f"{label}: ")
    return peaks, errors


def _peak_on_cuda(case: Case, number: int) -> float:
    """GiB that torch counts during an answer; of what lay there before only the case's own weights."""
    own = {value.data_ptr(): value.nbytes for value in [*case.model.parameters(), *case.model.buffers()]}
    others = torch.cuda.memory_allocated() - sum(own.values())
    reset_peak_memory()
    case.answer(number)
    return peak_memory_gib() - others / 2**30


def _summary(
    label: str, answered: Sequence[Answered], dense: Sequence[Answered], peak: float | None, error: str | None
) -> dict:
    pairs = list(zip(answered, dense)) if len(answered) == len(dense) else []
    return {
        "label": label,
        "visual_tokens": statistics.fmean(one.visual for one in answered) if answered else None,
        "prompt_tokens": statistics.fmean(one.prompt for one in answered) if answered else None,
        "first_ms": _spread([1000 * one.first for one in answered]),
        "tokens_per_second": _spread([one.tokens_per_second for one in answered]),
        "first_ratio": _spread([other.first / one.first for one, other in pairs]),
        "speed_ratio": _spread([one.tokens_per_second / other.tokens_per_second for one, other in pairs]),
        "peak_gib": peak,
        "error": error,
        "rounds": [asdict(one) for one in answered],
    }


def _spread(values: Sequence[float]) -> dict | None:
    """{"median", "low", "high"}; None of nothing."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)} if values else None


def table(result: dict) -> str:
    """A survey as text: where, and a row for each case."""
    plan, parameters = result["plan"], result["parameters"]
    layers = f", {plan['layers']} layers" if plan["layers"] else ""
    about = [
        f"{plan['language_model']}{layers}, "
        f"{parameters.get('language_model', 0) / 1e6:.0f}M parameters, behind a ViT-{plan['tower']} of "
        f"{parameters.get('vision_tower', 0) / 1e6:.0f}M at {plan['image_size']} px, patches of {plan['patch_size']}; random "
        f"weights, {plan['dtype']}; {plan['new_tokens']} tokens an answer, one request at a time, median of {result['rounds']} "
        "rounds and range.",
        result["where"],
    ]
    if result["same_ids"] is not None:
        about.append(
            f"By generate, transformers' LLaVA and ours with a dense tower and the same weights write the same "
            f"{result['same_ids']} of {plan['new_tokens']} first tokens."
        )
    lines = [
        "| | visual tokens | first token (ms) | x sooner than dense | tokens/s after it | x dense | peak memory (GiB) |",
        "| --- | ---: | --- | --- | --- | --- | ---: |",
    ]
    for case in result["cases"]:
        if case["error"]:
            lines.append(f"| {case['label']} | {case['error']} | | | | | |")
            continue
        peak = "" if case["peak_gib"] is None else f"{case['peak_gib']:.2f}"
        first, speed = _text(case["first_ms"], 0), _text(case["tokens_per_second"], 2)
        sooner, faster = _text(case["first_ratio"], 2), _text(case["speed_ratio"], 2)
        lines.append(
            f"| {case['label']} | {case['visual_tokens']:.0f} | {first} | {sooner} | {speed} | {faster} | {peak} |"
        )
    return "\n".join([*about, "", *lines, ""])


def _text(spread: dict | None, digits: int) -> str:
    if spread is None:
        return ""
    return f"{spread['median']:.{digits}f} ({spread['low']:.{digits}f} .. {spread['high']:.{digits}f})"
