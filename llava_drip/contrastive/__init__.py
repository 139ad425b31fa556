"""CLIP pretraining of the towers on open_clip's own trainer.

    configs/         models with the towers of this package, in open_clip's JSON format
    model.py         a CLIP that also answers with its tower's rate loss and token counts
    loss.py          any open_clip loss plus the boundaries' own loss; the same gradients on any number of ranks
    train.py         train(argv): what scripts/train_clip.py and the quickstart call
    arguments.py     the command line, and what is wrong with it before anything is written
    adapter.py       the one file that reaches into open_clip's trainer
    pairs.py         image-text pairs for it, without what cannot be read
    run.py           what happens around its steps and epochs
    resume.py        what checkpoints hold beyond open_clip's, and what may not change on the way
    epoch.py         an epoch's figures over all ranks
    report.py        what a run writes down of them
    validation.py    what is evaluated while training
    export.py        the newest weights where open_clip and timm find them
    lr_finder.py     the learning-rate range test of such a run
    checkpoint.py    a trained checkpoint back as a CLIP or as its bare tower
    evaluator.py     what evaluations share: the model's mode and randomness put back, the tokens it spent
    zero_shot.py     zero-shot classification by open_clip's evaluator
    captions.py      pictures with their captions, in the formats in which people keep them
    retrieval.py     recall between pictures and captions, beside that of a random ranking
    programs.py      flags and output of the evaluation programs
    subset.py        which rows of LAION's metadata to download
    shard_check.py   whether image-text shards are whole, and how many pairs they hold

This module is light on purpose: `import llava_drip` runs it, and the trainer's imports wait until someone trains.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


@cache  # open_clip scans the folder again for every call
def register() -> None:
    """Make the models of configs/ known to `open_clip.create_model`. The towers must be registered with timm by then."""
    import open_clip

    open_clip.add_model_config(CONFIGS)
