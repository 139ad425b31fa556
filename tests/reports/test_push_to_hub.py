"""Uploads by huggingface_hub's own client to an HTTP server, and the cards' own code loads the models back from there."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import READ_ONLY, TOKEN, running_hub
from huggingface_hub import close_session, constants
from run_folders import epoch, write_run

OUTPUTS = {
    "tower": "output = model(pixels)",
    "clip": "output = model.eval().encode_image(pixels)",
    "assistant": """
from PIL import Image
picture = Image.fromarray((pixels[0].permute(1, 2, 0) * 40 + 128).clamp(0, 255).byte().numpy())
inputs = processor(text="USER: <image>\\nWhat? ASSISTANT:", images=picture, return_tensors="pt")
output = model.eval()(**inputs).logits
""",
}
LOCAL = {
    "tower": "import timm, llava_drip\nmodel = timm.create_model('local-dir:{0}', pretrained=True).eval()",
    "clip": "import open_clip, llava_drip\nmodel, _, _ = open_clip.create_model_and_transforms('local-dir:{0}')",
    "assistant": "import llava_drip\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n"
    "model, processor = AutoModelForImageTextToText.from_pretrained('{0}'), AutoProcessor.from_pretrained('{0}')",
}


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of a machine without a login; xet, the Hub's other way to store large files, is switched off."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**kept, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1", **more}


@pytest.fixture
def push(repository, tmp_path, monkeypatch, capsys):
    """Runs the program as on that machine, in tmp_path; (exit status, stdout, stderr)."""

    def call(*arguments, endpoint: str = "http://127.0.0.1:9", token: str | None = None, offline: bool = False):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *map(str, arguments)])
        # What huggingface_hub reads from the environment when it is first imported.
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        close_session()
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(repository / "scripts" / "push_to_hub.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    yield call
    close_session()


def code_of(load: str, kind: str) -> str:
    """Code that loads a model, gives it fixed pixels and has its numbers as `output`."""
    lines = [
        *("import torch, json", load, "torch.manual_seed(0)", "pixels = torch.randn(2, 3, 64, 64)"),
        *("with torch.no_grad():", *("    " + line for line in OUTPUTS[kind].strip().splitlines())),
        "output = output.flatten().tolist()[:500]",
    ]
    return "\n".join(lines)


def output_elsewhere(load: str, kind: str, repository: Path, home: Path, **env: str) -> list:
    """The numbers in a process of its own, on a machine that has nothing of the Hub yet."""
    home.mkdir()
    env = environment(home, PYTHONPATH=str(repository), **env)
    call = [sys.executable, "-c", code_of(load, kind) + "\nprint('OUTPUT', json.dumps(output))"]
    done = subprocess.run(call, cwd=home, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("OUTPUT")[1])


def card_of(text: str) -> tuple[dict, str]:
    """(metadata, the code that loads the model)."""
    metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    return metadata, re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("tower", "clip")), "assistant"]
)
def test_a_model_goes_up_and_its_card_brings_it_back(kind, hub, push, tmp_path, repository, request):
    fixture = {"tower": "imagenet_run", "clip": "clip_run", "assistant": "tiny_checkpoint"}[kind]
    run = request.getfixturevalue(fixture)
    place = {"HF_ENDPOINT": hub.endpoint}
    flags = ["--repo", "me/model", "--licence", "mit", "--private"]
    code, out, err = push(run, *flags, endpoint=hub.endpoint, token=TOKEN)
    assert code == 0, err
    assert f"uploaded: {hub.endpoint}/me/model" in out
    files = hub.repos["me/model"]["main"]
    weights = "open_clip_model.safetensors" if kind == "clip" else "model.safetensors"
    assert {"README.md", weights} < set(files) and hub.private["me/model"] and hub.messages == ["Upload model"]
    source = run / "best" if kind == "tower" else run
    assert files[weights] == (source / weights).read_bytes()
    assert not [name for name, content in files.items() if b"/secret" in content or "optimizer" in name]
    assert str(run.parent).encode() not in b"".join(files.values())

    metadata, code = card_of(files["README.md"].decode())
    assert metadata["license"] == "mit" and "drip" in metadata["tags"]
    assert metadata["library_name"] == {"tower": "timm", "clip": "open_clip", "assistant": "transformers"}[kind]
    there = output_elsewhere(code, kind, repository, tmp_path / "there", **place)
    here: dict = {}
    exec(code_of(LOCAL[kind].format(source), kind), here)
    assert there == pytest.approx(here["output"], rel=1e-4, abs=1e-5) and len(set(there)) > 10


def test_the_card_tells_what_the_run_recorded(imagenet_run, push, tmp_path):
    flags = [imagenet_run, "--repo=me/drip", "--licence=apache-2.0", "--dry-run"]
    code, out, err = push(*flags, "--datasets=imagenet-1k")
    assert code == 0, err
    folder = tmp_path / "hub" / "drip"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    size = (folder / "model.safetensors").stat().st_size
    assert re.search(rf"{size:,}  model.safetensors\n", out) and "nothing was sent" in out
    text = (folder / "README.md").read_text()
    metadata, _ = card_of(text)
    result = metadata["model-index"][0]["results"][0]
    assert metadata["datasets"] == ["imagenet-1k"] and result["dataset"]["type"] == "imagenet-1k"
    assert {metric["name"]: metric["value"] for metric in result["metrics"]} == {  # of best/, the second epoch
        "top-1 accuracy": 35.0,
        "top-5 accuracy": 80.0,
    }
    assert "| top-1 accuracy | 30.00% | 35.00% |" in text and "best epoch (2, by top-1 accuracy), these weights" in text
    assert "python scripts/train_imagenet.py --model drip_mini_patch8_64_4x '--train-data=train-{00..01}.tar'" in text
    assert "4.00x (3.20 .. 5.10)" in text and "| step (s, median) | 0.300 | 0.200 |" in text
    assert "torch 2.15.0" in text and "475,835" in text and "/secret" not in text

    code, _, err = push(*flags)
    assert code == 1 and "hub/drip: exists already" in err
    # A card beside the model says which licence it has.
    code, out, err = push(folder, "--repo=me/drip", "--dry-run", "--output=second")
    assert code == 0 and "licence apache-2.0" in out, err


def test_a_towers_card_of_a_clip_does_not_claim_the_clips_numbers(clip_run, push, tmp_path):
    code, _, err = push(clip_run / "tower", "--repo=me/tower", "--licence=mit", "--dry-run", "--output=tower")
    assert code == 0, err
    text = (tmp_path / "tower" / "README.md").read_text()
    metadata, _ = card_of(text)
    assert "model-index" not in metadata and metadata["pipeline_tag"] == "image-feature-extraction"
    assert "Of the whole CLIP, whose image tower this is" in text and "zero-shot top-1 accuracy | 20.00%" in text


def metadata_and_text(folder: Path) -> tuple[dict, str]:
    text = (folder / "README.md").read_text()
    return card_of(text)[0], text


def test_a_clips_numbers_are_of_the_data_that_they_were_measured_on(clip_run, push, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(clip_run, run)
    (run / "epochs.jsonl").unlink()
    flags = {"train_data": "/secret/laion.tar", "zeroshot_data": "/secret/val", "retrieval_data": "/secret/flickr.json"}
    scores = {"zero_shot_top1": 0.4, "text_to_image_R@1": 0.1}
    rows = [epoch(1, **scores)]
    write_run(run, "train_clip.py", "local-dir:/secret/model", rows, flags={**flags, "world_size": 4})
    card = ["--repo=me/clip", "--licence=mit", "--datasets=laion/laion400m", "--dry-run", "--output=clip"]
    code, _, err = push(run, *card)
    assert code == 0, err
    metadata, text = metadata_and_text(tmp_path / "clip")
    found = {each["dataset"]["name"]: each["metrics"][0] for each in metadata["model-index"][0]["results"]}
    assert found["val"]["name"] == "zero-shot top-1 accuracy" and found["val"]["type"] == "accuracy"
    assert found["flickr.json"]["name"] == "text-to-image recall@1" and len(found) == 2
    assert "Evaluated on: val, flickr.json" in text and "/secret" not in text
    assert "torchrun --nproc_per_node 4 -- scripts/train_clip.py" in text

    # A folder of this machine as its tower: loads nowhere else.
    config = json.loads((run / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = "local-dir:/secret/best"
    (run / "open_clip_config.json").write_text(json.dumps(config))
    code, _, err = push(run, *card)
    assert code == 1 and "its tower is local-dir:/secret/best" in err and len(err.splitlines()) == 1


def test_averaged_weights_do_not_claim_the_numbers_of_the_others(imagenet_run, push, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(imagenet_run, run)
    (run / "epochs.jsonl").unlink()
    scores = {"top1": 0.5, "top5": 0.7, "ema_top1": 0.4, "ema_top5": 0.6}
    write_run(run, "train_imagenet.py", "drip_mini_patch8_64_4x", [epoch(1, **scores)])
    code, _, err = push(run / "last", "--repo=me/drip", "--licence=mit", "--dry-run", "--output=drip")
    assert code == 0, err
    metadata, text = metadata_and_text(tmp_path / "drip")
    (result,) = metadata["model-index"][0]["results"]
    assert [metric["value"] for metric in result["metrics"]] == [40.0, 60.0]
    assert "The weights are the averaged ones." in text and "| top-1 accuracy | 50.00% |" in text


def test_a_branch_and_a_second_upload(hub, imagenet_run, push, tmp_path):
    flags, there = (
        [imagenet_run / "last", "--repo=me/drip", "--licence=mit"],
        {"endpoint": hub.endpoint, "token": TOKEN},
    )
    code, _, err = push(*flags, "--message=First", **there)
    assert code == 0, err
    code, out, err = push(*flags, "--revision=seed-1", "--message=Second", "--output=kept", **there)
    assert code == 0 and out.strip().endswith("/me/drip/tree/seed-1"), err
    assert hub.messages == ["First", "Second"] and not hub.private["me/drip"]
    assert hub.repos["me/drip"]["main"].keys() == hub.repos["me/drip"]["seed-1"].keys()
    assert (tmp_path / "kept" / "model.safetensors").read_bytes() == hub.repos["me/drip"]["seed-1"]["model.safetensors"]


def test_mistakes_are_one_line(hub, imagenet_run, push):
    model, there = [imagenet_run, "--repo=me/drip", "--licence=mit"], {"endpoint": hub.endpoint}
    for arguments, machine, message in (
        (["none", *model[1:]], there, "none: no such run or model directory"),
        (model[:2], there, "--licence: none is known"),
        ([imagenet_run, "--repo=drip", "--licence=mit"], there, "--repo drip: must be user/name"),
        ([imagenet_run, "--repo=me/a b", "--licence=mit"], there, "--repo me/a b"),
        (model, there, "no token of the Hugging Face Hub: run `hf auth login` or set HF_TOKEN"),
        (model, there | {"token": "hf_wrong"}, "HTTP 401: Invalid username or password.); the token is not valid"),
        (model, there | {"token": READ_ONLY}, "HTTP 403"),
        (model, {"token": TOKEN}, "http://127.0.0.1:9: not reachable"),
        (model, there | {"token": TOKEN, "offline": True}, "HF_HUB_OFFLINE is set"),
    ):
        code, _, err = push(*arguments, **machine)
        assert code == 1 and len(err.splitlines()) == 1 and message in err, err
        assert "hf_" not in err  # no token is printed
    assert hub.repos == {}
