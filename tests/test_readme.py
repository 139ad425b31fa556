"""The commands of README and guides: each is known to its program with every flag, and the short ones run, on small data.

Run in this process, as their files do it. A test puts its own paths and a small size in a command's place; see SMALL.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from braceexpand import braceexpand
from PIL import Image
from safetensors.torch import load_file

from llava_drip.contrastive import register
from llava_drip.tokens import TokenBatch
from llava_drip.world.dataset import build_world

DOCUMENTS = ("README.md", "docs/guides/train_towers.md", "docs/guides/laion.md", "docs/guides/drip.md")
# Shorter ones.
GUIDES = tuple(
    f"docs/guides/{name}.md"
    for name in (
        "assistant",
        "chat",
        "data",
        "evaluation",
        "lora",
        "measuring",
        "robust_training",
        "science_qa",
        "serving",
        "towers/plain",
    )
)
LAUNCHERS = ("python", "deepspeed", "torchrun")
# The later flag wins: the sizes of a GPU run become those of two steps on a CPU.
SMALL = {
    "scripts/train_clip.py": "--model DRIP-mini-8-4x --train-num-samples 16 --batch-size 8 --epochs 1 --warmup 1 "
    "--precision fp32 --workers 0 --device cpu --logs logs --name RUN",
    "scripts/train_imagenet.py": "--epochs 1 --warmup-epochs 0 --batch-size 8 --workers 0",
    "scripts/pretrain_projector.py": "--deepspeed= --bf16 false --max_steps 2 --per_device_train_batch_size 2 "
    "--dataloader_num_workers 0 --save_strategy no --report_to none",
    "eval/llava_bench.py": "--device cpu --max_new_tokens 4",
    "eval/zero_shot.py": "--device cpu --workers 0",
}
SMALL["scripts/finetune.py"] = SMALL["scripts/pretrain_projector.py"]
SMALL["eval/retrieval.py"] = SMALL["eval/zero_shot.py"]


@pytest.fixture(scope="module")
def readme(repository) -> str:
    return (repository / "README.md").read_text()


@pytest.fixture(scope="module")
def guide(repository) -> str:
    return (repository / "docs" / "guides" / "train_towers.md").read_text()


@pytest.fixture(scope="module")
def commands(readme) -> list[list[str]]:
    return commands_in(readme)


def commands_in(text: str) -> list[list[str]]:
    """Commands of a document, in indented lines (continuation lines joined, comments cut off) and in running text, where
    `python ` may be left out."""
    text = text.replace("\\\n", " ")
    lines = [line.strip().split("  #")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    lines += [f"python {code}" if re.match(r"(scripts|eval)/\w+\.py ", code) else code for code in in_text(text)]
    starts = tuple(f"{word} " for word in ("make", *LAUNCHERS))
    return [
        shlex.split(line.removesuffix(" ...")) for line in lines if line.startswith(starts) and " -m venv " not in line
    ]


def in_text(text: str) -> list[str]:
    """What stands between backticks, outside blocks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]


def parts(command: list[str]) -> tuple[list[str], str, list[str]]:
    """A command's launcher with its flags, its program (a file, or the module of -m), the program's flags."""
    start = next(i for i, word in enumerate(command) if word.endswith(".py") or command[i - 1] == "-m")
    return command[:start], command[start], command[start + 1 :]


def command_of(commands: list[list[str]], program: str) -> list[str]:
    """The arguments that the README gives a program, the first time that it gives any."""
    found = [parts(command)[2] for command in commands if command[0] in LAUNCHERS and parts(command)[1] == program]
    return next(arguments for arguments in found if arguments not in ([], ["--help"]))


@pytest.fixture
def run(repository, monkeypatch, tmp_path, capsys):
    """Runs a program as from the repository's folder, but in an empty one; returns what it printed."""

    def run(program: str, arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(repository)
        capsys.readouterr()
        try:
            if program.endswith(".py"):
                runpy.run_path(str(repository / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__")
        except SystemExit as end:
            assert not end.code, capsys.readouterr().err[-2000:]
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world") / "world", num_train=16, num_test=2, questions_per_scene=2)


def with_its_own(command: list[str]) -> list[list[str]]:
    """A command, and the one after its `--`, if it starts one."""
    place = command.index("--") if "--" in command else 0
    if not any(word.endswith(".py") for word in command[:place]):
        return [command]
    return [command[:place], command[place + 1 :]]


def flags(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--") and word != "--"]


def test_there_is_one_for_each_task(commands):
    named = {parts(command)[1] for command in commands if command[0] in LAUNCHERS}
    assert named >= {*SMALL, "serve.gradio_app", "scripts/convert_captions.py", "scripts/prepare_laion.py"}
    assert named >= {f"scripts/{name}.py" for name in ("lr_finder", "plot_results", "push_to_hub", "convert_tower")}
    assert named >= {f"scripts/{name}.py" for name in ("distill_tower", "draw_boundaries")}
    assert {command[1] for command in commands if command[0] == "make"} == {"demo", "test"}
    assert {command[0] for command in commands} >= set(LAUNCHERS)


def test_make_commands_are_targets(commands, repository):
    for command in commands:
        if command[0] == "make":
            subprocess.run([*command, "--dry-run"], cwd=repository, check=True, capture_output=True)


def known_flags(program: str, arguments: list[str], run) -> set[str]:
    """What --help of a program names."""
    if arguments[:1] == ["clip"]:  # lr_finder.py hands what it does not know to the trainer
        printed = run(program, ["clip", "--help"]) + run("scripts/train_clip.py", ["--help"])
    else:
        printed = run(program, ["--help"])
    return set(re.findall(r"(?<![\w-])--[\w-]+", printed))


def test_every_flag_is_known_to_its_program(repository, run):
    """Also torchrun's own, and those that the text names without a command."""
    from torch.distributed.run import get_args_parser

    torchrun = set(get_args_parser()._option_string_actions)
    known: dict[tuple, set[str]] = {}
    named: dict[str, set[str]] = {}
    for document in DOCUMENTS + GUIDES:
        text = (repository / document).read_text()
        for command in chain.from_iterable(map(with_its_own, commands_in(text))):
            if command[0] not in LAUNCHERS:
                continue
            launcher, program, arguments = parts(command)
            place = (program, *arguments[:1]) if arguments[:1] == ["clip"] else (program,)
            if place not in known:
                known[place] = known_flags(program, arguments, run)
            assert set(flags(arguments)) <= known[place], f"{document}: {command}"
            if launcher[0] == "torchrun":
                assert set(flags(launcher)) <= torchrun, f"{document}: {command}"
        bare = [line.strip() for line in text.splitlines() if line.startswith("    --")]
        bare += [code for code in in_text(text) if re.match("--[a-z]", code)]
        named[document] = {flag for line in bare for flag in flags(line.split())}
    for document, found in named.items():
        assert (len(found) > 3 or document in GUIDES) and found <= torchrun.union(*known.values()), document


def test_what_the_documents_name_is_there(repository):
    """Recipes, links, files of the repository, and models of open_clip's registry."""
    register()
    models = set(open_clip.list_models())
    for document in DOCUMENTS + GUIDES:
        text = (repository / document).read_text()
        files = [word for command in commands_in(text) for word in command if word.endswith(".yaml")]
        files += re.findall(r"(?:scripts|tests|docs)/[\w/]+\.(?:json|md|py)", text)
        files = {file for file in files if file != "RECIPE.yaml"}
        files |= {f"scripts/recipes/{code}" for code in in_text(text) if re.fullmatch(r"[a-z]\w+\.yaml", code)}
        links = {link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
        assert len(files) + len(links) > (4 if document in DOCUMENTS else 0)
        missing = [file for file in files if not (repository / file).is_file()]
        for link in links:
            place, _, heading = link.partition("#")
            file = (repository / document).parent.joinpath(place) if place else repository / document
            headings = re.findall(r"(?m)^#+ (.+)$", file.read_text()) if file.is_file() and heading else []
            anchors = {re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-") for words in headings}
            if not file.is_file() or (heading and heading not in anchors):
                missing.append(link)
        assert not missing, document
        named = [code for code in in_text(text) if code.startswith(("DRIP-", "Plain-ViT-"))]
        names = {name for code in named for name in braceexpand(code)}
        assert (len(names) > 3 or document in GUIDES) and names <= models, document


def test_the_python_block_runs(readme):
    (block,) = blocks(readme)
    names = {"images": torch.randn(2, 3, 224, 224)}
    exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["tokens"], TokenBatch) and names["tokens"].segments.shape == (2, 196)
    assert names["logits"].shape == (2, 10)


def test_the_python_block_of_the_towers_guide_runs(repository):
    (block,) = blocks((repository / "docs" / "guides" / "drip.md").read_text())
    names = {"images": torch.randn(2, 3, 224, 224)}
    exec(compile(block, "drip.md", "exec"), names)
    assert names["tokens"].segments.shape == names["tokens"].boundary_probs.shape == (2, 196)


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


CLASSES = ["black", "dark", "grey", "light", "white"]


def write_classes(folder: Path, pictures: int) -> None:
    """A folder with a sub-folder for each of CLASSES, and so many pictures in each."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for k in range(pictures):
            pixels = rng.normal(50 * i, 20, (72, 80, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.jpg")


def test_train_clip_then_evaluate(commands, guide, run, world, tmp_path):
    shards = str(world.clip_shards[0])
    arguments = command_of(commands, "scripts/train_clip.py")
    arguments[arguments.index("--train-data") + 1] = shards
    run("scripts/train_clip.py", [*arguments, *shlex.split(SMALL["scripts/train_clip.py"])])
    assert (tmp_path / "logs" / "RUN" / "checkpoints" / "epoch_1.pt").is_file()

    write_classes(tmp_path / "val", 3)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    shutil.copytree(tmp_path / "val" / CLASSES[0], tmp_path / "flickr8k")
    images = [
        {"filename": f"{i}.jpg", "split": "test" if i else "train", "sentences": [{"raw": f"{i} a"}, {"raw": f"{i} b"}]}
        for i in range(3)
    ]
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    for program, start in (("zero_shot", "15 images of 5 classes: top-1"), ("retrieval", "2 pictures, 4 captions; in")):
        program = f"eval/{program}.py"
        printed = run(program, [*command_of(commands, program), *shlex.split(SMALL[program])])
        assert printed.startswith(start) and "visual tokens per image of 64 patches" in printed

    block = next(block for block in blocks(guide) if "logs/RUN" in block)
    names: dict = {}
    exec(compile(block, "train_towers.md", "exec"), names)
    picture = names["transform"](Image.open(tmp_path / "flickr8k" / "0.jpg"))
    assert names["model"].encode_image(picture[None]).isfinite().all()

    printed = run("scripts/convert_captions.py", ["--input", shards, "--output", "captions"])
    assert "16 pictures" in printed and len(json.loads((tmp_path / "captions" / "chat.json").read_text())) == 16


@pytest.fixture
def own_process_state():
    """accelerate keeps its own for the life of a process."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()  # an earlier test may have left some
    yield
    reset()


def test_train_imagenet_then_plot_and_publish(commands, guide, run, world, tmp_path, repository, own_process_state):
    shutil.copytree(repository / "scripts" / "recipes", tmp_path / "scripts" / "recipes")
    write_classes(tmp_path / "train", 4)
    write_classes(tmp_path / "val", 3)
    program = "scripts/train_imagenet.py"
    arguments = command_of(commands, program)
    assert arguments[0].endswith("imagenet_cpu.yaml")
    run(program, [*arguments, *shlex.split(SMALL[program])])
    (row,) = map(json.loads, (tmp_path / "runs" / "mini" / "epochs.jsonl").read_text().splitlines())
    assert row["step"] == 2 and row["val_images"] == 15 and row["top5"] == 1

    block = next(block for block in blocks(guide) if "OUTPUT" in block)
    names: dict = {}
    exec(compile(block.replace("OUTPUT", "runs/mini"), "train_towers.md", "exec"), names)
    assert names["model"](torch.zeros(1, 3, 64, 64)).shape == (1, 5)

    # On as the tower of a CLIP.
    config = json.loads((repository / "llava_drip/contrastive/configs/DRIP-mini-8-4x.json").read_text())
    config["vision_cfg"]["timm_model_name"] = "local-dir:runs/mini/best"
    (tmp_path / "CLIP").mkdir()
    (tmp_path / "CLIP" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    more, program_clip = commands_in(guide), "scripts/train_clip.py"
    (clip,) = (parts(command)[2] for command in more if "local-dir:CLIP" in command)
    shards = ["--train-data", str(world.clip_shards[0]), "--dataset-type", "webdataset"]
    small = SMALL[program_clip].removeprefix("--model DRIP-mini-8-4x ")
    run(program_clip, [*clip, *shards, "--lr", "0", *shlex.split(small)])
    before, after = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("runs/mini/best", "logs/RUN/tower"))
    assert len(after) > 20 and all(torch.equal(before[name], value) for name, value in after.items())

    for name in ("vit", "drip_2x", "drip_4x"):
        shutil.copytree(tmp_path / "runs" / "mini", tmp_path / "runs" / name)
    assert "| drip_4x | drip_mini_patch8_64_4x | 1 |" in run(
        "scripts/plot_results.py", command_of(more, "scripts/plot_results.py")
    )
    assert (tmp_path / "figures" / "gmacs.png").is_file() and (tmp_path / "figures" / "results.md").is_file()
    assert "nothing was sent" in run("scripts/push_to_hub.py", command_of(more, "scripts/push_to_hub.py"))
    card = (tmp_path / "hub" / "drip-base-4x" / "README.md").read_text()
    assert f"python {program} {shlex.join(arguments)}" in card


def test_align_then_tune(commands, run, world, tiny_language_model, tiny_tower, tmp_path, repository):
    shutil.copytree(repository / "scripts", tmp_path / "scripts")  # for the recipes
    places = {"LANGUAGE_MODEL": tiny_language_model, "TOWER": tiny_tower, "OUT_OF_ALIGN": "aligned"}
    places |= dict.fromkeys(["images", "coco/train2017"], world.images)
    places |= {"blip_laion_cc_sbu_558k.json": world.caption_train, "llava_instruct_150k.json": world.instruct_train}
    for program, out in (("scripts/pretrain_projector.py", "aligned"), ("scripts/finetune.py", "tuned")):
        arguments = command_of(commands, program)
        assert arguments[0].endswith(".yaml") and "OUT" in arguments
        arguments = [str({**places, "OUT": out}.get(word, word)) for word in arguments]
        printed = run(program, [*arguments, *shlex.split(SMALL[program])])
        assert "multi_modal_projector" in printed  # the table of what is trained
        state = json.loads((tmp_path / out / "trainer_state.json").read_text())
        assert state["global_step"] == 2 and (tmp_path / out / "model.safetensors").is_file()


def test_llava_bench(commands, run, tiny_checkpoint, tmp_path):
    images = tmp_path / "bench" / "coco" / "images"
    images.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(images / "0.jpg")
    rows = [{"question_id": i, "image": "0.jpg", "text": f"Question {i}?", "category": "conv"} for i in range(3)]
    questions = tmp_path / "bench" / "coco" / "questions_30x3.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = command_of(commands, "eval/llava_bench.py")
    for flag, value in (("--model", tiny_checkpoint), ("--data", tmp_path / "bench")):
        arguments[arguments.index(flag) + 1] = str(value)
    printed = run("eval/llava_bench.py", [*arguments, *shlex.split(SMALL["eval/llava_bench.py"])])
    answers = Path(re.search(r"^(\S+): 3 answers$", printed, re.M)[1])
    assert [json.loads(line)["question_id"] for line in answers.read_text().splitlines()] == [0, 1, 2]
