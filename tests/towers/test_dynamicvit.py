"""DynamicViT: the official code's outputs, what is kept and dropped, and what its predictors learn from."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import llava_drip  # noqa: F401
from llava_drip.tokens import Packing
from llava_drip.towers import DynamicViT
from llava_drip.towers.io import load_tower, save_tower
from llava_drip.towers.policy import ScorePredictor, draw_policy, policy_softmax, rows_of_highest

GOLDEN = Path(__file__).parent / "golden" / "dynamicvit_golden.safetensors"  # made by the official code
SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "pruning_loc": (1, 2)}
RATIO = (0.7, 0.4)  # of 64 patches: 44, 25


def make(num_classes: int = 5, **arguments) -> DynamicViT:
    torch.manual_seed(0)
    model = timm.create_model(
        "dynamicvit_tiny_patch16_224", **{**SMALL, "token_ratio": RATIO, "num_classes": num_classes, **arguments}
    )
    for predictor in model.score_predictor:  # scores that differ more than at the start
        torch.nn.init.normal_(predictor.out_conv[4].weight, std=2.0)
    return model


def pictures(n: int, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


# The official code


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def official_arguments() -> dict:
    with safe_open(GOLDEN, framework="pt") as file:
        values = {name: json.loads(value) for name, value in file.metadata().items()}
    return {"model_name": "dynamicvit_small_patch16_224", **values}


def official_state(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("state_dict."): v for key, v in golden.items() if key.startswith("state_dict.")}


def official_kept(golden: dict[str, Tensor], stage: int) -> list[list[int]]:
    """Patches left after a stage: the file counts each stage's among those that the one before left, in the order of scores."""
    patches = torch.arange(196).expand(2, -1)
    for upto in range(stage + 1):
        patches = patches.gather(1, golden[f"kept_with_cls.{upto}"][:, 1:] - 1)
    return patches.sort(1).values.tolist()


def test_official_weights_give_the_official_outputs(golden, official_arguments):
    model = timm.create_model(**official_arguments).eval()
    model.load_state_dict(official_state(golden), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(golden["input"]), golden["logits"], atol=1e-5, rtol=0)
        one = torch.cat([model(picture[None]) for picture in golden["input"]])
    torch.testing.assert_close(one, golden["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_each_stage_keeps_the_official_tokens(golden, official_arguments, stage):
    """A tower that ends behind the block of a stage."""
    cut = {name: official_arguments[name][: stage + 1] for name in ("pruning_loc", "token_ratio")}
    model = timm.create_model(**{**official_arguments, **cut, "depth": cut["pruning_loc"][-1] + 1}).eval()
    state = official_state(golden)
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    with torch.no_grad():
        tokens = model.forward_features(golden["input"])
    assert [(row >= 0).nonzero()[:, 0].tolist() for row in tokens.segments] == official_kept(golden, stage)


def test_official_and_dense_checkpoints_as_files(golden, official_arguments, tmp_path):
    """As the official program saves them; a dense ViT's leave the predictors as they begin; a damaged one is refused."""
    state, arguments = official_state(golden), {**official_arguments, "pretrained": True}

    def load(content: dict) -> dict[str, Tensor]:
        torch.save(content, tmp_path / "checkpoint.pth")
        torch.manual_seed(3)
        overlay = {"file": str(tmp_path / "checkpoint.pth"), "num_classes": 10}
        return timm.create_model(**arguments, pretrained_cfg_overlay=overlay).state_dict()

    average = {name: value + 1 for name, value in state.items()}
    official = {"model": state, "optimizer": {"state": {}}, "epoch": 29, "scaler": {}, "args": Namespace(lr=1e-3)}
    for name, value in load(official).items():
        assert torch.equal(value, state[name]), name
    for name, value in load({**official, "model_ema": average}).items():  # timm's choice
        assert torch.equal(value, average[name]), name
    evaluated = timm.models.load_state_dict(str(tmp_path / "checkpoint.pth"), use_ema=False)
    model = timm.create_model(**official_arguments)
    model.load_state_dict(evaluated)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    dense = {name: value for name, value in state.items() if not name.startswith("score_predictor.")}
    begun = load({"model": dense})
    assert all(torch.equal(begun[name], value) for name, value in dense.items())
    fresh = begun["score_predictor.1.in_conv.1.weight"]
    assert fresh.std().item() == pytest.approx(0.02, rel=0.1) and not torch.equal(
        fresh, state["score_predictor.1.in_conv.1.weight"]
    )
    del state["score_predictor.1.out_conv.2.weight"]
    with pytest.raises(RuntimeError, match="score_predictor.1.out_conv.2.weight"):
        load({"model": state})


# What is kept


def test_numbers_are_the_official_ones_and_the_dropped_are_named():
    model = make().eval()
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].lengths))
    tokens = model.forward_features(pictures(3))
    assert tokens.lengths.tolist() == [25] * 3
    assert seen == [(65,) * 3, (45,) * 3, (26,) * 3, (26,) * 3]  # the class token stays
    assert ((tokens.segments >= 0).sum(1) == 25).all() and (tokens.segments == -1).any()
    for row in tokens.segments:
        assert row[row >= 0].tolist() == list(range(25))  # raster order
    assert tokens.prefix.shape == (3, 1, 64) and (tokens.rate_loss == 0).all()
    for name, layers in (("tiny", 192), ("256", 256), ("small", 384), ("base", 768)):
        with torch.device("meta"):
            preset = timm.create_model(f"dynamicvit_{name}_patch16_224")
        assert (preset.embed_dim, preset.pruning_loc) == (layers, (3, 6, 9)) and layers // 64 == preset.blocks[
            0
        ].attn.num_heads
        assert preset.token_counts(1, 196) == [(137,), (96,), (67,)]


def test_the_highest_scores_of_each_image_earlier_ones_among_equals():
    scores = torch.tensor([1.0, 3.0, 3.0, 2.0, 5.0, 0.0, 0.0, 0.0])
    equal = Packing((4, 4), scores.device)
    assert rows_of_highest(scores, equal, (2, 2)).tolist() == [1, 2, 4, 5]
    assert rows_of_highest(scores, equal, (1, 3)).tolist() == [1, 4, 5, 6]
    ragged = Packing((3, 5), scores.device)
    assert rows_of_highest(scores, ragged, (1, 2)).tolist() == [1, 3, 4]
    assert rows_of_highest(scores, ragged, (2, 5)).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_an_image_does_not_depend_on_its_batch_mates():
    model, x = make().eval(), pictures(8)
    with torch.no_grad():
        whole = model.forward_features(x)
        for n in (1, 2):
            for start in range(0, 8, n):
                part = model.forward_features(x[start : start + n])
                assert torch.equal(part.segments, whole.segments[start : start + n])
                expected = torch.cat(whole.split()[start : start + n])
                torch.testing.assert_close(part.values, expected, atol=1e-5, rtol=0)
        assert torch.equal(model.forward_features(x).values, whole.values)


def test_a_budget_is_met_exactly_and_given_back():
    model, x = make().eval(), pictures(3)
    with torch.no_grad():
        before = model(x)
        for compression, count in ((1.0, 64), (2, 32), (4.0, 16), (10.0, 6), (100.0, 1)):
            model.set_compression(compression)
            assert model.forward_features(x).lengths.tolist() == [count] * 3
        each = torch.tensor([2.0, 8.0, 1.0])
        model.set_compression(each)
        several = model.forward_features(x)
        assert several.lengths.tolist() == [32, 8, 64]
        for image, tokens in enumerate(several.split()):
            model.set_compression(float(each[image]))
            alone = model.forward_features(x[image : image + 1])
            torch.testing.assert_close(alone.values, tokens, atol=1e-5, rtol=0)
            assert torch.equal(alone.segments[0], several.segments[image])
        with pytest.raises(ValueError, match=r"\(3,\) values for a batch of 2"):
            model.set_compression(each)
            model.forward_features(x[:2])
        model.set_compression(None)
        assert torch.equal(model(x), before)


def test_compression_keeps_the_shape_of_the_ratios():
    with torch.device("meta"):
        model = timm.create_model("dynamicvit_small_patch16_224", compression=8.0)
    assert model.token_ratio == pytest.approx((0.5, 0.25, 0.125)) and model.compression == 8
    model.set_compression(8.0)
    assert model.token_counts(2, 196) == [(98, 98), (49, 49), (24, 24)]
    with torch.device("meta"):
        dense = timm.create_model("dynamicvit_small_patch16_224", compression=1)
    assert dense.is_dense and not dense.has_boundary_loss


def test_dense_it_is_timms_vit():
    model, x = make(compression=1.0).eval(), pictures(2)
    dense = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, **{k: v for k, v in SMALL.items() if k != "pruning_loc"}
    ).eval()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("score_predictor")})
    torch.testing.assert_close(model(x), dense(x), atol=1e-5, rtol=0)
    assert torch.equal(model.forward_features(x).segments, torch.arange(64).expand(2, -1))


def test_saved_with_its_arguments_and_its_budget(tmp_path):
    model, x = make().eval(), pictures(2)
    model.set_compression(5.0)
    save_tower(model, tmp_path, (0.5,) * 3, (0.5,) * 3)
    again = load_tower(str(tmp_path), num_classes=5).eval()
    assert (again.pruning_loc, again.token_ratio, float(again.budget)) == ((1, 2), RATIO, 5.0)
    torch.testing.assert_close(again(x), model(x))
    other = load_tower(str(tmp_path), compression=2.0).eval()
    assert other.budget is None and other.forward_features(x).lengths.tolist() == [32, 32]


# Training


def test_attention_under_a_policy_is_attention_without_the_dropped():
    generator = torch.Generator().manual_seed(0)
    scores, policy = torch.randn(2, 3, 7, 7, generator=generator), torch.ones(2, 7)
    policy[0, [2, 5]], policy[1, 0] = 0.0, 0.0
    weights = policy_softmax(scores, policy)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))
    for image, kept in enumerate(policy.bool()):
        expected = scores[image][:, kept][:, :, kept].softmax(-1)
        torch.testing.assert_close(weights[image][:, kept][:, :, kept], expected, atol=1e-5, rtol=0)
        dropped = weights[image][:, :, ~kept]
        own = torch.eye(7, dtype=torch.bool)[:, ~kept]
        assert (dropped[:, ~own] < 1e-6).all() and (dropped[:, own] > 1e-3).all()  # of its own it sees itself


def test_masked_training_is_removal_in_eval():
    """Noise that draws just what eval would take: the same tokens, to the epsilon of the masked softmax."""
    model, x = make().eval(), pictures(4)
    with torch.no_grad():
        removed = model.forward_features(x)
        stages = []
        for count, depth in ((1, 2), (2, 3)):
            part = make(pruning_loc=(1, 2)[:count], token_ratio=RATIO[:count], depth=depth).eval()
            part.load_state_dict({name: model.state_dict()[name] for name in part.state_dict()})
            stages.append(part.forward_features(x).segments >= 0)
        model.train().noise = lambda like: torch.cat(stages, 1).float()
        masked = model.forward_features(x)
    assert torch.equal(masked.segments, removed.segments) and torch.equal(masked.lengths, removed.lengths)
    torch.testing.assert_close(masked.values, removed.values, atol=2e-5, rtol=0)
    torch.testing.assert_close(masked.prefix, removed.prefix, atol=2e-5, rtol=0)
    torch.testing.assert_close(masked.rate_loss, torch.full((4,), ((44 / 64 - 0.7) ** 2 + (25 / 64 - 0.4) ** 2) / 2))


def test_the_task_and_the_ratio_loss_reach_every_predictor():
    model, x = make().train(), pictures(4)
    for target in ("class token", "kept tokens", "rate loss"):
        model.zero_grad()
        torch.manual_seed(0)
        tokens = model.forward_features(x)
        loss = {
            "class token": lambda t: model.forward_head(t).square().mean(),
            "kept tokens": lambda t: (t.values * torch.randn_like(t.values)).mean(),
            "rate loss": lambda t: t.rate_loss.mean(),
        }[target](tokens)
        loss.backward()
        for predictor in model.score_predictor:
            assert all(p.grad.abs().sum() > 0 for p in predictor.out_conv.parameters()), target
    assert len(set(tokens.lengths.tolist())) > 1  # as many as are drawn
    assert torch.equal((tokens.segments >= 0).sum(1), tokens.lengths)


def test_the_ratio_loss_trains_the_shares():
    model, x = make(), pictures(8)
    optimizer = torch.optim.Adam(model.score_predictor.parameters(), lr=0.01)
    shares = []
    for _ in range(60):
        tokens = model.train().forward_features(x)
        optimizer.zero_grad()
        tokens.rate_loss.mean().backward()
        optimizer.step()
        shares.append(tokens.lengths.float().mean().item() / 64)
    assert abs(sum(shares[-10:]) / 10 - RATIO[-1]) < 0.05 < abs(shares[0] - RATIO[-1])


def test_a_budget_is_the_target_of_training():
    model = make().train()
    model.noise = lambda like: torch.ones_like(like)  # everything is kept
    model.set_compression(4.0)
    expected = ((1 - model.target_ratios(2)) ** 2).mean(1)
    torch.testing.assert_close(model.forward_features(pictures(2)).rate_loss, expected)
    assert model.target_ratios(2)[:, -1].tolist() == pytest.approx([0.25, 0.25])


def test_a_drawn_policy():
    generator = torch.Generator().manual_seed(0)
    log_odds, uniform = torch.randn(2000, 4, generator=generator), torch.rand(2000, 4, generator=generator)
    before = torch.tensor([1.0, 1.0, 0.0, 1.0]).expand(2000, -1)
    kept = draw_policy(log_odds.requires_grad_(), uniform, before)
    assert set(kept.unique().tolist()) == {0.0, 1.0} and (kept[:, 2] == 0).all() and (kept.sum(1) >= 1).all()
    (kept[:, 0].sum()).backward()
    soft = torch.sigmoid(log_odds[:, 0] + torch.logit(uniform[:, 0]))
    torch.testing.assert_close(log_odds.grad[:, 0], soft * (1 - soft), atol=1e-5, rtol=1e-3)
    drawn = draw_policy(torch.full((20000, 8), 0.3).logit(), torch.rand(20000, 8, generator=generator), None)
    assert drawn.mean().item() == pytest.approx(0.3 + 0.7**8 / 8, abs=0.005)  # and one where none was drawn


def test_where_all_would_go_the_likeliest_stays():
    kept = draw_policy(
        torch.tensor([[0.1, 0.4, 0.9]]).logit(), torch.full((1, 3), 1e-6), torch.tensor([[1.0, 1.0, 0.0]])
    )
    assert kept.tolist() == [[0.0, 1.0, 0.0]]
    model = make().train()
    model.noise = lambda like: torch.zeros_like(like)
    tokens = model.forward_features(pictures(2))
    assert tokens.lengths.tolist() == [1, 1]
    model.forward_head(tokens).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_predictor_reads_the_mean_of_what_is_left():
    torch.manual_seed(0)
    predictor, x = ScorePredictor(16).eval(), torch.randn(2, 6, 16)
    policy = torch.ones(2, 6)
    policy[0, 2:] = 0
    masked = predictor(x.flatten(0, 1), Packing((6, 6), x.device), policy).unflatten(0, (2, 6))
    alone = predictor(x[0, :2], Packing((2,), x.device))
    torch.testing.assert_close(masked[0, :2], alone)
    ragged = predictor(torch.cat([x[0, :2], x[1]]), Packing((2, 6), x.device))
    torch.testing.assert_close(ragged, torch.cat([alone, masked[1]]))


# Arguments

MISTAKES = {
    "pruning_loc=(1, 9)": r"pruning_loc must be a list of blocks, in 0 \.\. 3, got \(1, 9\)",
    "pruning_loc=(2, 1)": "pruning_loc must rise",
    "pruning_loc=()": "pruning_loc must be a list",
    "pruning_loc=1": "pruning_loc must be a list",
    "token_ratio=(0.5,)": "token_ratio must be 2 numbers, one for each of pruning_loc",
    "token_ratio=(0.4, 0.5)": "token_ratio must be shares of all patches, falling",
    "token_ratio=(0.4, 0.0)": "token_ratio must be shares",
    "token_ratio=(1.4, 0.5)": "token_ratio must be shares",
    "token_ratio=('a', 0.5)": "token_ratio must be a number",
    "compression=0.5": "compression must be a number, at least 1",
    "budget=0.5": "compression must be a number, at least 1",
    "over='batch'": 'over must be "image"',
    "patch_drop_rate=0.1": "patch_drop_rate",
    "global_pool='map'": "global_pool must be one of",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_arguments_are_named(mistake):
    arguments = eval(f"dict({mistake})")
    with pytest.raises(ValueError, match=MISTAKES[mistake]):
        make(**arguments)


def test_a_layer_before_the_last_dropping_is_refused():
    model = make().eval()
    assert [model.forward_features(pictures(1), layer=layer).lengths.tolist() for layer in (-2, -3)] == [[25]] * 2
    for mode in (True, False):
        with pytest.raises(ValueError, match="layer -4 lies before the last dropping, before block 2"):
            model.train(mode).forward_features(pictures(1), layer=-4)
    model.set_compression(1.0)
    assert model.forward_features(pictures(1), layer=-4).lengths.tolist() == [64]


def test_predictors_learn_with_the_block_below_them():
    model = make()
    from timm.models._manipulate import group_with_matcher

    groups = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    for i, at in enumerate(model.pruning_loc):
        assert groups[f"score_predictor.{i}.in_conv.1.weight"] == groups[f"blocks.{at - 1}.norm1.weight"]
