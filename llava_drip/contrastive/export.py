"""A run's newest weights where other programs look for them.

RUN/open_clip_config.json, RUN/open_clip_model.safetensors    open_clip.create_model_and_transforms("local-dir:RUN")
RUN/tower/                                                    timm.create_model("local-dir:RUN/tower", pretrained=True)
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path

import open_clip
from safetensors.torch import save_file
from torch import nn

from llava_drip.contrastive.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from llava_drip.contrastive.model import tower_of
from llava_drip.files import write_whole
from llava_drip.towers.io import readable_as_usual, save_tower

TOWER = "tower"


def model_config(args: Namespace) -> dict:
    """The model in open_clip's JSON format, with what flags changed of it."""
    config = open_clip.get_model_config(args.model)
    if args.force_image_size is not None:
        config["vision_cfg"]["image_size"] = args.force_image_size
    if args.force_context_length is not None:
        config["text_cfg"]["context_length"] = args.force_context_length
    if args.force_quick_gelu:
        config["quick_gelu"] = True
    if args.force_custom_text:
        config["custom_text"] = True
    if args.siglip:  # the loss's bias is a parameter of the model
        config |= {"init_logit_scale": 2.302585092994046, "init_logit_bias": -10}
    return config


def write_config(model: nn.Module, args: Namespace, run: Path) -> None:
    """RUN/open_clip_config.json: what it takes to read the run's checkpoints."""
    config = {"model_cfg": model_config(args), "preprocess_cfg": model.visual.preprocess_cfg}
    write_whole(run / CONFIG_NAME, json.dumps(config, indent=2))


def write_weights(model: nn.Module, run: Path) -> None:
    """RUN/open_clip_model.safetensors, and RUN/tower where the image tower is one of ours. Each is whole or not there.

    model: open_clip's, not wrapped.
    """
    path = run / WEIGHTS_NAME
    partial = path.with_suffix(".partial")
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}, partial)
    readable_as_usual(partial)
    os.replace(partial, path)
    tower = tower_of(model)
    if tower is not None:
        preprocessing = model.visual.preprocess_cfg
        save_tower(tower, run / TOWER, tuple(preprocessing["mean"]), tuple(preprocessing["std"]))
