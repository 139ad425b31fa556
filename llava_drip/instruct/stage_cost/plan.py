"""What is measured of the stages: a language model's shape, a tower, compressions, arrangements of a batch, how many steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.trainer_pt_utils import get_length_grouped_indices

from llava_drip.cli import one_line
from llava_drip.instruct.stage_cost.lengths import Sample

# Shapes by name, from config.json of lmsys/vicuna-7b-v1.5, lmsys/vicuna-13b-v1.5 and TinyLlama/TinyLlama-1.1B-Chat-v1.0 on the
# Hugging Face Hub.
LANGUAGE_MODELS = {
    "vicuna-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "vicuna-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
}
_LLAMA = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}

MEGA_BATCH = (
    50  # batches within which group_by_length sorts: transformers' LengthGroupedSampler, of 200 batches or more
)


@dataclass(frozen=True)
class Case:
    """compression: patches per visual token. arrangement: of a batch, "packed", "padded", or "grouped": padded, samples of like
    length."""

    compression: float
    arrangement: str

    @property
    def label(self) -> str:
        return f"{self.compression:g}x, {self.arrangement}"


@dataclass(frozen=True)
class Step:
    """A step to be made: which case, which samples; warm: it warms up and does not count."""

    case: Case
    samples: tuple[int, ...]
    warm: bool = False


@dataclass(frozen=True)
class Plan:
    """See scripts/measure_assistant.py for the flags of these names. ValueError: fewer samples than are to be drawn.

    Attributes:
        stage: "pretrain" or "finetune".
        samples: of which rounds x batch_size are drawn.
        spread: standard deviation over mean of an image's visual tokens, where they vary from image to image.
        optim: of transformers' TrainingArguments; None: its default.
        memory: whether to measure peak memory on a CPU, where it takes a process for each case. On a GPU it is there anyway.
    """

    stage: str
    samples: tuple[Sample, ...]
    language_model: str = "tinyllama-1.1b"
    layers: int | None = None
    vision_tower: str = "drip_large_patch14_336"
    mm_projector_type: str = "mlp2x_gelu"
    compressions: tuple[float, ...] = (1.0, 4.0, 10.0)
    arrangements: tuple[str, ...] = ("packed",)
    batch_size: int = 4
    rounds: int = 5
    warmup: int = 1
    spread: float = 0.25
    device: str = "cpu"
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    optim: str | None = None
    memory: bool = True
    seed: int = 0

    def __post_init__(self):  # now, not when the stages before it have been measured
        wanted = self.rounds * self.batch_size
        if len(self.samples) < wanted:
            raise ValueError(
                f"--lengths: {len(self.samples)} samples of {self.stage}, but --rounds {self.rounds} x --batch_size "
                f"{self.batch_size} are {wanted}; give more samples, or fewer rounds"
            )

    @property
    def cases(self) -> list[Case]:
        return [Case(compression, how) for how in self.arrangements for compression in self.compressions]

    @property
    def pool(self) -> list[int]:
        """The samples that are measured, in the order drawn; every case is given each of them once."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.samples), generator=generator)
        return order[: self.rounds * self.batch_size].tolist()

    def batches(self, case: Case, patches: int) -> list[tuple[int, ...]]:
        """The pool in batches, one a round: in the order drawn, or, "grouped", as --train_sampling_strategy group_by_length of
        a large training set cuts it: sorted within 50 batches. patches: of an image."""
        order = self.pool
        if case.arrangement == "grouped":
            tokens = patches / case.compression
            lengths = [self.samples[i].text + self.samples[i].images * tokens for i in order]
            generator = torch.Generator().manual_seed(self.seed)
            mega = min(self.rounds, MEGA_BATCH)
            order = [order[i] for i in get_length_grouped_indices(lengths, self.batch_size, mega, generator)]
        return [tuple(order[i : i + self.batch_size]) for i in range(0, len(order), self.batch_size)]

    def steps(self, cases: list[Case], patches: int) -> list[Step]:
        """Round after round, all cases in turn within each; which one is first turns."""
        batches = {case: self.batches(case, patches) for case in cases}
        return list(self._steps(cases, batches))

    def _steps(self, cases: list[Case], batches: dict[Case, list[tuple[int, ...]]]) -> Iterator[Step]:
        for number in range(self.warmup + self.rounds if cases else 0):
            turn = number % len(cases)
            for case in cases[turn:] + cases[:turn]:
                yield Step(case, batches[case][max(0, number - self.warmup)], number < self.warmup)


def text_config(language_model: str, layers: int | None = None) -> PreTrainedConfig:
    """The configuration of a language model: a name of LANGUAGE_MODELS, or a directory with a config.json, no weights needed.

    layers: so many of them; None: all.
    Raises:
        ValueError: neither, or more layers than it has.
    """
    path = Path(language_model).expanduser()
    if language_model in LANGUAGE_MODELS:
        config = LlamaConfig(**{**_LLAMA, **LANGUAGE_MODELS[language_model]})
    elif (path / "config.json").is_file():
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
        except Exception as error:  # json and transformers each raise their own
            raise ValueError(f"--language_model {path / 'config.json'}: cannot be read: {one_line(error)}") from error
    else:
        raise ValueError(
            f"--language_model {language_model}: neither a directory with a config.json nor one of {', '.join(LANGUAGE_MODELS)}"
        )
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"--layers {layers}: {language_model} has {config.num_hidden_layers}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config
