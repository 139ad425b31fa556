"""A stage measured: seconds of steps, where they go, what they hold, peak memory, losses packed and padded; as plain records."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
import transformers
from tqdm import tqdm

from llava_drip.assistant.modeling import LlavaDripForConditionalGeneration
from llava_drip.cli import one_line
from llava_drip.instruct.data import Collator
from llava_drip.instruct.freeze import PARTS as PARAMETER_PARTS
from llava_drip.instruct.stage_cost.clock import PARTS
from llava_drip.instruct.stage_cost.losses import sample_losses
from llava_drip.instruct.stage_cost.parts import Budgets, NoiseRows, fitted, make_assistant
from llava_drip.instruct.stage_cost.plan import Case, Plan, Step
from llava_drip.instruct.stage_cost.steps import Made, make_steps
from llava_drip.machine import load, where
from llava_drip.measure.memory import rise_in_fresh_process


def survey(plans: Sequence[Plan], after_each: Callable[[dict], None] = lambda result: None) -> dict:
    """Measures stages, one after another.

    Args:
        plans: one a stage, on one device.
        after_each: called with what there is so far when a stage has been measured.
    Returns:
        {"machine", "versions", "date", "load": (before, after), "stages": [what measure_stage gives]}
    Raises:
        ValueError: a plan that cannot be carried out.
    """
    before, stages = load(), []
    for plan in plans:
        stages.append(measure_stage(plan))
        found = where([plan.device])
        found["versions"] = f"{found['versions']}, transformers {transformers.__version__}"
        result = {**found, "load": (before, load()), "stages": stages}
        after_each(result)
    return result


def measure_stage(plan: Plan) -> dict:
    """{"stage", "plan": flags, without samples, "samples": mean "text", "learned" and "images" of those measured, "parameters" of
    the three parts, "patches" of an image, "cases": [what _summary gives], "loss": [{"compression", "samples", "mean",
    "largest_difference": of a sample's loss packed and padded}]}."""
    model = make_assistant(plan)
    plan = fitted(plan, model)
    patches, errors, peaks = model.vision_tower.patch_embed.num_patches, {}, {}
    made = make_steps(plan, model, plan.steps(_that_fit(plan, patches, errors, peaks), patches), errors)
    counted = {case: [one for one in made if one.step.case == case and not one.step.warm] for case in plan.cases}
    if plan.device != "cpu":
        peaks = {case: max(one.peak_gib for one in ones) for case, ones in counted.items() if ones}
    pool = [plan.samples[i] for i in plan.pool]
    means = {name: statistics.fmean(getattr(one, name) for one in pool) for name in ("text", "learned", "images")}
    parameters = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in PARAMETER_PARTS}
    result = {
        "stage": plan.stage,
        "plan": {name: value for name, value in asdict(plan).items() if name != "samples"},
        "samples": means,
        "parameters": parameters,
        "patches": patches,
        "cases": [_summary(case, counted, peaks.get(case), errors.get(case)) for case in plan.cases],
        "loss": _losses(plan, model, errors),
    }
    del model
    gc.collect()  # hooks hold it in circles, and the next stage makes its own
    if plan.device != "cpu":
        torch.cuda.empty_cache()
    return result


def _that_fit(plan: Plan, patches: int, errors: dict[Case, str], peaks: dict[Case, float]) -> list[Case]:
    """The cases that can be run here. On a CPU the system ends a process that takes too much: so each is tried in one of its own,
    which tells its peak memory too."""
    if plan.device != "cpu" or not plan.memory:
        return plan.cases
    for case in tqdm(plan.cases, desc=f"{plan.stage}: memory", unit=" cases", leave=False, disable=None):
        try:
            peaks[case] = rise_in_fresh_process(partial(_largest_batch_twice, plan, case, patches), case.label)
        except RuntimeError as error:
            errors[case] = one_line(error).removeprefix(f"{case.label}: ")
    return [case for case in plan.cases if case in peaks]


def _largest_batch_twice(plan: Plan, case: Case, patches: int) -> Callable[[], float]:
    model = make_assistant(plan)

    def positions(batch: tuple[int, ...]) -> float:
        each = [plan.samples[i].text + plan.samples[i].images * patches / case.compression for i in batch]
        return sum(each) if case.arrangement == "packed" else len(each) * max(each)

    batch = max(plan.batches(case, patches), key=positions)

    def run() -> float:
        errors: dict[Case, str] = {}
        made = make_steps(plan, model, [Step(case, batch)] * 2, errors, progress=False)
        if errors:
            raise RuntimeError(errors[case])
        return max(one.peak_gib for one in made)

    return run


def _summary(case: Case, counted: dict[Case, list[Made]], peak: float | None, error: str | None) -> dict:
    """What a case's steps took; figures are None where it failed.

    {"label", "compression", "arrangement", "tokens": of an image, "positions": of a sample in the language model,
    "non_padding": share of all positions, "seconds", "q1", "q3": of a step, median and quartiles, "samples_per_second",
    "tokens_per_second": over all steps, "faster": than the first compression in this arrangement, "faster_than_padded": both
    {"ratio", "q1", "q3"} or None, "shares": of the time, by part, "peak_memory_gib", "error"}
    """
    result = {"label": case.label, "compression": case.compression, "arrangement": case.arrangement}
    result |= {"peak_memory_gib": peak, "error": error}
    own, first = counted[case], next(each for each in counted if each.arrangement == case.arrangement)
    padded = Case(case.compression, "padded")
    names = ("tokens", "positions", "non_padding", "seconds", "q1", "q3", "samples_per_second", "tokens_per_second")
    if not own or error:
        return {**result, **dict.fromkeys((*names, "faster", "faster_than_padded", "shares"))}
    seconds, samples = [one.seconds for one in own], sum(len(one.step.samples) for one in own)
    total, positions, images = sum(seconds), sum(one.positions for one in own), sum(one.images for one in own)
    q1, median, q3 = _quartiles(seconds)
    figures = (
        sum(one.visual for one in own) / images if images else None,
        positions / samples,
        positions / sum(one.slots for one in own),
        *(median, q1, q3),
        *(samples / total, positions / total),
    )
    return {
        **result,
        **dict(zip(names, figures, strict=True)),
        "faster": _faster(own, counted[first]),
        "faster_than_padded": _faster(own, counted.get(padded, [])),
        "shares": {
            part: sum(one.parts[part] for one in own) / sum(sum(one.parts.values()) for one in own) for part in PARTS
        },
    }


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (values[0],) * 3


def _faster(own: Sequence[Made], base: Sequence[Made]) -> dict | None:
    """How many times as fast: median and quartiles over rounds where these had the same samples in each, else by all seconds."""
    if not base:
        return None
    if [one.step.samples for one in own] == [one.step.samples for one in base]:
        q1, median, q3 = _quartiles([theirs.seconds / mine.seconds for mine, theirs in zip(own, base, strict=True)])
        return {"ratio": median, "q1": q1, "q3": q3}
    return {"ratio": sum(one.seconds for one in base) / sum(one.seconds for one in own), "q1": None, "q3": None}


def _losses(plan: Plan, model: LlavaDripForConditionalGeneration, errors: dict[Case, str]) -> list[dict]:
    """Of the first round's batch, at each compression that ran both packed and padded."""
    budgets, result = Budgets(plan, model), []
    for compression in plan.compressions:
        cases = {Case(compression, how) for how in ("packed", "padded")}
        if not cases <= set(plan.cases) - set(errors):
            continue
        samples = plan.batches(Case(compression, "padded"), 0)[0]
        rows = NoiseRows(plan.samples, model, samples)
        batch = {name: value.to(plan.device) for name, value in Collator(0)(list(rows)).items()}
        budgets.ask(compression, samples)
        packed, padded = (sample_losses(model, batch, packed=how) for how in (True, False))
        difference = float((packed - padded).abs().max())
        result.append(
            {
                "compression": compression,
                "samples": len(samples),
                "mean": float(padded.mean()),
                "largest_difference": difference,
            }
        )
    return result
