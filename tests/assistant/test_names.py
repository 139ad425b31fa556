"""Language models by the Hub's names: from its cache, from a server that speaks its protocol, and without either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import running_hub
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llava_drip.assistant import build_assistant
from llava_drip.assistant.bin_weights import convert_weights
from llava_drip.assistant.build import check_checkpoint
from llava_drip.assistant.names import hub_name, model_directory


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub, which cannot be reached."""
    for name, value in (("HF_HUB_CACHE", tmp_path / "hub"), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, str(value) if isinstance(value, Path) else value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache, monkeypatch, tiny_language_model):
    """The Hub, with the tiny language model as someone/tiny, and in its revision `old` with other weights."""
    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        files = {file.name: file.read_bytes() for file in tiny_language_model.iterdir()}
        extra = {
            "onnx/model.json": b"{}",
            "pytorch_model.bin": b"no",
            "README.md": b"read",
            "consolidated.safetensors": b"",
        }
        config = json.loads(files["config.json"])
        old = {**files, "config.json": json.dumps({**config, "rope_theta": 5.0}).encode()}
        server.repos["someone/tiny"] = {"main": {**files, **extra}, "old": old}
        yield server


def test_what_is_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub_name("lmsys/vicuna-7b-v1.5") == ("lmsys/vicuna-7b-v1.5", None)
    assert hub_name("Qwen/Qwen2.5-0.5B@refs/pr/1") == ("Qwen/Qwen2.5-0.5B", "refs/pr/1")
    for path in ("runs/mistyped", "/a/b", "a", "a/b/c", "./a", "~/a", "a/b@"):
        assert hub_name(path) is None
        with pytest.raises(ValueError, match="no such folder, a model directory is needed"):
            model_directory(path)


def test_a_model_is_downloaded_once(hub, cache, monkeypatch, tiny_language_model, tiny_tower):
    path = model_directory("someone/tiny")
    assert cache in path.parents
    assert {file.name for file in path.iterdir()} == {file.name for file in tiny_language_model.iterdir()}
    for name in ("config.json", "model.safetensors"):
        assert (path / name).read_bytes() == (tiny_language_model / name).read_bytes()
    other = model_directory("someone/tiny@old")
    assert other != path and json.loads((other / "config.json").read_text())["rope_theta"] == 5.0

    # From now on the cache is enough, with the Hub switched off, out of reach, or holding something newer.
    hub.repos["someone/tiny"]["main"]["config.json"] = b"{}"
    assert model_directory("someone/tiny") == path
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert check_checkpoint("someone/tiny") == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model, processor = build_assistant("someone/tiny", str(tiny_tower))
    assert model.config.text_config.hidden_size == 64 and processor.tokenizer.is_fast


def test_a_download_that_was_cut_off_goes_on(hub, cache, monkeypatch):
    whole = model_directory("someone/tiny")
    (whole / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"someone/tiny: no such folder, and not \(whole\) in the cache .* HF_HUB_OFFLINE"
    ):
        model_directory("someone/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert (model_directory("someone/tiny") / "model.safetensors").is_file()


def test_what_cannot_be_had_is_one_line(hub, monkeypatch):
    cases = {
        "someone/nothing": "someone/nothing: no such folder, and no repository of that name on the Hub",
        "someone/tiny@gone": "someone/tiny@gone: no such folder, and someone/tiny has no revision 'gone' on the Hub",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError) as error:
            model_directory(name)
        assert message in str(error.value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ValueError, match=r"no such folder, and the Hub \(http://127.0.0.1:9\) cannot be reached for it: "
    ):
        model_directory("someone/nothing")


def test_a_cache_that_cannot_be_written(hub, tmp_path, monkeypatch):
    """It is not the Hub's fault. (A file in its way, for no rights stop root, who runs tests in containers.)"""
    (tmp_path / "full").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "full" / "hub"))
    with pytest.raises(ValueError) as error:
        model_directory("someone/tiny")
    assert f"cache {tmp_path}/full/hub cannot be written: [Errno 20] Not a directory" in str(error.value)
    assert "HF_HOME" in str(error.value)


# Weights in torch's older format


def older(directory: Path, target: Path, shards: int, zipped: bool = True) -> Path:
    """The model with its weights in pytorch_model*.bin, as save_pretrained wrote them once; not zipped: before torch 1.6."""
    shutil.copytree(directory, target)
    state = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, target / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return target
    places = {key: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, key in enumerate(sorted(state))}
    for name in set(places.values()):
        torch.save({key: state[key] for key, place in places.items() if place == name}, target / name)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return target


@pytest.mark.parametrize("shards, zipped", [(1, True), (1, False), (3, True)])
def test_older_weights_are_converted(shards, zipped, tmp_path, tiny_language_model, tiny_tower):
    source = older(tiny_language_model, tmp_path / "older", shards, zipped)
    with pytest.raises(
        ValueError, match=r"older: no \*.safetensors weights .* python scripts/convert_weights.py .*older "
    ):
        check_checkpoint(source)
    made = convert_weights(source, tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "older"]
    assert not list(made.glob("*.bin*")) and len(list(made.glob("*.safetensors"))) == shards
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (made, tiny_language_model))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    build_assistant(str(made), str(tiny_tower))


def test_older_weights_of_the_hub(hub, tmp_path, tiny_language_model, repository, run_script):
    source = older(tiny_language_model, tmp_path / "older", 2)
    hub.repos["someone/older"] = {"main": {file.name: file.read_bytes() for file in source.iterdir()}}
    with pytest.raises(
        ValueError, match=r"someone/older: has no \*.safetensors on the Hub; .*convert_weights.py someone/older"
    ):
        check_checkpoint("someone/older")
    program = repository / "scripts" / "convert_weights.py"
    done = run_script(program, "someone/older", "--output", tmp_path / "made")
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path / 'made'}\n", done.stderr
    assert check_checkpoint(tmp_path / "made")
    done = run_script(program, "someone/older", "--output", tmp_path / "made")
    assert done.returncode == 1 and "made: exists already" in done.stderr and done.stderr.count("\n") == 1


class Harm:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_that_runs_code_does_not(tmp_path, tiny_language_model, capsys):
    source = older(tiny_language_model, tmp_path / "older", 3)
    shard = source / "pytorch_model-00002-of-00003.bin"
    for content, message in (
        ({"a": Harm()}, "cannot be read as tensors alone"),
        ({"a": 1}, "other than named tensors"),
    ):
        torch.save(content, shard)
        with pytest.raises(ValueError, match=f"{shard.name}: .*{message}"):
            convert_weights(source, tmp_path / "made")
    shard.unlink()
    with pytest.raises(ValueError, match=f"1 of 3 files of weights are missing, first {shard.name}"):
        convert_weights(source, tmp_path / "made")
    assert "this ran" not in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == ["older"]
    with pytest.raises(ValueError, match="nothing is to be converted"):
        convert_weights(tiny_language_model, tmp_path / "made")
