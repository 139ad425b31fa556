"""Recall between pictures and captions: against counting by hand, against chance, with ties and broken pictures."""

from __future__ import annotations

import itertools
import json
import runpy
import sys

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_helpers import COLOURS, MODEL, picture, write_tar
from safetensors.torch import save_file
from torch import nn

from llava_drip.contrastive import retrieval
from llava_drip.contrastive.captions import open_captions
from llava_drip.contrastive.checkpoint import load_clip, load_tokenizer
from llava_drip.contrastive.retrieval import KS, chance, expected_hit, recalls, retrieve
from llava_drip.record import hashed

WAYS = ("image_to_text", "text_to_image")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as open_clip keeps models: DRIP-mini-8-4x with random weights."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": open_clip.get_model_config(MODEL), "preprocess_cfg": model.visual.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def clip(run):
    model, transform = load_clip(run)
    return model, transform, load_tokenizer(run, model)


@pytest.fixture
def shard(tmp_path):
    """12 pictures with one to three captions each."""
    rng, files = np.random.default_rng(0), {}
    for i in range(12):
        colour = list(COLOURS)[i % 5]
        files[f"{i:02}.jpg"] = picture(rng, colour)
        files[f"{i:02}.txt"] = "\n".join(f"a {colour} square, number {i}, text {n}" for n in range(1 + i % 3)).encode()
    write_tar(tmp_path / "test.tar", files)
    return tmp_path / "test.tar", files


def by_hand(similarity: np.ndarray, owner: list[int]) -> dict[str, float]:
    found = {}
    for k in KS:
        ranked = [[owner[t] for t in row.argsort()[::-1][:k]] for row in similarity]
        found[f"image_to_text_R@{k}"] = np.mean([i in own for i, own in enumerate(ranked)])
        ranked = [column.argsort()[::-1][:k] for column in similarity.T]
        found[f"text_to_image_R@{k}"] = np.mean([owner[t] in images for t, images in enumerate(ranked)])
    return found


@pytest.mark.parametrize("batch_size, workers, at_once", [(64, 0, 2**24), (5, 1, 2**24), (5, 0, 30), (1, 0, 1)])
def test_agrees_with_ranking_by_hand(clip, shard, batch_size, workers, at_once, monkeypatch):
    model, transform, tokenizer = clip
    captions = open_captions(str(shard[0]))
    texts = [text for own in captions.captions for text in own]
    owner = [i for i, own in enumerate(captions.captions) for _ in own]
    with torch.no_grad():
        pixels = torch.stack([transform(captions.load(i)) for i in range(12)])
        similarity = model.encode_image(pixels, normalize=True) @ model.encode_text(tokenizer(texts), normalize=True).T
        lengths = model.visual.trunk.forward_features(pixels).lengths.float()
    monkeypatch.setattr(retrieval, "SCORES_AT_ONCE", at_once)
    result = retrieve(*clip, captions, batch_size=batch_size, workers=workers)
    expected = by_hand(similarity.numpy(), owner)
    assert 0 < expected["text_to_image_R@5"] < 1
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert (result["images"], result["captions"], result["skipped"]["counts"]) == (12, 24, {})
    assert result["tokens_per_image"] == pytest.approx(lengths.mean().item())
    assert result["compression"] == pytest.approx(64 / lengths.mean().item())
    assert 0.9 * result["compression_p5"] <= result["compression"] <= 1.1 * result["compression_p95"]


def test_a_perfect_and_a_reversed_ranking():
    images = torch.eye(20)
    owner = torch.arange(20).repeat_interleave(2)
    assert set(recalls(images, images[owner], owner).values()) == {1.0}
    assert set(recalls(images, -images[owner], owner).values()) == {0.0}


@pytest.mark.parametrize("counts", [[1] * 7, [5] * 40, [1, 2, 3, 9], [1]])
def test_a_model_that_says_the_same_of_everything_gets_chance(counts):
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    same = F.normalize(torch.ones(1, 512), dim=-1)
    images = same.expand(len(counts), -1) + 1e-8 * torch.randn(len(counts), 512)  # what rounding makes of "the same"
    result = recalls(images, same.expand(len(owner), -1), owner)
    assert result == pytest.approx(chance(torch.tensor(counts)), abs=1e-12)
    if len(counts) == 40:
        assert result["text_to_image_R@1"] == pytest.approx(1 / 40)


def test_chance_is_the_mean_over_all_rankings():
    counts = torch.tensor([1, 2, 3])
    owner, n = [0, 1, 1, 2, 2, 2], 0
    hits = dict.fromkeys((1, 5), 0)
    for order in itertools.permutations(owner):  # every ranking of the captions
        n += 1
        for k in hits:
            hits[k] += sum(image in order[:k] for image in range(3)) / 3
    expected = chance(counts)
    for k, total in hits.items():
        assert expected[f"image_to_text_R@{k}"] == pytest.approx(total / n)
    assert [expected[f"text_to_image_R@{k}"] for k in KS] == pytest.approx([1 / 3, 1, 1])


def test_random_features_are_near_chance():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 64, generator=generator), dim=-1) for n in (1000, 5000))
    result, expected = recalls(images, texts, torch.arange(5000) // 5), chance(torch.full((1000,), 5))
    for name, value in expected.items():
        assert abs(result[name] - value) < 5 * (value / 1000) ** 0.5, name


def test_expected_hit_counts_ties_as_a_random_order():
    def hit(*counts):
        return expected_hit(*(torch.tensor([float(count)]).double() for count in counts[:3]), counts[3]).item()

    assert hit(0, 0, 1, 1) == 1 and hit(1, 0, 1, 1) == 0 and hit(4, 0, 2, 5) == 1 and hit(5, 0, 2, 5) == 0
    assert hit(0, 3, 1, 1) == pytest.approx(1 / 4) and hit(0, 3, 1, 2) == pytest.approx(2 / 4)
    assert hit(2, 3, 1, 5) == pytest.approx(3 / 4) and hit(0, 3, 2, 1) == pytest.approx(2 / 5)
    assert hit(0, 2, 2, 2) == pytest.approx(1 - 1 / 6) and hit(0, 2, 2, 3) == 1


def test_broken_pictures_go_with_their_captions(clip, shard):
    path, files = shard
    expected = retrieve(*clip, open_captions(str(path)), workers=0)
    files = {"bad.jpg": files["00.jpg"][:300], "bad.txt": b"one\ntwo", "none.txt": b"three"} | files
    write_tar(path, files | {"junk.png": b"junk", "junk.txt": b"four"})
    for batch_size, workers in ((1, 0), (4, 1)):
        result = retrieve(*clip, open_captions(str(path)), batch_size=batch_size, workers=workers)
        assert result["skipped"]["counts"] == {"corrupt picture": 2, "missing picture": 1}
        assert any("test.tar: bad.jpg: broken header" in example for example in result["skipped"]["examples"])
        assert (result["images"], result["captions"]) == (12, 24)
        for name in expected["chance"]:
            assert result[name] == pytest.approx(expected[name])
    write_tar(path, {"bad.jpg": b"junk", "bad.txt": b"one", "worse.txt": b"two"})
    message = "test.tar: no readable picture: 2 skipped .1 corrupt picture, 1 missing picture.; .*bad.jpg"
    with pytest.raises(ValueError, match=message):
        retrieve(*clip, open_captions(str(path)), workers=0)


def test_mode_and_randomness_are_put_back(clip, shard):
    model = clip[0]
    expected = retrieve(*clip, open_captions(str(shard[0])), workers=0)
    model.train()
    model.visual.eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    result = retrieve(*clip, open_captions(str(shard[0])), batch_size=4, workers=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.text.training and not model.visual.trunk.training
    model.eval()
    assert result == expected


def test_features_that_are_not_finite_are_no_hits(clip, shard):
    model, transform, tokenizer = clip
    weight = model.visual.head.proj.weight
    kept = weight.detach().clone()
    try:
        nn.init.constant_(weight, float("nan"))
        with pytest.raises(ValueError, match="features of 12 of 12 pictures are not finite"):
            retrieve(model, transform, tokenizer, open_captions(str(shard[0])), workers=0)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_tower_without_tokens(shard):
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(32, vision, text)
    transform = open_clip.image_transform(32, is_train=False)
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    result = retrieve(model, transform, tokenizer, open_captions(str(shard[0])), workers=0, precision="amp_bf16")
    assert result["tokens_per_image"] is None and result["compression"] is None
    assert model.training and 0 <= result["image_to_text_R@1"] <= result["image_to_text_R@10"] <= 1


@pytest.fixture
def program(repository, monkeypatch, capsys):
    """eval/retrieval.py in this process (that it starts in its own, test_architecture.py shows): (exit code, stdout, stderr)."""

    def call(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["retrieval.py", *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(repository / "eval" / "retrieval.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return call


def test_program(run, shard, tmp_path, program):
    out = tmp_path / "out.json"
    flags = ["--checkpoint", str(run), "--data", str(shard[0]), "--device", "cpu", "--json", str(out)]
    code, printed, err = program(*flags, "--compression", "8", "--workers", "0")
    assert code == 0, err
    written = json.loads(out.read_text())
    assert "12 pictures, 24 captions" in printed
    assert "8.00 visual tokens per image of 64 patches: compression 8.00 (8.00 .. 8.00)" in printed
    line = next(line for line in printed.splitlines() if line.startswith("text to image"))
    for k in KS:
        assert f"{written[f'text_to_image_R@{k}']:.1%} ({written['chance'][f'text_to_image_R@{k}']:.1%})" in line
    assert written["flags"]["compression"] == 8 and written["flags"]["images"] is None
    assert written["run"]["data"] == {"pictures": hashed(shard[:1])} and written["run"]["seconds"] > 0
    assert written["compression_p95"] == 8 and written["checkpoint"].endswith("open_clip_model.safetensors")


def test_program_ends_in_one_line(run, tmp_path, program):
    code, _, err = program("--checkpoint", str(run), "--data", str(tmp_path / "none.jsonl"))
    assert code == 1 and err.splitlines() == [f"retrieval.py: error: {tmp_path / 'none.jsonl'}: no such file"]
