"""CLIP pretraining of the towers on open_clip's own trainer.

    configs/         the DRIP-* models, in open_clip's JSON format
    model.py         a CLIP that also answers with its tower's rate loss and token counts
    loss.py          any open_clip loss plus the boundary-rate loss
    compression.py   how many patches went into a token, over a window and an epoch
    adapter.py       the one file that reaches into open_clip's trainer
    arguments.py     the command line, and what is wrong with it before anything is written
    train.py         train(argv): what scripts/train_clip.py and the quickstart call
    checkpoint.py    a trained checkpoint back as a CLIP or as its bare tower
    evaluator.py     open_clip's zero-shot evaluator, mended for today's NumPy
    zero_shot.py     zero-shot classification with it

This module is light on purpose: `import llava_drip` runs it, and the trainer's imports wait until someone trains.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


@cache  # open_clip scans the folder again for every call
def register() -> None:
    """Make the DRIP-* models known to `open_clip.create_model`. The towers must be registered with timm by then."""
    import open_clip

    open_clip.add_model_config(CONFIGS)
