"""The result of a run: written beside an older one, then put in its place; config.json last says that it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from llava_drip.assistant.adapter import BASE_FILE, FROZEN_FILE, LORA_FILES, PROJECTOR_FILE, is_adapted
from llava_drip.files import PARTIAL, fresh_folder
from llava_drip.instruct.arguments import StageArguments
from llava_drip.instruct.ranks import any_rank
from llava_drip.instruct.standing import write_projector
from llava_drip.instruct.trainer import StageTrainer

# What a result may consist of. Of an older one, what the new one does not write would be read along with it: a slow tokenizer's
# files, a chat template. Checkpoints and files of other names are left alone.
_RESULT = (
    *("model*.safetensors*", "pytorch_model*.bin*", *LORA_FILES, BASE_FILE, FROZEN_FILE, PROJECTOR_FILE),
    *("generation_config.json", "processor_config.json", "preprocessor_config.json", "image_processor_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.*"),
    *("additional_chat_templates", "training_args.bin", "trainer_state.json"),
)


@contextmanager
def cleared_if_useless(args: StageArguments) -> Iterator[list]:
    """What stops a run before it has written anything, on whichever rank, leaves no output directory, nor the directories
    above it that the run made.

    A checkpoint stays, a result, and, unless a mistake that only training shows (a broken picture) stopped it, any file. Who puts
    something into the list that it yields says that nothing is to go any more.
    """
    useful = []
    target = Path(args.output_dir)
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    if any_rank(not made, args.device):  # every rank has looked before any goes on and makes it
        made = []
    try:
        yield useful
    except BaseException as error:
        useful += [*target.glob("checkpoint-*"), *target.glob("config.json"), *target.glob(PARTIAL)]
        if not isinstance(error, ValueError):
            useful += files_in(target)
        if made and not useful:
            shutil.rmtree(target, ignore_errors=True)
            with suppress(OSError):  # it holds something else by now
                for folder in made[1:]:
                    folder.rmdir()
        raise


def files_in(directory: str | Path) -> list[str]:
    """Names of the files in it at any depth. (Path.rglob would fail if another rank removed a folder meanwhile.)"""
    return [name for _, _, names in os.walk(directory) for name in names]


def save_result(trainer: StageTrainer, output_dir: str) -> None:
    """The whole assistant, or what was trained and its base, with the processor and the projector as a small file of its own.
    All ranks call it, rank 0 writes.

    A kill or a full disk leaves no half-written file under a final name, and never parts of two results that would load.
    """
    target = Path(output_dir)
    partial = target / PARTIAL
    first = trainer.is_world_process_zero()
    with fresh_folder(partial) if first else nullcontext():
        trainer.save_model(str(partial))
        if not first:
            return
        trainer.state.save_to_json(str(partial / "trainer_state.json"))
        if not is_adapted(partial):
            write_projector(partial)
        else:  # it is written; and all that a checkpoint's model.safetensors holds is the projector, for resuming
            (partial / "model.safetensors").unlink(missing_ok=True)
    put_in_place(partial, target)


def put_in_place(partial: Path, target: Path) -> None:
    """Move what lies in `partial` into `target`, in place of an older result, of which nothing may stay: a single
    model.safetensors would win over the new shards, a tokenizer.model mix with the new tokenizer. What a failure leaves has no
    config.json, so it does not load, and the rest stays in `partial`."""
    (target / "config.json").unlink(missing_ok=True)
    for pattern in _RESULT:
        for old in target.glob(pattern):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    for part in sorted(partial.iterdir(), key=lambda part: part.name == "config.json"):
        if (target / part.name).is_dir():
            shutil.rmtree(target / part.name)
        os.replace(part, target / part.name)
    partial.rmdir()
