"""The image tower of a CLIP of open_clip or Hugging Face → Dense: the same architecture as timm's, under other names."""

from __future__ import annotations

import re

import torch
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn

from llava_drip.towers.dense import Dense, activation, fp32, mlp_ratio, number, one_epsilon, read_timm, unsupported

# open_clip


def read_open_clip(model: nn.Module) -> Dense:
    import open_clip

    tower = getattr(model, "visual", model)
    if hasattr(tower, "trunk"):
        return _read_trunk(tower)
    if not isinstance(tower, open_clip.transformer.VisionTransformer):
        raise unsupported(f"its image tower is a {type(tower).__name__}, no ViT")
    block = tower.transformer.resblocks[0]
    for unlike, what in (
        (tower.attn_pool is not None, "its image tower ends in attention pooling (as CoCa's does)"),
        (tower.pool_type not in ("tok", "avg"), f"its image tower pools by {tower.pool_type!r}"),
        (type(block) is not open_clip.transformer.ResidualAttentionBlock, f"its blocks are {type(block).__name__}"),
        (isinstance(tower.ln_pre, nn.Identity), "its image tower has no norm before the blocks (no_ln_pre)"),
    ):
        if unlike:
            raise unsupported(what)
    width, after_pool = tower.conv1.out_channels, bool(tower.final_ln_after_pool)
    arguments = {
        "img_size": number(tower.image_size),
        "patch_size": number(tower.patch_size),
        "embed_dim": width,
        "depth": len(tower.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": mlp_ratio(block.mlp.c_fc.out_features, width),
        "class_token": True,
        "global_pool": "token" if tower.pool_type == "tok" else "avg",
        "pre_norm": True,
        "fc_norm": after_pool,
        "act_layer": activation(block.mlp.gelu),
        "norm_eps": one_epsilon([module for module in tower.modules() if isinstance(module, nn.LayerNorm)]),
    }
    if not isinstance(block.ls_1, nn.Identity):
        arguments["init_values"] = 1.0  # makes the layers; their values are loaded
    weights = dict(tower.state_dict())
    if "proj" in weights:
        weights["head.weight"] = weights.pop("proj").T
    names = _OPEN_CLIP_NAMES | ({"ln_post.": "fc_norm."} if after_pool else {})
    state = _timm_state({_renamed(name, names): value for name, value in weights.items()})

    def output(x: Tensor) -> Tensor:
        answer = tower(x)
        return answer[0] if isinstance(answer, tuple) else answer  # with output_tokens the patches' too

    return Dense(arguments, state, _outputs(state), _open_clip_preprocessing(tower), output)


_OPEN_CLIP_NAMES = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.": "patch_embed.proj.",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    "transformer.resblocks.": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".ls_1.": ".ls1.",
    ".ls_2.": ".ls2.",
    ".in_proj_": ".qkv.",
    ".out_proj.": ".proj.",
    ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
}


def _read_trunk(tower: nn.Module) -> Dense:
    """open_clip's wrapper of a timm model: `trunk`, and a `head` that may project."""
    dense = read_timm(tower.trunk)
    layers = {name: layer for name, layer in tower.head.named_children() if not isinstance(layer, nn.Dropout)}
    if set(layers) - {"proj"}:
        raise unsupported(f"its image tower ends in {', '.join(layers)}")
    if layers:
        projection = layers["proj"]
        dense.num_classes = projection.out_features
        dense.state["head.weight"] = projection.weight.detach().float()
        bias = projection.bias
        dense.state["head.bias"] = torch.zeros(dense.num_classes) if bias is None else bias.detach().float()
    dense.preprocessing = _open_clip_preprocessing(tower)
    dense.output = tower
    return dense


def _open_clip_preprocessing(tower: nn.Module) -> dict:
    config = getattr(tower, "preprocess_cfg", None) or {}
    return {
        "mean": tuple(config.get("mean", OPENAI_CLIP_MEAN)),
        "std": tuple(config.get("std", OPENAI_CLIP_STD)),
        "interpolation": config.get("interpolation", "bicubic"),
        "crop_pct": 1.0,
    }


# Hugging Face


def read_hf(model: nn.Module) -> Dense:
    kind = type(model).__name__
    if kind not in ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"):
        raise unsupported(f"{kind} is another architecture")
    config = getattr(model.config, "vision_config", model.config)
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": mlp_ratio(config.intermediate_size, config.hidden_size),
        "class_token": True,
        "global_pool": "token",
        "pre_norm": True,
        "fc_norm": False,
        "act_layer": _hf_activation(config.hidden_act),
        "norm_eps": config.layer_norm_eps,
    }
    weights = {
        # How deep the vision model lies differs between classes and versions of transformers.
        re.sub(r"^(vision_model\.)+", "", name): value
        for name, value in model.state_dict().items()
        if kind == "CLIPVisionModel" or name.startswith(("vision_model.", "visual_projection."))
    }
    weights.pop("embeddings.position_ids", None)  # a buffer of older versions
    for layer in range(config.num_hidden_layers):
        attention = f"encoder.layers.{layer}.self_attn."
        for what in ("weight", "bias"):  # three projections are one in timm
            parts = [weights.pop(f"{attention}{which}_proj.{what}") for which in "qkv"]
            weights[f"{attention}qkv.{what}"] = torch.cat(parts)
    state = _timm_state({_renamed(name, _HF_NAMES): value for name, value in weights.items()})
    classes = _outputs(state)

    def output(x: Tensor) -> Tensor:
        if kind == "CLIPModel":
            features = model.get_image_features(pixel_values=x)
            return getattr(features, "pooler_output", features)  # a tensor before transformers 5
        answer = model(pixel_values=x)
        return answer.image_embeds if classes else answer.pooler_output

    preprocessing = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD, "interpolation": "bicubic", "crop_pct": 1.0}
    preprocessing |= getattr(model, "image_preprocessing", {})  # of its preprocessor_config.json
    return Dense(arguments, state, classes, preprocessing, output)


_HF_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "embeddings.position_embedding.weight": "pos_embed",
    "pre_layrnorm.": "norm_pre.",
    "post_layernorm.": "norm.",
    "encoder.layers.": "blocks.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.": ".attn.",
    ".out_proj.": ".proj.",
    "visual_projection.": "head.",
}


def _hf_activation(name: str) -> str:
    known = {"quick_gelu": "quick_gelu", "gelu": "gelu", "relu": "relu", "silu": "silu"}
    known |= {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in known:
        raise unsupported(f"the activation {name} of its MLP is not known here")
    return known[name]


# Common parts


def _renamed(name: str, names: dict[str, str]) -> str:
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


def _timm_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's weights under timm's names, in timm's shapes."""
    state = fp32(weights)
    state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    state["pos_embed"] = state["pos_embed"][None]
    if "head.weight" in state:
        state["head.bias"] = torch.zeros(len(state["head.weight"]))
    return state


def _outputs(state: dict[str, Tensor]) -> int:
    return len(state["head.weight"]) if "head.weight" in state else 0
