"""A survey of the stages as Markdown."""

from __future__ import annotations

from llava_drip.instruct.stage_cost.clock import PARTS
from llava_drip.machine import described
from llava_drip.measure.survey_table import number, table

STAGES = {
    "pretrain": "Stage 1, feature alignment: the projector is trained",
    "finetune": "Stage 2, instruction tuning: projector and language model are trained",
}


def markdown(result: dict) -> str:
    """Of survey.survey: a table for each stage, what the figures mean, where and when."""
    parts = [_stage(stage) for stage in result["stages"]]
    rounds, warmup = (result["stages"][0]["plan"][name] for name in ("rounds", "warmup"))
    parts.append(
        f"Step: median of {rounds} after {warmup} to warm up, quartiles in parentheses; forward, backward, clipping and\n"
        "optimizer of the Trainer that training uses, the batch ready in memory (decoding pictures is no part of it). All\n"
        'cases in turn within each round. "Against": how many times as fast, median over rounds of the same samples, and\n'
        "quartiles; without quartiles by all seconds, since grouped batches hold the same samples, but not round by round.\n"
        "Samples/s and tokens/s: over all steps. Positions: of a sample in the language model, visual tokens among them;\n"
        "non-padding: their share. Grouped: padded batches of samples of like length. Memory: on a CPU what a process of its\n"
        "own rises to over its libraries in steps of the largest batch, on a GPU torch.cuda.max_memory_allocated. The\n"
        "last four columns: shares of the step's time. Weights, pictures and text are random; lengths are those given.\n"
    )
    parts.append(f"{described(result, result['load'])}\n")
    return "\n".join(parts)


def _stage(stage: dict) -> str:
    plan, samples, sizes = stage["plan"], stage["samples"], stage["parameters"]
    layers = "" if plan["layers"] is None else f" cut to {plan['layers']} layers"
    lines = [
        f"### {STAGES[stage['stage']]}\n",
        f"{plan['vision_tower']} ({sizes['vision_tower'] / 1e6:.0f} M parameters, {stage['patches']} patches), "
        f"{plan['mm_projector_type']} ({sizes['multi_modal_projector'] / 1e6:.1f} M), {plan['language_model']}{layers} "
        f"({sizes['language_model'] / 1e6:.0f} M). {plan['device']}, {plan['dtype']}, batch {plan['batch_size']}"
        + (", gradient checkpointing" if plan["gradient_checkpointing"] else "")
        + (f", {plan['optim']}" if plan["optim"] else "")
        + f". A sample has {samples['text']:.0f} text tokens on average, {samples['learned']:.0f} of them learned, and "
        f"{samples['images']:.2f} pictures.\n",
        _cases(stage),
    ]
    for case in stage["cases"]:
        if case["error"]:
            lines.append(f"{case['label']}: {case['error']}\n")
    for loss in stage["loss"]:
        lines.append(
            f"Loss of each of {loss['samples']} samples at {loss['compression']:g}x, packed and padded: largest difference "
            f"{loss['largest_difference']:.1e}, of {loss['mean']:.3f} on average.\n"
        )
    return "\n".join(lines)


def _cases(stage: dict) -> str:
    compared = len({case["compression"] for case in stage["cases"]}) > 1
    arranged = any(case["faster_than_padded"] and case["arrangement"] != "padded" for case in stage["cases"])
    first = f"against {stage['cases'][0]['compression']:g}x"
    heads = ["compression", "tokens", "positions", "non-padding", "step (s)", "samples/s", "tokens/s"]
    heads += [first] * compared + ["against padded"] * arranged
    heads += ["memory (GiB)", *PARTS]
    lines = []
    for case in stage["cases"]:
        failed = case["seconds"] is None
        cells = [case["label"], number(case["tokens"], ".1f"), number(case["positions"], ".0f")]
        cells.append("-" if failed else f"{100 * case['non_padding']:.1f} %")
        cells.append("failed" if failed else f"{case['seconds']:.2f} ({case['q1']:.2f} .. {case['q3']:.2f})")
        cells += [number(case["samples_per_second"], ".3g"), number(case["tokens_per_second"], ".0f")]
        cells += [_ratio(case["faster"])] * compared + [_ratio(case["faster_than_padded"])] * arranged
        cells.append(number(case["peak_memory_gib"], ".2f"))
        cells += ["-" if failed else f"{100 * case['shares'][part]:.0f} %" for part in PARTS]
        lines.append(cells)
    return table(heads, lines)


def _ratio(found: dict | None) -> str:
    if found is None:
        return "-"
    spread = "" if found["q1"] is None else f" ({found['q1']:.2f} .. {found['q3']:.2f})"
    return f"{found['ratio']:.2f}x{spread}"
