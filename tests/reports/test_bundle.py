"""What of a directory is published, and that nothing of the machine goes with it."""

from __future__ import annotations

import json
import shutil

import pytest
from run_folders import epoch, write_run

from llava_drip.reports.bundle import (
    ASSISTANT,
    CLIP,
    TOWER,
    find_bundle,
    stage,
    without_local_paths,
    word_without_local_paths,
)
from llava_drip.reports.card import best_metric
from llava_drip.reports.run import open_run


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/data/imagenet/train", "train"),
        ("--train-data=/data/me/train-{00..10}.tar", "--train-data=train-{00..10}.tar"),
        ("/a/x-{0..1}.tar::/b/y.tar", "x-{0..1}.tar::y.tar"),
        ("/a/{one,two}/x.tar", "x.tar"),
        ("/a/{one,two}.tar", "{one,two}.tar"),
        ("/home/me/My Pictures/train", "train"),
        ("~/pictures/train", "train"),
        ("~me/pictures", "pictures"),
        ("pipe:cat /home/me/x.tar | gunzip", "pipe:cat x.tar | gunzip"),
        ("file:///home/me/x.tar", "x.tar"),
        ("img=/a/b,head=/c/d", "img=b,head=d"),
        ("/data/train/", "train"),
    ],
)
def test_local_paths_of_a_command_are_shown_as_their_last_component(word, shown):
    assert word_without_local_paths(word) == shown


@pytest.mark.parametrize(
    "word",
    [
        *("--lr=1e-3", "data/train", "../train", "./train", "scripts/train_clip.py", "DRIP-B-16-4x", "1/2", "a / b"),
        *("https://example.org/a/b.tar", "s3://bucket/a/b.tar", "hf://datasets/a/b", "pipe:aws s3 cp s3://a/b/c -", ""),
    ],
)
def test_what_is_no_local_path_stays(word):
    assert word_without_local_paths(word) == word


def test_configurations_lose_paths_and_nothing_else():
    config = {"_name_or_path": "/home/me/vicuna", "eos": "</s>", "slash": "/", "think": "/think", "n": 3, "hub": "a/b"}
    clean = without_local_paths({"text": [config, None, "~/x/y"]})
    assert clean == {"text": [config | {"_name_or_path": "vicuna"}, None, "y"]}


def test_kinds(imagenet_run, clip_run, tiny_checkpoint):
    best = find_bundle(imagenet_run)
    assert (best.kind, best.directory, best.run.folder) == (TOWER, imagenet_run / "best", imagenet_run.resolve())
    assert find_bundle(imagenet_run / "last").directory == imagenet_run / "last"
    clip = find_bundle(clip_run)
    assert clip.kind == CLIP and [file.name for file in clip.files] == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    tower = find_bundle(clip_run / "tower")
    assert tower.kind == TOWER and tower.run.model == "DRIP-mini-8-4x"
    assistant = find_bundle(tiny_checkpoint)
    assert assistant.kind == ASSISTANT and assistant.run is None


def test_an_assistant_in_a_towers_run_is_not_what_that_run_trained(imagenet_run, tiny_checkpoint, tmp_path):
    shutil.copytree(imagenet_run, tmp_path / "run")
    shutil.copytree(tiny_checkpoint, tmp_path / "run" / "assistant")
    assert find_bundle(tmp_path / "run" / "assistant").run is None and find_bundle(tmp_path / "run").run is not None


def test_an_assistant_is_staged_without_its_training(tiny_checkpoint, tmp_path):
    source = tmp_path / "assistant"
    shutil.copytree(tiny_checkpoint, source)
    for name in (
        "trainer_state.json",
        "training_args.bin",
        "checkpoint-5/optimizer.pt",
        "runs/events",
        "mm_projector.safetensors",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("/secret/place")
    files = stage(find_bundle(source), tmp_path / "staged")
    assert {file.name for file in files} == {path.name for path in tiny_checkpoint.iterdir() if path.is_file()}
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert config["text_config"]["_name_or_path"].startswith("/")
    config["text_config"]["_name_or_path"] = config["text_config"]["_name_or_path"].split("/")[-1]
    assert json.loads((tmp_path / "staged" / "config.json").read_text()) == config
    for file in files:
        if file.name != "config.json":
            assert file.read_bytes() == (tiny_checkpoint / file.name).read_bytes()


def test_what_is_no_model_is_named(tmp_path, imagenet_run):
    with pytest.raises(ValueError, match="none: no such"):
        find_bundle(tmp_path / "none")
    with pytest.raises(ValueError, match="no model in it"):
        find_bundle(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="no epochs yet"):
        find_bundle(tmp_path)
    config = tmp_path / "config.json"
    for text, message in (
        ("{", "config.json: not valid JSON"),
        ("[]", "config.json: must be a JSON object"),
        ("{}", "neither a timm tower"),
        ('{"model_type": "llava"}', "model_type 'llava', not an assistant of llava_drip"),
        ('{"architecture": "drip_mini_patch8_64_4x"}', "weights are missing"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            find_bundle(tmp_path)


def test_the_best_epoch_is_that_of_averaged_weights_where_there_are_any(tmp_path):
    """As train_imagenet.py chooses what it writes to best/."""
    rows = [epoch(1, top1=0.5, ema_top1=0.2), epoch(2, top1=0.4, ema_top1=0.3)]
    assert best_metric(open_run(write_run(tmp_path / "ema", "train_imagenet.py", "m", rows))) == "ema_top1"
    plain = open_run(write_run(tmp_path / "plain", "train_imagenet.py", "m", [epoch(1, top1=0.5, top5=0.9)]))
    assert best_metric(plain) == "top1"
    assert best_metric(open_run(write_run(tmp_path / "loss", "train_clip.py", "m", [epoch(1)]))) is None
