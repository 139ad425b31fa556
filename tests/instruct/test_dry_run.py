"""--dry_run through the programs: what it prints is what would be trained, and nothing is left behind."""

from __future__ import annotations

import json
import re

import pytest

from llava_drip.instruct.stage import run_stage

from .conftest import common, losses, parts, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def flags(tiny_language_model, tiny_tower, tiny_world, tmp_path) -> list[str]:
    return [
        *parts(tiny_language_model, tiny_tower, tmp_path / "out"),
        *("--data_path", str(tiny_world.instruct_train), "--image_folder", str(tiny_world.images)),
        *("--version", "vicuna_v1", "--learning_rate", "2e-3", "--dataloader_num_workers", "0", "--report_to", "none"),
    ]


def marked(line: str) -> list[str]:
    """What stands between the marks of learned tokens, as text: the tiny tokenizer's are bytes, Ġ for a space."""
    spans = re.findall(r"\[\[ (.*?) \]\]", line)
    return [span.replace(" ", "").replace("Ġ", " ").replace("</s>", "").strip() for span in spans]


def test_what_is_learned_is_marked_and_nothing_is_written(flags, tiny_world, tmp_path, capsys):
    run_stage("finetune", [*flags, "--dry_run"])
    printed = capsys.readouterr().out
    rows = json.loads(tiny_world.instruct_train.read_text())
    lines = [line for line in printed.splitlines() if line.startswith("<s>")]
    assert len(lines) == 2 and not list(tmp_path.iterdir())
    for line, row in zip(lines, rows):
        assert marked(line) == [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
        assert line.count("<image>") == 1 and "ASSISTANT : [[" in line
    heads = [line for line in printed.splitlines() if re.match(r"row \d", line)]
    assert [re.match(r"row \d+ \(id '([^']+)'\)", line)[1] for line in heads] == [row["id"] for row in rows[:2]]
    for head, line in zip(heads, lines):
        tokens, learned, visual, positions = map(
            int, re.search(r": (\d+) tokens, (\d+) learned; \S+: (\d+) visual tokens; (\d+) pos", head).groups()
        )
        shown = line.replace("[[ ", "").replace(" ]]", "").split()
        assert (tokens, visual, positions) == (len(shown), 16, tokens + 15) and 0 < learned < tokens
        assert learned == sum(len(span.split()) for span in re.findall(r"\[\[ (.*?) \]\]", line))
    assert "multi_modal_projector" in printed and "without DeepSpeed" in printed and "Left out:" in printed


def test_its_steps_are_those_of_the_run(flags, tmp_path, capsys):
    flags += ["--per_device_train_batch_size", "7", "--gradient_accumulation_steps", "3", "--num_train_epochs", "1.4"]
    flags += ["--warmup_ratio", "0.3"]
    run_stage("finetune", [*flags, "--dry_run", "0"])
    printed = capsys.readouterr().out
    run_stage("finetune", [*flags, "--save_strategy", "no"])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    (steps,) = re.findall(r"steps +│ (\d+) = ", printed)
    assert int(steps) == state["max_steps"] == len(losses(tmp_path / "out"))
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    (warmup,) = re.findall(r"warm-up +│ (\d+) steps to 0.002, then cosine", printed)
    assert rates.index(max(rates)) == int(warmup)
    assert "21 = 7 a process x 3 accumulated x 1 processes" in printed and "<s>" not in printed


def test_budgets_that_are_drawn_are_shown_at_both_ends(flags, capsys):
    run_stage("finetune", [*flags, "--dry_run", "1", "--elastic_compression", "1", "8"])
    assert ".png: 64 visual tokens at 1x, 8 visual tokens at 8x;" in capsys.readouterr().out


def test_adapters_over_a_quantised_model(flags, capsys):
    """Their few weights are what has gradients and states; the frozen ones are counted as they are held, in 4 bits."""

    def gib(of: str) -> float:
        return float(re.search(rf"│ {of} +│ +([\d.]+) │", printed)[1])

    run_stage("finetune", [*flags, "--dry_run", "0"])
    printed = capsys.readouterr().out
    whole, frozen = gib("optimizer states"), gib("weights, frozen")
    pytest.importorskip("bitsandbytes")
    run_stage("finetune", [*flags, "--dry_run", "0", "--lora_enable", "true", "--lora_r", "2", "--bits", "4"])
    printed = capsys.readouterr().out
    assert "language_model LoRA" in printed and gib("optimizer states") < whole / 2
    assert gib("weights, frozen") - frozen < 0.0004  # of 122,688 weights, of which the embeddings are not quantised


def test_a_mistake_is_found(flags, tiny_world, tmp_path, capsys):
    rows = json.loads(tiny_world.instruct_train.read_text())
    (tmp_path / "chat.json").write_text(json.dumps([*rows[:3], {**rows[3], "image": "gone.png"}]))
    with pytest.raises(ValueError, match="chat.json: row 3: image file 'gone.png' not found"):
        run_stage("finetune", [*flags, "--data_path", str(tmp_path / "chat.json"), "--dry_run"])
    with pytest.raises(SystemExit):
        run_stage("finetune", [*flags, "--dry_run", "-1"])
    assert "--dry_run must be at least 0, got -1" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_is_replaced(flags, tiny_world, tmp_path, capsys):
    """As in training."""
    rows = json.loads(tiny_world.instruct_train.read_text())[:2]
    broken = tmp_path / "broken.png"
    broken.write_bytes((tiny_world.images / rows[0]["image"]).read_bytes()[:100])
    (tmp_path / "chat.json").write_text(json.dumps([{**rows[0], "image": str(broken)}, rows[1]]))
    run_stage("finetune", [*flags, "--data_path", str(tmp_path / "chat.json"), "--dry_run", "1"])
    lines = capsys.readouterr().out.splitlines()
    (said,) = [i for i, line in enumerate(lines) if line.startswith(f"bad image: {broken}: truncated")]
    assert lines[said].endswith(f"row 1 (id '{rows[1]['id']}') takes the place of row 0 (id '{rows[0]['id']}')")
    assert lines[said + 1].startswith("row 1 ") and f"; {rows[1]['image']}: 16 visual tokens" in lines[said + 1]


@pytest.mark.slow
def test_under_zero(tiny_language_model, tiny_tower, tiny_world, tmp_path, repository):
    """Divided parameters are read whole, the columns are of more processes, and the program ends with 0."""
    pytest.importorskip("deepspeed")
    config = repository / "scripts" / "deepspeed" / "zero3.json"
    out = run(
        "pretrain",
        *parts(tiny_language_model, tiny_tower, tmp_path / "out"),
        *("--data_path", tiny_world.caption_train, "--image_folder", tiny_world.images, "--version", "plain"),
        *common(4, 3),
        *("--deepspeed", config, "--dry_run", "1"),
    )
    assert "ZeRO-3" in out and "1 process*" in out and "16 processes" in out
    assert re.search(r"row 0 .* learned; \S+: \d+ visual tokens; ", out) and not (tmp_path / "out").exists()
