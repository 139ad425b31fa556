"""Every family of towers in every place for which the package makes towers: a CLIP, a classifier, the assistant."""

from __future__ import annotations

import json
from argparse import Namespace
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from llava_drip.assistant import build_assistant
from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.classification.model import Classifier
from llava_drip.classification.step import Objective, train_step
from llava_drip.contrastive.loss import BoundaryLoss
from llava_drip.contrastive.model import BoundaryCLIP, has_boundaries, patches_of, tower_of
from llava_drip.contrastive.train import train
from llava_drip.engine import Engine
from llava_drip.instruct.freeze import freeze_for
from llava_drip.instruct.row_check import most_visual_tokens
from llava_drip.instruct.templates import VICUNA_V1
from llava_drip.towers.io import load_tower

TOWERS = {  # family → open_clip model with a small tower of it
    "drip": "DRIP-mini-8-4x",
    "dynamicvit": "DynamicViT-mini-8",
    "tokenlearner": "TokenLearner-mini-8",
    "senatra": "SeNaTra-mini",
    "plain": "Plain-ViT-mini-8",
}
COLOURS = ("red", "lime", "blue", "white")

every_tower = pytest.mark.parametrize("clip", TOWERS.values(), ids=TOWERS)
pytestmark = pytest.mark.usefixtures("one_thread")


def timm_name(clip: str) -> str:
    return open_clip.get_model_config(clip)["vision_cfg"]["timm_model_name"]


def squares() -> list[Image.Image]:
    pictures = []
    for i, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (64, 64), "grey")
        picture.paste(colour, (8 * i, 16, 8 * i + 30, 46))
        pictures.append(picture)
    return pictures


def changed(before: dict[str, Tensor], after: torch.nn.Module) -> set[str]:
    return {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}


@every_tower
def test_a_clip_learns_with_it(clip):
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(clip, output_dict=True)
    loss = open_clip.ClipLoss()
    if has_boundaries(model):
        BoundaryCLIP.adopt(model)
        loss = BoundaryLoss(loss, 1.0)
    images = torch.stack([transform(picture) for picture in squares()])
    texts = open_clip.get_tokenizer(clip)([f"a {colour} square" for colour in COLOURS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: value.clone() for name, value in tower_of(model).state_dict().items()}
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        parts = loss(**model.train()(images, texts))
        total = sum(parts.values()) if isinstance(parts, dict) else parts
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0], losses
    learned = changed(before, tower_of(model))
    assert "patch_embed.proj.weight" in learned and any("attn.qkv.weight" in name for name in learned)
    with torch.no_grad():
        features = model.eval().encode_image(images, normalize=True)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(COLOURS)))


@every_tower
def test_the_clip_program_trains_it_and_counts_its_tokens(clip, tmp_path):
    train(
        [
            *(f"--model={clip}", "--dataset-type=synthetic", "--train-num-samples=16", "--batch-size=8", "--epochs=1"),
            *("--device=cpu", "--precision=fp32", "--workers=0", "--warmup=1", f"--logs={tmp_path}", "--name=run"),
        ]
    )
    (row,) = map(json.loads, (tmp_path / "run" / "epochs.jsonl").read_text().splitlines())
    tower = load_tower(str(tmp_path / "run" / "tower"))
    assert row["step"] == 2 and row["compression"] == pytest.approx(patches_of(tower) / row["tokens"])
    if not has_boundaries(open_clip.create_model(clip)):  # as many tokens in training as in eval
        counts = tower.eval().forward_features(torch.zeros(1, 3, *tower.patch_embed.img_size)).lengths
        assert row["tokens"] == float(counts[0])


@every_tower
def test_a_classifier_learns_with_it(clip):
    torch.manual_seed(0)
    classifier = Classifier(timm.create_model(timm_name(clip), num_classes=len(COLOURS)))
    args = Namespace(mixup=0.0, cutmix=0.0, smoothing=0.0, rate_loss_weight=1.0)
    objective, accelerator = Objective(args, len(COLOURS)), Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(classifier, torch.optim.AdamW(classifier.parameters(), lr=1e-3))
    transform = timm.data.create_transform((3, 64, 64), interpolation="bicubic")
    batch = (torch.stack([transform(picture) for picture in squares()]), torch.arange(len(COLOURS)))
    model.train()
    steps = [train_step(accelerator, model, optimizer, objective, [batch], clip_grad=1.0) for _ in range(4)]
    assert steps[-1]["task_loss"] < steps[0]["task_loss"]
    assert 1 <= steps[0]["train_tokens"] <= classifier.patches
    logits, rate_loss, tokens = model.eval()(batch[0])
    assert logits.shape == (4, 4) and rate_loss is None and tokens.shape == (4,)


@every_tower
@pytest.mark.parametrize("layer", [None, -2])
def test_the_assistant_answers_with_it(clip, layer, tiny_language_model, tmp_path):
    torch.manual_seed(0)
    model, processor = build_assistant(
        str(tiny_language_model), timm_name(clip), vision_feature_layer=layer, chat_template=VICUNA_V1
    )
    prompt, pictures = "USER: <image>\nWhat color is the square? ASSISTANT:", squares()[:2]
    inputs = processor(text=[prompt] * 2, images=[[picture] for picture in pictures])
    freeze_for("pretrain", model)
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == model.config.image_token_id, IGNORE_INDEX)
    model.train()(**inputs, labels=labels).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.multi_modal_projector.parameters())
    model.eval()
    counts = model.encode_images(inputs["pixel_values"]).lengths
    answer = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert answer.shape == (2, ids.shape[1] + 6)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    engine = Engine.load(tmp_path, device="cpu")
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is it?"}]}]
    (reply,) = engine.answer_batch([(message, pictures[:1])], max_new_tokens=4)
    assert 1 <= reply.usage.new_tokens <= 4
    assert reply.usage.visual_tokens == engine.segments(pictures[0])[0] == int(counts[0])


FEWER = {"SeNaTra-mini": 16, "TokenLearner-mini-8": 8}  # of 1,024 and 64 patches, in every picture


@every_tower
def test_room_is_kept_for_as_many_tokens_as_there_can_be(clip):
    tower = timm.create_model(timm_name(clip), num_classes=0).eval()
    most = most_visual_tokens(SimpleNamespace(vision_tower=tower))
    assert most == FEWER.get(clip, tower.patch_embed.num_patches)
    with torch.no_grad():
        assert tower.forward_features(torch.randn(2, 3, 64, 64)).lengths.max() <= most
