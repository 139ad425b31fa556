"""Do a tower's boundaries mean something? Small towers trained on scenes with known objects, and where they cut afterwards.

A cell is one tower: a boundary rule, a rate loss, a scan, a task, a seed. It is trained by the task's loss plus what the tower
adds for its boundaries, the rate loss and the detail loss; none knows where objects end. Then it is scored on other scenes
against the places where the thing shown changes along the tower's scan. Two references have their boundaries given instead:
"random" places, and "objects", every true change first. They bound what a rule can reach, and tell whether the task is helped by
good boundaries at all: where "objects" does no better than "random", nothing in the task can teach a rule where things end.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product

import numpy as np
import timm
import torch
from torch import Tensor, nn

from llava_drip.measure.scene_tasks import TASKS, SceneTask
from llava_drip.tokens import TokenBatch
from llava_drip.towers.boundaries import most_probable, tokens_for_budget
from llava_drip.towers.drip import Drip
from llava_drip.towers.rules import RULES
from llava_drip.towers.scan import scan_order
from llava_drip.world.edges import score_boundaries
from llava_drip.world.labelled import LabelledScenes, labelled_scenes

REFERENCES = ("random", "objects")
TOWER = "drip_mini_patch8_64_4x"
TEST_SCENES_FROM = 1_000_000  # scenes of a seed from this number on are not trained on


@dataclass(frozen=True)
class Cell:
    """One tower to train and score; see the module's docstring.

    Attributes:
        rule: of towers/rules.py, or of REFERENCES.
        rate_loss, detail_weight: of the tower, see towers/rate.py and Drip; None for a rule that is not sampled, and for the
            references.
        scan: of towers/scan.py. task: of scene_tasks.TASKS.
        compression: patches per token. steps, batch_size, lr: see `fit`.
        rate_loss_weight: of the rate loss beside the task's; None: the tower's own.
        train_scenes, test_scenes: how many there are of each.
        tower: other arguments of the tower, e.g. {"pool_after": 0}.
    """

    rule: str
    rate_loss: str | None
    detail_weight: float | None
    scan: str
    seed: int
    task: str = "patches"
    compression: float = 4.0
    steps: int = 240
    batch_size: int = 32
    lr: float = 2e-3
    rate_loss_weight: float | None = None
    train_scenes: int = 4096
    test_scenes: int = 512
    tower: dict = field(default_factory=dict, hash=False)


def cells(
    rules: Iterable[str],
    rate_losses: Sequence[str],
    detail_weights: Sequence[float],
    scans: Iterable[str],
    seeds: Iterable[int],
    **others,
) -> list[Cell]:
    """Every combination that there is: rules that are not sampled, and references, have neither rate loss nor detail weight."""
    losses = {
        rule: [*product(rate_losses, detail_weights)] if rule in RULES and RULES[rule].samples else [(None, None)]
        for rule in rules
    }
    return [
        Cell(rule, *loss, scan, seed, **others)
        for seed in seeds
        for scan in scans
        for rule in losses
        for loss in losses[rule]
    ]


def measure(cell: Cell, progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> dict:
    """Trains and scores a cell.

    progress: wraps the range of training steps, e.g. tqdm.
    Returns:
        {"untrained": scores, "trained": scores, "loss": mean task loss of the last tenth of the steps, "seconds": of training},
        scores as `score` gives them.
    Raises:
        ValueError: an argument that the tower does not take.
    """
    torch.manual_seed(cell.seed)
    tower = make_tower(cell)
    grid = tower.patch_embed.grid_size
    train = labelled_scenes(cell.seed, cell.train_scenes, grid)
    test = labelled_scenes(cell.seed, cell.test_scenes, grid, first=TEST_SCENES_FROM)
    task = TASKS[cell.task](tower.num_features)
    weight = tower.rate_loss_weight if cell.rate_loss_weight is None else cell.rate_loss_weight
    ends = GivenEnds(cell, train, grid) if cell.rule in REFERENCES else None
    untrained, begin, losses = score(tower, task, cell, test), time.perf_counter(), []

    def loss_of(rows: Tensor) -> Tensor:
        tokens = tower.forward_features(torch.from_numpy(train.pixels[rows]), ends=None if ends is None else ends(rows))
        loss = task.loss(tower, tokens, train, rows)
        losses.append(loss.item())
        return loss + weight * tokens.rate_loss.mean()

    fit(nn.ModuleList([tower.train(), task]), loss_of, len(train), cell.steps, cell.batch_size, cell.lr, progress)
    seconds = time.perf_counter() - begin
    last = losses[-max(cell.steps // 10, 1) :]
    return {
        "untrained": untrained,
        "trained": score(tower, task, cell, test),
        "loss": float(np.mean(last)),
        "seconds": round(seconds, 1),
    }


def make_tower(cell: Cell) -> Drip:
    """The untrained tower of a cell, without a classifier. ValueError names an argument that it does not take."""
    taken = sorted({"boundary", "compression", "detail_weight", "num_classes", "rate_loss", "scan"} & set(cell.tower))
    if taken:
        raise ValueError(
            f"tower argument {', '.join(taken)}: the cell says this itself; leave it out of the tower's own"
        )
    arguments = {"compression": cell.compression, "num_classes": 0, "scan": cell.scan, **cell.tower}
    if cell.rule not in REFERENCES:
        arguments |= {"boundary": cell.rule, "rate_loss": cell.rate_loss}
    if cell.detail_weight is not None:
        arguments["detail_weight"] = cell.detail_weight
    try:
        return timm.create_model(TOWER, **arguments)
    except TypeError as error:  # an argument that timm's constructor does not know
        raise ValueError(f"tower arguments {cell.tower}: {error}") from error


def fit(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    samples: int,
    steps: int,
    batch_size: int,
    lr: float,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:
    """A short training run: AdamW, a tenth of the steps to warm up, then cosine decay, weight decay 0.05, gradients
    clipped at 1.

    loss_of: sample numbers [batch_size] int64, drawn with replacement from torch's global generator, → a scalar.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    warmup = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(t - warmup, 0) / (steps - warmup or 1))),
    )
    for _ in progress(range(steps)):
        loss = loss_of(torch.randint(0, samples, (batch_size,)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


class GivenEnds:
    """Boundaries of a reference: as many as the budget has, "objects" at true changes as far as there are any, the rest (and
    "random" all) at random places."""

    def __init__(self, cell: Cell, scenes: LabelledScenes, grid: tuple[int, int]):
        self.rule, self.changes = cell.rule, torch.from_numpy(scenes.changes(scan_order(cell.scan, *grid)))
        self.boundaries = tokens_for_budget(torch.tensor([cell.compression]), self.changes.shape[1] + 1) - 1
        self.generator = torch.Generator().manual_seed(cell.seed)

    def __call__(self, rows: Tensor, exact: bool = True) -> Tensor:
        """[rows, N] bool in the order of the scan. exact=False: true changes and no others ("objects" only)."""
        changes = self.changes[rows]
        places = torch.rand(changes.shape, generator=self.generator)
        if self.rule == "objects":
            places = places + changes
        ends = most_probable(places, self.boundaries.expand(len(rows))) if exact else changes
        return torch.cat([ends, ends.new_ones(len(ends), 1)], 1)


@torch.no_grad()
def score(tower: Drip, task: SceneTask, cell: Cell, scenes: LabelledScenes) -> dict:
    """Where a tower cuts, in eval, and how well it does its task.

    Returns, for "exact" (every image as many tokens as asked), "batch" (the batch as many in all; learned rules only) and
    "free" (each image decides; not "random"):
        precision, recall, f1, chance_f1: of boundaries, see world/edges.py. task: the task's score.
        tokens, tokens_p5, tokens_p95: of an image. follows: correlation of an image's tokens with its number of true changes
        (0 where all images have the same number of tokens).
    """
    order = scan_order(cell.scan, *tower.patch_embed.grid_size)
    changes, rows = scenes.changes(order), torch.arange(len(scenes))
    pixels, result = torch.from_numpy(scenes.pixels), {}
    tower.eval()
    if cell.rule in REFERENCES:
        ends = GivenEnds(cell, scenes, tower.patch_embed.grid_size)
        found = {"exact": tower.forward_features(pixels, ends=ends(rows))}
        if cell.rule == "objects":
            found["free"] = tower.forward_features(pixels, ends=ends(rows, exact=False))
    else:
        found = {}
        for mode, *budget in (("exact", cell.compression), ("batch", cell.compression, "batch"), ("free", None)):
            tower.set_compression(*budget)  # ends as it began: each image decides
            if mode != "batch" or cell.rule != "uniform":
                found[mode] = tower.forward_features(pixels)
    for mode, tokens in found.items():
        segments = tokens.segments[:, order].numpy()
        agreement = score_boundaries(segments[:, 1:] != segments[:, :-1], changes)
        result[mode] = {
            **{name: getattr(agreement, name) for name in ("precision", "recall", "f1", "chance_f1")},
            "task": task.score(tower, tokens, scenes, rows),
            **_spending(tokens, changes.sum(1)),
        }
    return result


def _spending(tokens: TokenBatch, changes: np.ndarray) -> dict:
    lengths = tokens.lengths.numpy()
    alike = lengths.std() == 0 or changes.std() == 0
    return {
        "tokens": float(lengths.mean()),
        "tokens_p5": float(np.percentile(lengths, 5)),
        "tokens_p95": float(np.percentile(lengths, 95)),
        "follows": 0.0 if alike else float(np.corrcoef(lengths, changes)[0, 1]),
    }


def plain(cell: Cell) -> dict:
    """A cell as JSON gives it back."""
    return json.loads(json.dumps(asdict(cell)))


def missing(wanted: Iterable[Cell], rows: Sequence[dict]) -> Iterator[Cell]:
    """The cells that no row of `rows` ({"cell": plain(cell), ...}) holds yet."""
    done = [row["cell"] for row in rows]
    return (cell for cell in wanted if plain(cell) not in done)
