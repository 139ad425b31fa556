"""Scenic's checkpoints of a whole TokenLearner ViT: their layout, made here, and a forward pass written anew in it."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from test_tokenlearner import LAYOUTS, TINY, every_layout, make, pictures
from torch import Tensor

from llava_drip.towers import TokenLearnerViT
from llava_drip.towers.tokenlearner import load_scenic_params


def scenic_params(tower: TokenLearnerViT) -> dict[str, np.ndarray]:
    """Random weights in the layout of Scenic's TokenLearnerViT, its sizes those of `tower`."""
    rng, D, H = np.random.default_rng(0), tower.embed_dim, 3
    params: dict[str, np.ndarray] = {}

    def add(path: str, *shape: int) -> None:
        params[path] = (0.3 * rng.standard_normal(shape)).astype(np.float32)

    def dense(path: str, *shape: int, out: tuple[int, ...] | None = None) -> None:
        add(f"{path}/kernel", *shape)
        add(f"{path}/bias", *(out or shape[-1:]))

    def norm(path: str) -> None:
        add(f"{path}/scale", D)
        add(f"{path}/bias", D)

    dense("embedding", 8, 8, 3, D)
    add("Transformer/posembed_input/pos_embedding", 1, 16, D)
    for i in range(4):
        block = f"Transformer/encoderblock_{i}"
        norm(f"{block}/LayerNorm_0")
        for part in ("query", "key", "value"):
            dense(f"{block}/MultiHeadDotProductAttention_0/{part}", D, H, D // H, out=(H, D // H))
        dense(f"{block}/MultiHeadDotProductAttention_0/out", H, D // H, D)
        norm(f"{block}/LayerNorm_1")
        dense(f"{block}/MlpBlock_0/Dense_0", D, 4 * D)
        dense(f"{block}/MlpBlock_0/Dense_1", 4 * D, D)
    for i in range(len(tower.token_learners)):
        if tower.version == "1.1":
            learner = f"Transformer/TokenLearnerModuleV11_{i}"
            dense(f"{learner}/token_masking/Dense_0", D, 64)
            dense(f"{learner}/token_masking/Dense_1", 64, tower.num_tokens)
        else:
            learner = f"Transformer/TokenLearnerModule_{i}"
            for j in range(4):
                add(f"{learner}/Conv_{j}/kernel", 3, 3, tower.num_tokens if j else D, tower.num_tokens)
        norm(f"{learner}/LayerNorm_0")
    for i in range(len(tower.token_fusers)):
        fuser = f"Transformer/TokenFuser_{i}"
        for name in ("fuser_mix_norm1", "fuser_mix_norm2", "LayerNorm_0"):
            norm(f"{fuser}/{name}")
        dense(f"{fuser}/Dense_0", tower.num_tokens, tower.num_tokens)
        dense(f"{fuser}/token_masking/Dense_0", D, 64)
        dense(f"{fuser}/token_masking/Dense_1", 64, tower.num_tokens)
    norm("Transformer/encoder_norm")
    dense("output_projection", D, 5)
    return params


def scenic_forward(params: dict[str, np.ndarray], x: Tensor, tower: TokenLearnerViT) -> Tensor:
    """Scenic's TokenLearnerViT written anew, with flax's layouts: channels last, heads apart. x: [B, 3, 32, 32]."""
    p = {path: torch.from_numpy(array) for path, array in params.items()}
    gelu, D = torch.nn.GELU(approximate="tanh"), tower.embed_dim

    def norm(path: str, h: Tensor) -> Tensor:
        return F.layer_norm(h, (D,), p[f"{path}/scale"], p[f"{path}/bias"], 1e-6)

    def dense(path: str, h: Tensor) -> Tensor:
        return h @ p[f"{path}/kernel"] + p[f"{path}/bias"]

    def mlp(path: str, h: Tensor) -> Tensor:
        return dense(f"{path}/Dense_1", gelu(dense(f"{path}/Dense_0", h)))

    def block(i: int, h: Tensor) -> Tensor:
        path = f"Transformer/encoderblock_{i}"
        attention, y = f"{path}/MultiHeadDotProductAttention_0", norm(f"{path}/LayerNorm_0", h)
        q, k, v = (
            torch.einsum("bnd,dhe->bhne", y, p[f"{attention}/{part}/kernel"]) + p[f"{attention}/{part}/bias"][:, None]
            for part in ("query", "key", "value")
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        y = torch.einsum("bhne,hed->bnd", weights @ v, p[f"{attention}/out/kernel"]) + p[f"{attention}/out/bias"]
        h = h + y
        return h + mlp(f"{path}/MlpBlock_0", norm(f"{path}/LayerNorm_1", h))

    def learn(i: int, h: Tensor) -> Tensor:
        if tower.version == "1.1":
            path = f"Transformer/TokenLearnerModuleV11_{i}"
            return mlp(f"{path}/token_masking", norm(f"{path}/LayerNorm_0", h)).softmax(1).mT @ h
        path = f"Transformer/TokenLearnerModule_{i}"
        maps = norm(f"{path}/LayerNorm_0", h).mT.unflatten(2, (4, 4))
        for j in range(4):
            maps = F.conv2d(gelu(maps) if j else maps, p[f"{path}/Conv_{j}/kernel"].permute(3, 2, 0, 1), padding=1)
        return maps.flatten(2).sigmoid() @ h

    def fuse(i: int, tokens: Tensor, h: Tensor) -> Tensor:
        path = f"Transformer/TokenFuser_{i}"
        tokens = dense(f"{path}/Dense_0", norm(f"{path}/fuser_mix_norm1", tokens).mT).mT
        gates = mlp(f"{path}/token_masking", norm(f"{path}/LayerNorm_0", h)).sigmoid()
        return torch.einsum("bsc,bhs->bhc", norm(f"{path}/fuser_mix_norm2", tokens), gates)

    tiles = x.permute(0, 2, 3, 1).reshape(-1, 4, 8, 4, 8, 3).permute(0, 1, 3, 2, 4, 5).reshape(len(x), 16, 8, 8, 3)
    h = torch.einsum("bnhwi,hwid->bnd", tiles, p["embedding/kernel"]) + p["embedding/bias"]
    h = h + p["Transformer/posembed_input/pos_embedding"]
    for i in range(4):
        if tower.use_fuser and i >= tower.insert_at:
            h = h + fuse(i - tower.insert_at, block(i, learn(i - tower.insert_at, h)), h)
        else:
            h = block(i, learn(0, h) if i == tower.insert_at else h)
    return dense("output_projection", norm("Transformer/encoder_norm", h).mean(1))


@every_layout
def test_scenic_checkpoints_of_the_whole_vit_load(layout, tmp_path):
    tower, x = make(layout), pictures()
    params = scenic_params(tower)
    load_scenic_params(tower, params)
    with torch.no_grad():
        expected = scenic_forward(params, x, tower)
        torch.testing.assert_close(tower(x), expected, atol=1e-5, rtol=1e-4)
        np.savez(tmp_path / "params.npz", **params)
        arguments = {**TINY, **LAYOUTS[layout], "checkpoint_path": str(tmp_path / "params.npz")}
        by_timm = timm.create_model("tokenlearner_tiny_patch16_224", **arguments).eval()
        assert torch.equal(by_timm(x), tower(x))
        headless = make(layout, num_classes=0)
        load_scenic_params(headless, params)
        torch.testing.assert_close(
            F.linear(headless(x), tower.head.weight, tower.head.bias), expected, atol=1e-5, rtol=1e-4
        )


def test_scenic_weights_that_do_not_fit_are_named():
    params = scenic_params(make())
    query = "Transformer/encoderblock_1/MultiHeadDotProductAttention_0/query/kernel"
    for changed, tower, message in [
        ({query: None}, {}, f"{query} of this TokenLearnerViT are missing"),
        ({"pre_logits/kernel": np.zeros((24, 24))}, {}, "pre_logits/kernel in the weights have no place"),
        ({query: np.zeros((24, 2, 12))}, {}, r"query/kernel \[24, 2, 12\].* does not fit blocks.1.attn.qkv.weight"),
        (
            {"embedding/bias": np.zeros((24, 1))},
            {},
            r"embedding/bias \[24, 1\] does not fit patch_embed.proj.bias \[24\]",
        ),
        ({"embedding/kernel": np.zeros(24)}, {}, r"embedding/kernel \[24\] does not fit patch_embed.proj.weight"),
        ({}, {"class_token": True}, "have nothing for cls_token of this TokenLearnerViT"),
        ({}, {"num_tokens": 4}, "does not fit token_learners.0.token_masking.fc2.weight"),
        ({}, {"version": "1.0"}, "TokenLearnerModule_0/.* are missing"),
        ({}, {"use_fuser": True}, "TokenFuser_0/.* more of this TokenLearnerViT are missing"),
        ({}, {"num_classes": 7}, r"output_projection/kernel \[24, 5\] does not fit head.weight \[7, 24\]"),
    ]:
        given = {path: value for path, value in {**params, **changed}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            load_scenic_params(make(**tower), given)
