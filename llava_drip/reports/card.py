"""The model card: README.md with the Hub's metadata in front, filled from what the run recorded. Nothing in it is invented."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llava_drip.reports.bundle import ASSISTANT, CLIP, TOWER, Bundle, word_without_local_paths
from llava_drip.reports.run import SHARES, TITLES, Run, number
from llava_drip.reports.table import TOKENS, format_compression, format_metric, tower_gmacs

CARD_FILE = "README.md"
_LIBRARY = {TOWER: "timm", CLIP: "open_clip", ASSISTANT: "transformers"}
_TAGS = {
    TOWER: ["drip", "vision-transformer", "token-reduction", "image-feature-extraction"],
    CLIP: ["drip", "clip", "token-reduction"],
    ASSISTANT: ["drip", "llava", "multimodal", "token-reduction"],
}
_PIPELINE = {TOWER: "image-classification", CLIP: "zero-shot-image-classification", ASSISTANT: "image-text-to-text"}
_LOAD = {
    TOWER: """
import timm, llava_drip
model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
""",
    CLIP: """
import open_clip, llava_drip
model, _, transform = open_clip.create_model_and_transforms("hf-hub:{repo}")
tokenizer = open_clip.get_tokenizer("hf-hub:{repo}")
""",
    ASSISTANT: """
import llava_drip
from transformers import AutoModelForImageTextToText, AutoProcessor
model, processor = AutoModelForImageTextToText.from_pretrained("{repo}"), AutoProcessor.from_pretrained("{repo}")
""",
}
_THEN = {
    TOWER: "`transform` makes pixels of a PIL image. `model(pixels)` gives {output}; `model.forward_features(pixels)` of a tower "
    "of llava_drip gives a TokenBatch: the tokens of all images packed, and `lengths`, how many each image got.",
    CLIP: "`model.encode_image(transform(image)[None])` and `model.encode_text(tokenizer(texts))` give features to compare by "
    "cosine.",
    ASSISTANT: "`processor` makes inputs of pictures and of text with `<image>` in it; `llava_drip.engine` streams answers.",
}
_INTRO = {
    TOWER: "A vision tower",
    CLIP: "A CLIP with a vision tower",
    ASSISTANT: "A multimodal assistant (LLaVA) with a vision tower",
}
_USE = {
    TOWER: "Research on vision transformers with fewer tokens; image features; classification among the classes of its training.",
    CLIP: "Research on contrastive image-text models with fewer visual tokens; zero-shot classification and retrieval, evaluated "
    "on the user's own data first.",
    ASSISTANT: "Research on multimodal assistants with fewer visual tokens.",
}
_LIMITS = {
    TOWER: "It has learned from the data named above and no other. The numbers are of one run.",
    CLIP: "It repeats what its image-text pairs associate, bias included. The numbers are of one run.",
    ASSISTANT: "It states wrong things with confidence, sees details that are not there, and repeats the bias of its language "
    "model and data. Not for decisions about people, health, law or safety.",
}


def write_card(folder: str | Path, bundle: Bundle, repo: str, licence: str, datasets: Sequence[str] = ()) -> Path:
    """Writes folder/README.md for a model that will be at `repo` on the Hub; a trainer may call it with its own output.

    Args:
        bundle: bundle.find_bundle of the run's folder or the model's directory.
        repo: "user/name".
        licence: identifier of the Hub ("apache-2.0", "cc-by-nc-4.0", "other", ...), of the weights.
        datasets: identifiers of data sets on the Hub, for its metadata.
    Raises:
        ValueError: the Hub's library refuses the metadata.
    """
    row = _row(bundle)
    data = ModelCardData(
        model_name=repo.split("/")[-1],
        license=licence,
        library_name=_LIBRARY[bundle.kind],
        pipeline_tag=_PIPELINE[bundle.kind] if bundle.kind != TOWER or _classes(bundle) else "image-feature-extraction",
        tags=list(_TAGS[bundle.kind]),
        datasets=list(datasets) or None,
        base_model=_base_model(bundle),
        eval_results=_results(bundle, row, datasets) or None,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(bundle, repo, licence, row)}")
    path = Path(folder) / CARD_FILE
    card.save(path)
    return path


def _results(bundle: Bundle, row: dict, datasets: Sequence[str]) -> list[EvalResult]:
    """The shares that these very weights reached: not those of a CLIP whose tower they are, nor, where they are averages, those
    of the weights that were averaged."""
    if bundle.run is None or _part_of_clip(bundle):
        return []
    names = [name for name in SHARES if number(row, name) is not None]
    if any(name.startswith("ema_") for name in names):
        names = [name for name in names if name.startswith("ema_")]
    results = []
    for name in names:
        data = _evaluated_on(bundle.run, name) or "unnamed data"
        if datasets and bundle.kind == TOWER:  # of one data set the training part and the part for evaluation
            data = datasets[0]
            kind = data
        else:
            kind = re.sub(r"[^\w.-]+", "-", data).strip("-") or "local"
        results.append(
            EvalResult(
                task_type=_PIPELINE[bundle.kind],
                dataset_type=kind,
                dataset_name=data,
                metric_type="recall" if "_R@" in name else "accuracy",
                metric_name=SHARES[name],
                metric_value=round(100 * row[name], 3),
            )
        )
    return results


def _evaluated_on(run: Run, metric: str) -> str | None:
    """A name for the data that a metric was measured on, from the run's flags; None where no flag names any."""
    flags = run.info.get("flags") or {}
    if "_R@" in metric:
        keys = ("retrieval_data",)
    elif metric.startswith("zero_shot"):
        keys = ("zeroshot_data", "imagenet_val")
    elif metric.startswith("imagenet"):
        keys = ("imagenet_val",)
    else:
        keys = ("val_data",)
    found = next((flags[key] for key in keys if isinstance(flags.get(key), str)), None)
    return None if found is None else word_without_local_paths(found)


def known_licence(bundle: Bundle) -> str | None:
    """The licence that a README.md beside the model, or in its run's folder, already names; None where none does."""
    folders = [bundle.directory, *([bundle.run.folder] if bundle.run else [])]
    for folder in folders:
        if (folder / CARD_FILE).is_file():
            named = ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True).data.to_dict().get("license")
            if isinstance(named, str):
                return named
    return None


def _text(bundle: Bundle, repo: str, licence: str, row: dict) -> str:
    load = _LOAD[bundle.kind].strip().format(repo=repo)
    then = _THEN[bundle.kind].format(output="logits" if _classes(bundle) else "pooled features, there is no classifier")
    reduces = " that cuts an image into segments and makes one token of each (DRIP)" if _pools(bundle) else ""
    of = ", the image tower of a CLIP" if _part_of_clip(bundle) else ""
    parts = [
        f"# {repo.split('/')[-1]}",
        f"{_INTRO[bundle.kind]}{reduces}: `{_architecture(bundle)}`, made with llava_drip{of}.",
        "## How to load\n\nWith llava_drip installed (`pip install` in a clone of its repository):",
        f"```python\n{load}\n```\n\n{then}",
        "## Numbers\n\n" + _numbers(bundle, row),
        "## How it was made\n\n" + _made(bundle.run),
        f"## Use and limits\n\n{_USE[bundle.kind]}\n\n{_LIMITS[bundle.kind]}",
        f"## Licence\n\nWeights: {licence}. The training data has licences of its own, which may restrict what may be done with "
        "models trained on it" + (", as may the language model's." if bundle.kind == ASSISTANT else "."),
    ]
    return "\n\n".join(parts) + "\n"


def _numbers(bundle: Bundle, row: dict) -> str:
    """Last and best epoch, as the run recorded them; the published one is marked."""
    run = bundle.run
    if run is None:
        return "No run's record lies beside these weights: nothing was measured that could be told here."
    metric = best_metric(run)
    last = run.epochs[-1]
    best = _best(run) or last
    columns = {f"last epoch ({last['epoch']})": last}
    if best is not last:
        columns[f"best epoch ({best['epoch']}, by {TITLES[metric]})"] = best
    if row not in columns.values():
        columns[f"epoch {row['epoch']}"] = row
    heads = [head + (", these weights" if of is row and len(columns) > 1 else "") for head, of in columns.items()]
    lines = [["", *heads], ["---", *["---:"] * len(heads)]]
    lines += [
        [TITLES[name], *(format_metric(name, number(of, name)) for of in columns.values())] for name in run.metrics()
    ]
    if any(number(of, "tokens") is not None for of in columns.values()):
        lines.append(["tokens of an image", *(_value(of, "tokens", ".1f") for of in columns.values())])
        lines.append(
            [
                "compression (p5 .. p95)",
                *(format_compression({k: number(of, k) for k in TOKENS}) for of in columns.values()),
            ]
        )
    gmacs = [tower_gmacs(run, number(of, "tokens")) for of in columns.values()]
    if None not in gmacs:
        lines.append(["GMACs of an image, at its mean tokens", *(f"{value:.3g}" for value in gmacs)])
    lines.append(["step (s, median)", *(_value(of, "step_seconds", ".3f") for of in columns.values())])
    lines.append(["images per second", *(_value(of, "images_per_second", ".1f") for of in columns.values())])
    lines.append(["peak memory (GiB)", *(_value(of, "peak_memory_gib", ".2f") for of in columns.values())])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    if any(name.startswith("ema_") for name in run.metrics()):
        table += "\n\nThe weights are the averaged ones."
    return f"Of the whole CLIP, whose image tower this is:\n\n{table}" if _part_of_clip(bundle) else table


def _made(run: Run | None) -> str:
    if run is None:
        return "The run that made these weights was not recorded with them."
    info = run.info
    command = [word_without_local_paths(str(word)) for word in info.get("command", [])]
    processes = info.get("ranks") or (info.get("flags") or {}).get("world_size") or 1
    if command and command[0].endswith(".py"):
        start = ["python"] if processes == 1 else ["torchrun", "--nproc_per_node", str(processes), "--"]
        command[:1] = [*start, f"scripts/{Path(command[0]).name}"]
    parts = [
        f"By `{info.get('program', 'an unnamed program')}`, started {info.get('started', 'at an unrecorded time')}"
        + (f", in {processes} processes, here as on one machine:" if processes > 1 else ":")
    ]
    parts.append(f"```sh\n{shlex.join(command)}\n```" if command else "(The command was not recorded.)")
    facts = {"Parameters": f"{info['parameters']:,}" if isinstance(info.get("parameters"), int) else None}
    facts["Data"] = _listing(info.get("data"))
    data = [_evaluated_on(run, name) for name in run.metrics() if name in SHARES]
    facts["Evaluated on"] = ", ".join(dict.fromkeys(filter(None, data)))
    facts["Epochs, steps"] = f"{run.epochs[-1]['epoch']}, {run.epochs[-1].get('step', '?')}"
    facts["Images of a step"] = info.get("step_batch")
    facts["Versions"], facts["Machine"] = _listing(info.get("versions")), _listing(info.get("machine"))
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items() if value))
    if isinstance(info.get("flags"), dict) and info["flags"]:
        flags = json.dumps(_cleaned(info["flags"]), indent=1, ensure_ascii=False)
        parts.append(f"<details><summary>All settings</summary>\n\n```json\n{flags}\n```\n\n</details>")
    return "\n\n".join(parts)


def _cleaned(value):
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(item) for item in value]
    return word_without_local_paths(value) if isinstance(value, str) else value


def _listing(value) -> str:
    """`{"torch": "2.15"}` → "torch 2.15"."""
    if not isinstance(value, dict):
        return "" if value is None else str(_cleaned(value))
    items = {key: item for key, item in _cleaned(value).items() if item is not None}
    items = {key: len(item) if isinstance(item, list) and len(item) > 5 else item for key, item in items.items()}
    return ", ".join(f"{key} {item if isinstance(item, str) else json.dumps(item)}" for key, item in items.items())


def _value(row: dict, name: str, form: str) -> str:
    value = number(row, name)
    return "-" if value is None else f"{value:{form}}"


def _row(bundle: Bundle) -> dict:
    """The epoch that the weights are of: the best for a directory best/, else the last; empty without a run."""
    if bundle.run is None:
        return {}
    return (_best(bundle.run) if bundle.directory.name == "best" else None) or bundle.run.epochs[-1]


def best_metric(run: Run) -> str | None:
    """By which a run's best/ is chosen: the top-1 of averaged weights where there are any, else the first of SHARES there is."""
    names = [name for name in run.metrics() if name in SHARES]
    return "ema_top1" if "ema_top1" in names else next(iter(names), None)


def _best(run: Run) -> dict | None:
    metric = best_metric(run)
    return run.row(metric, "best") if metric else None


def _architecture(bundle: Bundle) -> str:
    if bundle.kind == TOWER:
        return str(bundle.config["architecture"])
    if bundle.kind == CLIP:
        vision = bundle.config.get("model_cfg", {}).get("vision_cfg", {})
        name = bundle.run.model if bundle.run else vision.get("timm_model_name", "CLIP")
        return word_without_local_paths(str(name))
    text = bundle.config.get("text_config", {}).get("model_type", "language model")
    return f"{bundle.config.get('vision_config', {}).get('architecture', 'tower')} + {text}"


def _pools(bundle: Bundle) -> bool:
    if bundle.run is not None and (value := number(_row(bundle), "compression")) is not None:
        return value > 1
    return "drip" in json.dumps(bundle.config).lower() and "_1x" not in json.dumps(bundle.config)


def _part_of_clip(bundle: Bundle) -> bool:
    return bundle.kind == TOWER and bundle.run is not None and bundle.run.info.get("program") == "train_clip.py"


def _classes(bundle: Bundle) -> int:
    return int(bundle.config.get("num_classes") or 0)


def _base_model(bundle: Bundle) -> str | None:
    """The language model's name on the Hub, where the configuration names one; a local directory is none."""
    name = bundle.config.get("text_config", {}).get("_name_or_path", "") if bundle.kind == ASSISTANT else ""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None
