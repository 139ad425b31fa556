"""What can be trained: from scratch, from weights of several kinds, frozen, at another size; and that it learns."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from llava_drip.classification.model import Classifier, create, data_config_of, frozen_hash
from llava_drip.classification.run import make_classifier
from llava_drip.towers.directories import tower_directory
from llava_drip.towers.io import load_tower, save_tower

from .helpers import MODEL, NAMES, losses, rows, run, weights
from .test_flags import parsed

MEAN = STD = (0.5, 0.5, 0.5)


def classifier_of(*flags: str, num_classes: int = len(NAMES)) -> Classifier:
    return make_classifier(parsed("--train-data=x", "--output=y", *flags), num_classes)


def test_from_scratch_the_loss_falls(trained):
    first, last = rows(trained, "epochs")[0], rows(trained, "epochs")[-1]
    assert last["loss"] < first["loss"] - 0.3 and last["top1"] > 0.4  # by chance 0.17
    assert last["epoch"] == 6 and last["step"] == 36
    for row in (first, last):
        assert {"task_loss", "rate_loss", "val_loss", "top5", "lr", "images_per_second", "skipped"} <= set(row)
        assert 0.9 * row["compression_p5"] <= row["compression"] <= 1.1 * row["compression_p95"]
        assert row["tokens"] * row["compression"] == pytest.approx(64)
        assert row["loss"] == pytest.approx(row["task_loss"] + 5 * row["rate_loss"])
        assert row["val_images"] == 22


def test_a_probe_trains_the_classifier_alone(trained, flags, tmp_path):
    output = run(f"--model={trained}", "--freeze=backbone", *flags, "--epochs=4", "--lr=1e-2", f"--output={tmp_path}")
    before, after = weights(trained, "best"), weights(output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert rows(output, "epochs")[-1]["loss"] < rows(output, "epochs")[0]["loss"]
    assert "rate_loss" not in rows(output)[0]


def test_the_hash_covers_what_is_frozen():
    classifier = classifier_of(f"--model={MODEL}", "--freeze=backbone")
    before = frozen_hash(classifier)
    with torch.no_grad():
        classifier.model.head.weight.add_(1)
        assert frozen_hash(classifier) == before
        classifier.model.blocks[2].norm1.bias[0] += 1e-6
    assert frozen_hash(classifier) != before
    assert frozen_hash(classifier_of(f"--model={MODEL}")) is None
    classifier.train()
    assert not classifier.model.blocks[0].training and classifier.model.head.training


def test_full_fine_tuning_begins_where_the_other_ended(trained, flags, tmp_path):
    output = run(f"--model={trained}/last", *flags, "--lr=1e-4", f"--output={tmp_path}")
    assert losses(output)[0] < rows(trained, "epochs")[0]["loss"] - 0.3
    assert not torch.equal(weights(output)["blocks.0.attn.qkv.weight"], weights(trained)["blocks.0.attn.qkv.weight"])


def test_another_number_of_classes_starts_a_new_classifier(trained):
    same, other = classifier_of(f"--model={trained}"), classifier_of(f"--model={trained}", num_classes=9)
    saved = weights(trained, "best")
    assert torch.equal(same.model.head.weight, saved["head.weight"])
    assert other.model.head.weight.shape == (9, 96)
    assert torch.equal(other.model.blocks[3].mlp.fc1.weight, saved["blocks.3.mlp.fc1.weight"])


def test_another_size_interpolates_positions_as_timm_does(trained, flags, tmp_path):
    classifier = classifier_of(f"--model={trained}", "--img-size=96")
    expected = resample_abs_pos_embed(weights(trained, "best")["pos_embed"], [12, 12], [8, 8], num_prefix_tokens=0)
    torch.testing.assert_close(classifier.model.pos_embed.detach(), expected)
    assert (classifier.input_size, classifier.patches) == ((96, 96), 144)
    output = run(f"--model={trained}", "--img-size=96", *flags, "--epochs=1", f"--output={tmp_path}")
    assert load_tower(str(output / "last")).patch_embed.grid_size == (12, 12)
    assert rows(output, "epochs")[0]["tokens"] * rows(output, "epochs")[0]["compression"] == pytest.approx(144)


def tiny_open_clip(**vision) -> open_clip.CLIP:
    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16, **vision}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_open_clip_checkpoint_lands_in_timms_vit(wrapped, tmp_path):
    """The state dict has ViT-B-32's names (visual.class_embedding, ...), as laion2b_s34b_b79k has."""
    clip = tiny_open_clip().eval()
    state = clip.state_dict()
    torch.save({"epoch": 1, "state_dict": state} if wrapped else state, tmp_path / "clip.pt")
    shape = ["embed_dim=64", "depth=2", "num_heads=2", "patch_size=16"]
    flags = ["--model=vit_base_patch32_clip_224.laion2b", "--img-size=64", f"--initial-checkpoint={tmp_path}/clip.pt"]
    model = classifier_of(*flags, "--model-kwargs", *shape).model.eval()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        ours = model.forward_head(model.forward_features(pixels), pre_logits=True)
        clip.visual.proj = None  # the features that the projection gets
        theirs = clip.visual(pixels)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert model.head.weight.shape == (6, 64)
    assert data_config_of(model)["mean"] == open_clip.OPENAI_DATASET_MEAN
    larger = classifier_of(*flags[::2], "--img-size=96", "--model-kwargs", *shape).model
    expected = resample_abs_pos_embed(model.pos_embed.detach(), [6, 6], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(larger.pos_embed.detach(), expected)


def test_a_tower_of_train_clip(flags, tmp_path):
    """logs/RUN/tower, named by itself or by the run's folder."""
    torch.manual_seed(0)
    tower = timm.create_model(MODEL, num_classes=0)
    save_tower(tower, tmp_path / "RUN" / "tower", MEAN, STD)
    for name in (tmp_path / "RUN", tmp_path / "RUN" / "tower"):
        assert tower_directory(str(name)) == tmp_path / "RUN" / "tower"
        classifier = classifier_of(f"--model={name}", "--freeze=backbone")
        assert torch.equal(classifier.model.blocks[1].attn.qkv.weight, tower.blocks[1].attn.qkv.weight)
        assert tuple(data_config_of(classifier.model)["mean"]) == MEAN
    output = run(f"--model={tmp_path}/RUN", "--freeze=backbone", *flags, "--epochs=1", f"--output={tmp_path}/out")
    assert torch.equal(weights(output)["blocks.1.attn.qkv.weight"], tower.blocks[1].attn.qkv.weight)


SMALL_VIT = ["--img-size=64", "--model-kwargs", "embed_dim=48", "depth=2", "num_heads=2"]


@pytest.mark.parametrize("model", [["vit_tiny_patch16_224", *SMALL_VIT], ["resnet10t", "--img-size=64"]])
def test_timms_own_models(model, flags, data, tmp_path):
    output = run(f"--model={model[0]}", *model[1:], *flags, "--epochs=1", f"--output={tmp_path}")
    row = rows(output, "epochs")[0]
    assert "compression" not in row and "rate_loss" not in row and row["val_images"] == 22
    again = timm.create_model(f"local-dir:{output}/last", pretrained=True)
    assert again.num_classes == 6 and data_config_of(again)["input_size"] == (3, 64, 64)


def test_drop_path_and_checkpointing_reach_the_model():
    model = classifier_of(f"--model={MODEL}", "--drop-path=0.2", "--grad-checkpointing", "--compression=2").model
    assert model.blocks[3].drop_path1.drop_prob == pytest.approx(0.2)
    assert model.grad_checkpointing and model.compression == 2


def test_a_dense_tower_leaves_no_parameter_without_gradient(tmp_path):
    """DistributedDataParallel would wait for it: at compression 1, and with a saved budget of 1."""
    tower = timm.create_model(MODEL, num_classes=0)
    tower.set_compression(1.0)
    save_tower(tower, tmp_path, MEAN, STD)
    for flags in (["--model=drip_mini_patch8_64_1x"], [f"--model={tmp_path}"], [f"--model={MODEL}"]):
        classifier = classifier_of(*flags).train()
        logits, rate, _ = classifier(torch.rand(4, 3, 64, 64))
        (logits.sum() + (0 if rate is None else rate.sum())).backward()
        without = [name for name, p in classifier.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []
    classifier = classifier_of(f"--model={MODEL}", "--model-kwargs", "boundary=uniform").train()
    logits, rate, tokens = classifier(torch.rand(4, 3, 64, 64))
    logits.sum().backward()
    assert rate is None and tokens.tolist() == [16] * 4
    assert all(p.grad is not None for p in classifier.parameters())


def test_a_model_without_classifier_is_no_probe():
    with pytest.raises(ValueError, match="--freeze backbone: .* has no classifier"):
        Classifier(create(parsed(f"--model={MODEL}", "--train-data=x", "--output=y"), 0), freeze_backbone=True)
