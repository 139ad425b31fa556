"""Small real checkpoints, made once a session in the formats that users have."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A job that a shell started in the background ignores Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Several test processes share the cores: one thread each, as their programs have.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import llava_drip  # noqa: F401
from llava_drip.assistant import build_assistant
from llava_drip.instruct.templates import VICUNA_V1
from llava_drip.towers.io import save_tower

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What color is the circle? ASSISTANT: The circle is red.",
    "Describe the picture: a small blue square at the top left of a grey background.",
]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def tiny_language_model(tmp_path_factory, tiny_tokenizer) -> Path:
    """Directory of a LLaMA with random weights, width 64, and its tokenizer."""
    directory = tmp_path_factory.mktemp("language_model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_tower(tmp_path_factory) -> Path:
    """Directory of a DRIP tower with random weights: 64 px, 64 patches, one token for four patches."""
    torch.manual_seed(0)
    tower = timm.create_model("drip_mini_patch8_64_4x", num_classes=0)
    return save_tower(tower, tmp_path_factory.mktemp("tower"), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_language_model, tiny_tower) -> Path:
    """Directory of a whole assistant with random weights."""
    directory = tmp_path_factory.mktemp("assistant")
    torch.manual_seed(0)
    model, processor = build_assistant(str(tiny_language_model), str(tiny_tower), chat_template=VICUNA_V1)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def endless_checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    """The small checkpoint without an end mark, so that replies are as long as they are asked for."""
    directory = tmp_path_factory.mktemp("endless") / "small-model"
    shutil.copytree(tiny_checkpoint, directory)
    path = directory / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
    return directory


@pytest.fixture
def one_thread():
    """Steps this small lose more by sharing than they gain, many times over on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_script(monkeypatch, capsys):
    """run_script(file, *arguments): a program in this process, as its own `python FILE ARGUMENTS` would run it."""

    def run(script: Path, *arguments: object) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, end.value.code, printed.out, printed.err)

    return run
