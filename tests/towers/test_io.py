"""Towers on disk: what is saved is what is loaded, here and by timm itself."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from llava_drip.towers.io import describe_tower, load_tower, save_tower

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
ARGUMENTS = {"compression": 2.5, "pool_after": 3, "depth": 4, "class_token": True, "global_pool": "token"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    tower = timm.create_model("drip_mini_patch8_64_4x", num_classes=0, **ARGUMENTS).eval()
    return tower, save_tower(tower, tmp_path_factory.mktemp("tower"), MEAN, STD)


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("load", [load_tower, lambda d: timm.create_model(f"local-dir:{d}", pretrained=True)])
def test_round_trip(saved, load):
    tower, directory = saved
    again = load(str(directory)).eval()
    assert again.compression == 2.5 and again.pool_after == 3 and again.num_prefix_tokens == 1
    state = again.state_dict()
    assert state.keys() == tower.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in tower.state_dict().items())
    a, b = tower.forward_features(pictures()), again.forward_features(pictures())
    assert torch.equal(a.values, b.values) and torch.equal(a.lengths, b.lengths)


def test_arguments_win_over_the_recorded_ones(saved):
    again = load_tower(str(saved[1]), compression=8.0)
    assert again.compression == 8.0 and again.pool_after == 3


def test_description_rebuilds_the_tower(saved):
    tower, directory = saved
    described = describe_tower(load_tower(str(directory)))
    assert described["image_size"] == 64
    assert described["mean"] == list(MEAN) and described["std"] == list(STD)
    assert json.loads(json.dumps(described)) == described, "goes into a config.json"
    rebuilt = timm.create_model(described["architecture"], num_classes=0, **described["model_args"])
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in tower.state_dict().items()}
    assert rebuilt.compression == 2.5


def test_a_name_gives_random_weights():
    tower = load_tower("drip_mini_patch8_64_4x", depth=3)
    assert tower.num_classes == 0 and len(tower.blocks) == 3


def test_a_budget_is_kept_unless_it_is_one_for_each_image(tmp_path):
    tower = timm.create_model("drip_mini_patch8_64_4x", num_classes=0, depth=2)
    for budget, kept, tokens in ((8.0, 8.0, [8, 8]), (torch.tensor([2.0, 4.0]), None, None), (1.0, 1.0, [64, 64])):
        tower.set_compression(budget)
        directory = save_tower(tower, tmp_path / str(kept), MEAN, STD)
        for load in (load_tower, lambda d: timm.create_model(f"local-dir:{d}", pretrained=True)):
            again = load(str(directory)).eval()
            assert again.compression == 4.0 and (again.budget is None if kept is None else again.budget == kept)
            if tokens is not None:
                assert again.forward_features(pictures()).lengths.tolist() == tokens
    assert load_tower(str(directory), compression=2.0).budget is None  # what is asked for wins over what was saved
    again.set_compression(None)  # nothing of the budget it came with stays
    assert "budget" not in {**describe_tower(again), **describe_tower(again)["model_args"]}
    assert load_tower(str(save_tower(again, tmp_path / "again", MEAN, STD))).budget is None


@pytest.mark.parametrize(
    "name, lack", [("resnet18", "patch_embed"), ("vit_relpos_small_patch16_224", "forward_features.x, layer")]
)
def test_a_stock_timm_model_is_no_tower(name, lack):
    with pytest.raises(
        ValueError, match=rf"{name}: not a vision tower, .* without .*{lack}.*drip_base_patch16_224, say"
    ):
        load_tower(name)


def test_the_plain_vit_has_a_name():
    torch.manual_seed(0)
    tower = load_tower("drip_base_patch16_224_1x", img_size=64, depth=2).eval()
    plain = timm.create_model(
        "vit_base_patch16_224", img_size=64, depth=2, num_classes=0, class_token=False, global_pool="avg"
    ).eval()
    plain.load_state_dict({k: v for k, v in tower.state_dict().items() if not k.startswith("boundary_predictor.")})
    tokens = tower.forward_features(pictures())
    assert tokens.lengths.tolist() == [16, 16]
    torch.testing.assert_close(tower.forward_head(tokens), plain(pictures()), atol=1e-4, rtol=0)


def test_what_is_no_tower_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no_such_tower: neither a tower directory nor a model name"):
        load_tower("no_such_tower")
    with pytest.raises(ValueError, match=r"config.json and model.safetensors missing"):
        load_tower(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tower directory, model.safetensors missing"):
        load_tower(str(tmp_path))


def rewrite(name: str, text: str | bytes):
    return lambda d: (d / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def configure(**changes):
    def spoil(directory) -> None:
        recorded = json.loads((directory / "config.json").read_text())
        for key, value in changes.items():
            recorded[key] = {**recorded[key], **value} if isinstance(value, dict) else value
        (directory / "config.json").write_text(json.dumps(recorded))

    return spoil


def cut(length: float):
    def spoil(directory) -> None:
        whole = (directory / "model.safetensors").read_bytes()
        (directory / "model.safetensors").write_bytes(whole[: int(length * len(whole))])

    return spoil


def drop_a_weight(directory) -> None:
    weights = load_file(directory / "model.safetensors")
    weights.pop("blocks.1.attn.qkv.weight")
    save_file(weights, directory / "model.safetensors")


def weights_of_another(directory) -> None:
    other = timm.create_model("drip_mini_patch8_64_4x", num_classes=0, depth=2, embed_dim=48)
    save_file(other.state_dict(), directory / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "file", "words"),
    [
        (cut(0.5), "model.safetensors", "cannot be read"),
        (cut(0), "model.safetensors", "cannot be read"),
        (rewrite("model.safetensors", b"x" * 1000), "model.safetensors", "cannot be read"),
        (drop_a_weight, "model.safetensors", r"not the weights of the tower in .*blocks\.1\.attn\.qkv\.weight"),
        (weights_of_another, "model.safetensors", "not the weights of the tower in .*config.json"),
        (configure(architecture="drip_tiny_patch16_224"), "model.safetensors", "not the weights of the tower"),
        (rewrite("config.json", "{"), "config.json", "not valid JSON"),
        (rewrite("config.json", ""), "config.json", "not valid JSON"),
        (rewrite("config.json", b"\xff\xfe{"), "config.json", "not valid JSON"),
        (rewrite("config.json", "[" * 100_000), "config.json", "not valid JSON"),
        (rewrite("config.json", "{}"), "config.json", "must be an object that names an 'architecture'"),
        (rewrite("config.json", "[]"), "config.json", "must be an object that names an 'architecture'"),
        (configure(architecture=7), "config.json", "must be an object that names an 'architecture'"),
        (configure(architecture="no_such_tower"), "config.json", r"'no_such_tower' is no model .*list_models"),
        (configure(model_args=[1]), "config.json", "'model_args' must be an object"),
        (configure(model_args={"nonsense": 3}), "config.json", "makes no tower: .*'nonsense'"),
        (
            configure(model_args={"compression": 0.5}),
            "config.json",
            "makes no tower: compression must be a number, at least 1",
        ),
        (configure(pretrained_cfg=3), "config.json", "'pretrained_cfg' must be an object"),
        (configure(pretrained_cfg={"nonsense": 3}), "config.json", "makes no tower: .*'nonsense'"),
    ],
)
def test_a_damaged_tower_is_one_line_that_names_the_file(saved, tmp_path, spoil, file, words):
    directory = tmp_path / "spoilt"
    shutil.copytree(saved[1], directory)
    spoil(directory)
    with pytest.raises(ValueError, match=f"^[^ ]*spoilt/{file}: .*{words}") as caught:
        load_tower(str(directory))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000 and "copy the tower's directory anew" in message


def test_what_cannot_be_made_of_a_name_is_one_line(saved):
    with pytest.raises(
        ValueError, match=r"^drip_base_patch16_224\.foo: .* no pretrained weights 'foo' .*leave out '\.foo'$"
    ):
        load_tower("drip_base_patch16_224.foo")
    with pytest.raises(ValueError, match=r"^drip_mini_patch8_64_4x with depht=3: cannot be made: .*'depht'$"):
        load_tower("drip_mini_patch8_64_4x", depht=3)
    with pytest.raises(ValueError, match=r"config.json with compression=0.5: makes no tower: compression must be"):
        load_tower(str(saved[1]), compression=0.5)


def test_a_tower_stays_until_the_new_one_is_whole(saved, tmp_path):
    directory = tmp_path / "tower"
    shutil.copytree(saved[1], directory)
    (directory / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    other = timm.create_model("drip_mini_patch8_64_4x", num_classes=0, depth=2)
    other.model_args["of_no_json"] = object()  # fails after the weights are written
    with pytest.raises(ValueError, match="of_no_json"):
        save_tower(other, directory, MEAN, STD)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    del other.model_args["of_no_json"]
    save_tower(other, directory, MEAN, STD)
    assert len(load_tower(str(directory)).blocks) == 2
    assert {path.name for path in directory.iterdir()} == before.keys()


def test_a_runs_folder_means_its_tower(tmp_path):
    """As train_imagenet.py (best/, last/) and train_clip.py (tower/) leave them."""
    torch.manual_seed(0)
    tower = timm.create_model("drip_mini_patch8_64_4x", num_classes=0)
    save_tower(tower, tmp_path / "RUN" / "tower", (0.5,) * 3, (0.5,) * 3)
    (tmp_path / "RUN" / "config.json").write_text("{}")
    for name in ("RUN", "RUN/tower"):
        loaded = load_tower(tmp_path / name)
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in tower.state_dict().items())
