"""--dry_run: what a stage would train on and what it would take, on the real data and model; no step, no file."""

from __future__ import annotations

import math
import sys

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.assistant.processing import IMAGE_TOKEN
from llava_drip.instruct.arguments import StageArguments
from llava_drip.instruct.data import ConversationDataset, images_of
from llava_drip.instruct.elastic import ElasticBudget
from llava_drip.instruct.memory import (
    LEFT_OUT,
    activation_bytes,
    devices_memory,
    gpu_total,
    parameter_bytes,
    setting_of,
)
from llava_drip.instruct.rows import ReadableRows
from llava_drip.instruct.zero import gathered
from llava_drip.towers.contract import evaluating

_SAMPLE = 64  # rows of which the length is looked at
_RANKS = (1, 4, 8, 16)  # of ZeRO, beside the run's own
LEARNED = ("[[", "]]")


def dry_run(model: nn.Module, rows: ReadableRows, args: StageArguments, elastic: ElasticBudget | None) -> None:
    """Print the first rows as they are trained on, the run's steps, and the memory it would take. All ranks call it; the first
    prints.

    model: with parts frozen, cast and packed as the training would have them. args: dry_run, the number of rows.
    """
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    first = args.process_index == 0
    dataset, counts = rows.conversations, []
    for i in range(min(args.dry_run, len(rows))):
        item = rows[i]
        budgets = _visual_tokens(model, item["pixel_values"], elastic)
        counts += [max(tokens.values()) for tokens in budgets]
        if first:
            if item["bad"] is not None:
                console.print(Text(str(item["bad"]), style="bold red"))
            for line in row_lines(dataset, item["row"], item, budgets):
                console.print(line)
    if not first:
        return
    most = dataset.image_tokens
    visual = sum(counts) / len(counts) if counts else most
    lengths, learned = [], 0
    for i in _spread(len(dataset)):
        ids, labels = dataset.encode(i)
        images = len(images_of(dataset.records[i]))
        lengths.append(len(ids) + images * (visual - 1))
        learned += sum(label != IGNORE_INDEX for label in labels)
    batch = args.per_device_train_batch_size
    mean, longest = sum(lengths) / len(lengths), max(lengths)
    positions = batch * (mean if model.packs_samples else longest)
    logits = batch * learned / len(lengths) if model.packs_samples else positions
    console.print(run_table(args, len(dataset), mean, longest))
    console.print(memory_table(model, args, positions, logits))
    console.print(f"Left out: {LEFT_OUT}.")
    console.print("Dry run: no step was made and nothing was written.")


def _spread(rows: int) -> list[int]:
    """At most _SAMPLE rows, evenly over the file."""
    step = max(1, rows // _SAMPLE)
    return list(range(0, rows, step))[:_SAMPLE]


@torch.no_grad()
def _visual_tokens(
    model: nn.Module, pixels: torch.Tensor | None, elastic: ElasticBudget | None
) -> list[dict[str, int]]:
    """For each picture {"": tokens}, or, with budgets that are drawn, {" at 1x": most, " at 10x": least}."""
    if pixels is None:
        return []
    budgets = {"": None} if elastic is None else {f" at {value:g}x": value for value in (elastic.low, elastic.high)}
    found = [{} for _ in pixels]
    with gathered(model.vision_tower.parameters()), evaluating(model.vision_tower):
        parameter = next(model.vision_tower.parameters())
        for words, budget in budgets.items():
            if budget is not None:
                model.set_compression(budget)
            layer = model.config.vision_feature_layer
            tokens = model.vision_tower.forward_features(pixels.to(parameter.device, parameter.dtype), layer=layer)
            for picture, length in zip(found, tokens.lengths.tolist()):
                picture[words] = length
    if elastic is not None:
        model.set_compression(None)
    return found


def row_lines(dataset: ConversationDataset, i: int, item: dict, budgets: list[dict[str, int]]) -> list[Text]:
    """A row as the model gets it: what it is, and its tokens, those that are learned from between [[ and ]]."""
    ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
    learned = sum(label != IGNORE_INDEX for label in labels)
    positions = len(ids) + sum(max(tokens.values()) - 1 for tokens in budgets)
    limit = "" if dataset.max_length is None else f" of at most {dataset.max_length}"
    pictures = "".join(
        f"; {name}: {', '.join(f'{count} visual tokens{words}' for words, count in tokens.items())}"
        for name, tokens in zip(images_of(dataset.records[i]), budgets)
    )
    head = f"{dataset.name_of(i)}: {len(ids)} tokens, {learned} learned{pictures}; {positions} positions{limit}"
    if learned == 0:
        head += "; NOTHING IS LEARNED FROM IT"
    pieces = dataset.processor.tokenizer.convert_ids_to_tokens(ids)
    text, inside = Text(), False
    for piece, label in zip(pieces, labels):
        if (label != IGNORE_INDEX) != inside:
            inside = not inside
            text.append(f"{LEARNED[0] if inside else LEARNED[1]} ", style="bold green")
        text.append(f"{piece} ", style="green" if inside else "magenta" if piece == IMAGE_TOKEN else "dim")
    if inside:
        text.append(LEARNED[1], style="bold green")
    return [Text(head, style="bold"), text, Text()]


def steps_of(args: StageArguments, rows: int) -> tuple[int, int]:
    """Optimizer steps of an epoch and of the run, as transformers' Trainer counts them."""
    share = args.per_device_train_batch_size * args.world_size
    batches = rows // share if args.dataloader_drop_last else math.ceil(rows / share)
    epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)


def run_table(args: StageArguments, rows: int, mean: float, longest: float) -> Table:
    epoch, steps = steps_of(args, rows)
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    batch = per_device * accumulation * args.world_size
    warmup = args.get_warmup_steps(steps)
    table = Table(title="Run", title_justify="left", show_header=False)
    for name, value in (
        ("rows", f"{rows:,}"),
        ("batch", f"{batch} = {per_device} a process x {accumulation} accumulated x {args.world_size} processes"),
        ("steps", f"{steps:,} = {steps / epoch:.3g} epochs of {epoch:,}"),
        ("warm-up", f"{warmup:,} steps to {args.learning_rate:g}, then {args.lr_scheduler_type.value}"),
        ("samples seen", f"{round(rows * steps / epoch):,}"),
        ("positions of a row", f"{mean:.0f} on average, {longest:.0f} at most, of {min(rows, _SAMPLE)} rows looked at"),
    ):
        table.add_row(name, value)
    return table


def memory_table(model: nn.Module, args: StageArguments, positions: float, logits: float) -> Table:
    """GiB for each GPU; one column for each number of processes where ZeRO divides something among them."""
    own = setting_of(args)
    columns = sorted({own.ranks, *_RANKS}) if own.zero else [own.ranks]
    parameters = list(model.parameters())
    language = model.language_model
    trained = any(p.requires_grad for p in language.parameters())
    found = {}
    for ranks in columns:
        setting = setting_of(args, ranks)
        kept = activation_bytes(model.config.text_config, positions, logits, setting, trained)
        found[ranks] = parameter_bytes(parameters, setting) | kept
    how = "without DeepSpeed" if own.zero is None else f"ZeRO-{own.zero}"
    table = Table(title=f"Memory for each GPU, GiB ({how}; an estimate)", title_justify="left")
    table.add_column("of")
    for ranks in columns:
        table.add_column(
            f"{ranks} process{'' if ranks == 1 else 'es'}{'*' if ranks == own.ranks else ''}", justify="right"
        )
    for what in found[own.ranks]:
        unknown = what.endswith("optimizer states") and own.states is None
        table.add_row(what, *("not known" if unknown else _gib(found[ranks][what]) for ranks in columns))
    table.add_section()
    table.add_row("all of the GPU", *(_gib(gpu_total(found[ranks])) for ranks in columns))
    own_gpu = devices_memory()
    has = "no GPU here" if own_gpu is None else f"a GPU here has {_gib(own_gpu)}"
    table.caption = f"*this run; {positions:.0f} positions in a batch of a process, logits of {logits:.0f}; {has}"
    table.caption_justify = "left"
    return table


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}" if count >= 2**30 / 10 else f"{count / 2**30:.4f}"
