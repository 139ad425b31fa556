from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def program(repository):
    return repository / "scripts" / "train_language_model.py"


@pytest.fixture
def chat(tmp_path):
    rows = [
        {
            "id": str(i),
            "image": f"{i}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\nWhich number is this, {i} or {i + 1}?"},
                {"from": "gpt", "value": f"It is the number {i}, which is less than {i + 1}."},
            ],
        }
        for i in range(60)
    ]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    return tmp_path / "chat.json"


SMALL = "--hidden_size 32 --layers 1 --heads 2 --vocab_size 300 --steps 3 --batch_size 4 --block 32 --context 96"


def test_a_directory_that_every_program_takes(run_script, program, chat, tmp_path):
    flags = ["--data_path", chat, chat, "--output", tmp_path / "model", *SMALL.split(), "--dropout", "0.1"]
    done = run_script(program, *flags)
    assert not done.returncode, done.stderr
    assert "120 texts" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (32, 1, 96)
    assert config.attention_dropout == 0.1 and config.vocab_size == len(tokenizer) == 300
    said = "Which number is this, 7 or 8?"
    assert tokenizer.decode(tokenizer(said)["input_ids"]) == said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--layers 0", "--layers 0: must be at least 1"),
        ("--hidden_size 36 --heads 4", "--hidden_size 36: must be a multiple of twice --heads 4"),
        ("--dropout 1", "--dropout 1.0"),
        ("--steps 3 --block 4000", "a batch takes 4"),
    ],
)
def test_mistakes_are_one_line(run_script, program, chat, tmp_path, flags, words):
    flags = [*SMALL.split(), *flags.split()]
    done = run_script(program, "--data_path", chat, "--output", tmp_path / "model", *flags)
    assert done.returncode and words in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["no such data file"]),
        ("{", ["not valid JSON"]),
        ('[{"id": "9", "conversations": [{"from": "gpt", "value": "Yes."}]}]', ["row 0 (id '9')", "turn 0"]),
    ],
)
def test_files_that_are_no_conversations_are_named(run_script, program, tmp_path, text, words):
    if text is not None:
        (tmp_path / "bad.json").write_text(text)
    done = run_script(program, "--data_path", tmp_path / "bad.json", "--output", tmp_path / "model", *SMALL.split())
    line = done.stderr.splitlines()[-1]
    assert done.returncode and all(word in line for word in ["bad.json", *words]), line


def test_a_folder_with_files_is_left_alone(run_script, program, chat):
    done = run_script(program, "--data_path", chat, "--output", chat.parent, *SMALL.split())
    assert done.returncode == 2 and "holds files already" in done.stderr
