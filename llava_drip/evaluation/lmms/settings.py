"""How answers are made: what --model_args say for the whole run, and a task's generation_kwargs for its own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_drip.engine import sampling_arguments

USED = ("max_new_tokens", "temperature", "do_sample", "top_p", "num_beams", "until")  # of generation_kwargs
MAX_NEW_TOKENS = 1024  # where a task gives none, as lmms-eval's own LLaVA models have it
# lmms-eval puts this in (TaskConfig: fewshot_delimiter) where a task says nothing of where an answer ends. It would cut every
# answer at its first paragraph, which no task has asked for; its own chat models do not use it either.
FILLED_IN = ("\n\n",)


@dataclass(frozen=True)
class Settings:
    """--model_args.

    Attributes:
        pretrained: the assistant's folder.
        compression: patches per visual token; None: as the checkpoint says, or else each image decides.
        dtype: default bfloat16 on cuda, float32 elsewhere.
        device: default cuda where there is one, of several processes each its own, else cpu.
        seed: of sampled answers.
        record: a JSON file to write when all is answered: what stands beside the scores of our own programs (record.py) and
            the visual tokens of each answer, for which lmms-eval's result files have no place.
        batch_size: requests at once. Sampled answers are made one by one, lest they depend on it. From --batch_size.
    """

    pretrained: str
    compression: float | None = None
    dtype: str | None = None
    device: str | None = None
    seed: int = 0
    record: Path | None = None
    batch_size: int = 1

    @classmethod
    def read(cls, given: Mapping) -> Settings:
        """Of what lmms-eval calls a model with: --model_args, and --batch_size, --max_batch_size and --device where given.

        Raises:
            ValueError: naming the argument and what is wrong with it.
        """
        values = {name: value for name, value in given.items() if value is not None}
        names = ("pretrained", "compression", "dtype", "device", "seed", "record")
        if unknown := set(values) - {*names, "batch_size", "max_batch_size"}:
            raise ValueError(f"model_args: {', '.join(sorted(unknown))}: not known; there are {', '.join(names)}")
        if "pretrained" not in values:
            raise ValueError("model_args: pretrained=DIR is missing, the folder of the assistant")
        size = str(values.get("batch_size", 1))
        if not size.isdecimal() or int(size) < 1 or "max_batch_size" in values:
            raise ValueError(
                f"--batch_size {size}: give a number, at least 1; the largest that fits is not looked for here"
            )
        if not isinstance(seed := values.get("seed", 0), int):
            raise ValueError(f"model_args: seed={seed}: give a whole number")
        record = Path(str(values["record"])) if "record" in values else None
        if record is not None and (record.is_dir() or not record.absolute().parent.is_dir()):
            raise ValueError(f"model_args: record={record}: give a file in a folder that exists")
        return cls(
            str(values["pretrained"]),  # lmms-eval makes a number of a folder that is called 7
            values.get("compression"),
            values.get("dtype"),
            own_device(values.get("device")),
            seed,
            record,
            int(size),
        )


def own_device(device: str | None) -> str | None:
    """Of several processes (accelerate launch, torchrun) each its own GPU, where none is named by its number."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and torch.cuda.is_available()
    return f"cuda:{os.environ['LOCAL_RANK']}" if several and device in (None, "cuda") else device


@dataclass(frozen=True)
class Generation:
    """How an answer is made; equal ones can share a batch.

    Attributes:
        max_new_tokens, temperature, top_p: as `Engine.answer_batch` takes them.
        until: an answer ends before the first of these.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    until: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: Mapping) -> Generation:
        """Of generation_kwargs, a task's or --gen_kwargs'. What they leave out is greedy; do_sample=False is greedy whatever the
        temperature.

        Raises:
            ValueError: a value that is no number or out of range, or more than one beam.
        """
        values = {name: value for name, value in given.items() if value is not None}
        if (beams := values.get("num_beams", 1)) != 1:
            raise ValueError(f"generation_kwargs: num_beams={beams}: there is no beam search here; give 1")
        until = values.get("until", ())
        until = tuple(end for end in ([until] if isinstance(until, str) else until) if end)
        sampled = values.get("do_sample", values.get("temperature", 0) != 0)
        try:
            # With do_sample and no temperature: transformers' default.
            temperature = float(values.get("temperature", 1.0)) if sampled else 0.0
            top_p = float(values.get("top_p", 1.0)) if temperature else 1.0
            max_new_tokens = int(values.get("max_new_tokens", MAX_NEW_TOKENS))
            sampling_arguments(max_new_tokens, temperature, top_p)
        except (TypeError, ValueError) as error:
            raise ValueError(f"generation_kwargs: {error}") from None
        return cls(max_new_tokens, temperature, top_p, () if until == FILLED_IN else until)

    def ended(self, text: str) -> str:
        """The text up to the first of `until`."""
        return text[: min((place for place in map(text.find, self.until) if place >= 0), default=len(text))]


def unused(given: Mapping) -> set[str]:
    """Names in generation_kwargs that shape nothing here, such as repetition_penalty."""
    return {name for name, value in given.items() if value is not None} - set(USED)


def seed_of(*what: object) -> int:
    """A seed, 0 .. 2^31 - 1, that is the same wherever and in whatever order an answer is made."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4], "big") >> 1
