"""A dense ViT from elsewhere, read into timm's parameter names: what convert.py makes a DRIP of.

timm's VisionTransformer, open_clip's image tower and Hugging Face's CLIP vision model are one architecture under three sets of
names: here timm's own, in dense_clip.py the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from timm.data import resolve_model_data_config
from timm.layers import Attention, LayerScale, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from llava_drip.towers.drip import Drip
from llava_drip.towers.vit import POOLINGS, PackedVisionTransformer


@dataclass
class Dense:
    """A dense ViT.

    Attributes:
        arguments: timm VisionTransformer arguments that build it, but num_classes; norm_eps for its layer norms' epsilon.
        state: its weights under timm's names, fp32. A CLIP projection is `head.weight`, with a `head.bias` of zeros.
        num_classes: outputs of the head; the width of the embedding for a CLIP tower, 0 where there is no head.
        preprocessing: mean, std, interpolation, crop_pct, as timm's pretrained_cfg names them.
        output: pixels [B, 3, height, width] → [B, num_classes], or the pooled [B, D] where there is no head: the original itself.
        architecture: name of the entry point, where it is a tower of this package.
    """

    arguments: dict
    state: dict[str, Tensor]
    num_classes: int
    preprocessing: dict
    output: Callable[[Tensor], Tensor] = field(repr=False)
    architecture: str | None = None


PREDICTORS = ("boundary_predictor.", "deeper_predictors.", "score_predictor.")  # parameters that a dense ViT lacks


def unsupported(what: str) -> ValueError:
    return ValueError(f"{what}; only the plain ViT with a class token or mean pooling can be read")


# timm, and towers of this package


def read_timm(model: nn.Module) -> Dense:
    """The dense ViT of a timm model, or of a tower of this package at compression 1. ValueError: it is none."""
    if type(model) not in (VisionTransformer, PackedVisionTransformer, Drip):
        raise unsupported(f"{type(model).__name__} is another architecture")
    preprocessing = resolve_model_data_config(model)
    dense = Dense(
        arguments={},
        state=fp32(model.state_dict()),
        num_classes=model.num_classes,
        preprocessing={
            **{key: tuple(preprocessing[key]) for key in ("mean", "std")},
            **{key: preprocessing[key] for key in ("interpolation", "crop_pct")},
        },
        output=model,
    )
    if isinstance(model, Drip):
        if not model.is_dense:
            raise ValueError(
                "a DRIP that pools already, at compression "
                f"{model.compression}: set_compression changes its budget; only dense towers are converted"
            )
        if not hasattr(model, "model_args"):
            raise ValueError("a DRIP that timm.create_model did not make: nobody knows its arguments")
        dense.architecture = model.pretrained_cfg["architecture"]
        dense.arguments = {key: value for key, value in model.model_args.items() if key not in _OF_DRIP}
        dense.state = {name: value for name, value in dense.state.items() if not name.startswith(PREDICTORS)}
        return dense
    dense.arguments = _arguments_of(model)
    return dense


# Arguments of Drip that make the dense ViT another one, or start it elsewhere. All others are of boundaries, and of tokens that
# stand for several patches (size_bias) or follow one another in some order (scan): a tower at compression 1 records them, too.
_OF_DENSE = {"relative", "position_scale"}
_OF_DRIP = {
    name
    for name, parameter in inspect.signature(Drip.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
} - _OF_DENSE


def _arguments_of(model: VisionTransformer) -> dict:
    """timm arguments, from the modules themselves: names of presets and recorded arguments say less."""
    embed, block = model.patch_embed, model.blocks[0]
    if model.global_pool not in POOLINGS:
        raise unsupported(f"global_pool is {model.global_pool!r} (as in SigLIP: attention pooling is 'map')")
    if model.pool_include_prefix and model.global_pool == "avg":
        raise unsupported("its mean takes in the class token")
    if not (isinstance(block, Block) and isinstance(block.attn, Attention)):
        raise unsupported(f"its blocks are {type(block).__name__}s")
    for what, module, kind in (("patch embedding", embed, PatchEmbed), ("MLP", block.mlp, Mlp)):
        if type(module) is not kind:
            raise unsupported(f"its {what} is a {type(module).__name__}")
    if not (isinstance(block.attn.norm, nn.Identity) and isinstance(block.mlp.norm, nn.Identity)):
        raise unsupported("it has norms within attention or MLP")
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms):
        raise unsupported(f"its norms are {', '.join(sorted({type(norm).__name__ for norm in norms}))}")
    final, pooled = (not isinstance(norm, nn.Identity) for norm in (model.norm, model.fc_norm))
    arguments = {
        "img_size": number(embed.img_size),
        "patch_size": number(embed.patch_size),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": mlp_ratio(block.mlp.fc1.out_features, model.embed_dim),
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "proj_bias": block.attn.proj.bias is not None,
        "class_token": model.has_class_token,
        "global_pool": model.global_pool,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": final or pooled,
        "fc_norm": pooled,
        "act_layer": activation(block.mlp.act),
        "norm_eps": one_epsilon(norms),
    }
    if isinstance(block.ls1, LayerScale):
        arguments["init_values"] = 1.0  # makes the layers; their values are loaded
    return arguments


# Common parts


def fp32(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().float().contiguous() for name, value in state.items()}


def number(size: int | tuple[int, int]) -> int | tuple[int, int]:
    """One number for a square."""
    if isinstance(size, int):
        return size
    return size[0] if size[0] == size[1] else tuple(size)


def mlp_ratio(hidden: int, dim: int) -> float:
    """The mlp_ratio from which timm's int(dim * ratio) makes `hidden`."""
    return hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim


def one_epsilon(norms: list[nn.LayerNorm]) -> float:
    epsilons = sorted({norm.eps for norm in norms})
    if len(epsilons) != 1:
        raise unsupported(f"its layer norms have epsilons of their own ({', '.join(map(str, epsilons))})")
    return epsilons[0]


def activation(module: nn.Module) -> str:
    """timm's name of an MLP's activation."""
    name = type(module).__name__
    if name in ("GELU", "GELUTanh"):
        return "gelu_tanh" if name == "GELUTanh" or getattr(module, "approximate", "none") == "tanh" else "gelu"
    known = {"QuickGELU": "quick_gelu", "QuickGELUActivation": "quick_gelu", "ReLU": "relu", "SiLU": "silu"}
    if name not in known:
        raise unsupported(f"the activation {name} of its MLP is not known here")
    return known[name]
