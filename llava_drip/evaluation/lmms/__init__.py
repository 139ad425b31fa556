"""The model plugin of lmms-eval (EvolvingLMMs-Lab/lmms-eval), by which its benchmarks run on our checkpoints.

settings.py   --model_args, and a task's generation_kwargs: how answers are made
asked.py      a request, its messages and pictures, batches
model.py      the class; it alone imports lmms_eval, which is no dependency of ours (docs/guides/evaluation.md)
"""

from __future__ import annotations


def manifest():
    """What the entry point in pyproject.toml names: an lmms_eval.models.registry_v2.ModelManifest.

    Called while lmms_eval.models is being imported, which the class's module needs whole; so that one is named, not imported.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llava_drip", chat_class_path=f"{__name__}.model.LlavaDrip")
