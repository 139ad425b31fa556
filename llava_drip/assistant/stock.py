"""An assistant as transformers' own LlavaForConditionalGeneration, which servers know: scripts/export_llava.py.

The language model and an mlp2x_gelu projector go over as they are. A plain CLIP ViT goes over too (CLIPVisionModel); of any
other tower only the shape does, and the pictures' embeddings are made here (embeddings.py) and handed to the server.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)

from llava_drip.assistant.modeling import LlavaDripForConditionalGeneration
from llava_drip.assistant.processing import IMAGE_TOKEN, LlavaDripProcessor
from llava_drip.files import whole_folder
from llava_drip.towers.dense import Dense, read_timm
from llava_drip.towers.vit import PackedVisionTransformer

# timm's parameters → CLIPVisionModel's, but qkv, which is three there.
_CLIP_NAMES = (
    ("cls_token", "embeddings.class_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("pos_embed", "embeddings.position_embedding.weight"),
    ("norm_pre.", "pre_layrnorm."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.out_proj."),
)
_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
}


# What some families do to the logits behind the head, by its name in their configurations, and the value that does nothing. The
# stock model's head is a bare matrix.
_HEADS = {
    "logits_scaling": 1,  # Granite
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "final_logit_softcapping": None,  # Gemma 2
}


def why_not_exported(model: LlavaDripForConditionalGeneration) -> str | None:
    """What of an assistant the stock layout has no place for; None: nothing."""
    if model.config.projector_type != "mlp2x_gelu":
        return f"its projector is {model.config.projector_type!r}, and the stock one is mlp2x_gelu"
    if model.config.segment_positions:
        return (
            "it has segment positions (--mm_segment_positions true), which the stock projector has no place for; --only-images "
            "writes embeddings that have them"
        )
    if model.config.vision_feature_layer is None:
        return "it reads the tower's output behind the last norm, and the stock model reads a layer (--mm_vision_select_layer)"
    text, family = model.config.text_config, model.config.text_config.model_type
    for name, nothing in _HEADS.items():
        value = getattr(text, name, nothing)
        if value not in (nothing, None):
            return f"its language model ({family}) has {name} {value:g}, and the stock model gives logits as they are"
    if getattr(model.language_model.get_output_embeddings(), "bias", None) is not None:
        return f"its language model ({family}) has a bias in its head, and the stock model's head has none"
    return None


def check_export(model: LlavaDripForConditionalGeneration) -> None:
    """ValueError naming what the stock layout has no place for."""
    if why := why_not_exported(model):
        raise ValueError(f"cannot be exported: {why}")


def clip_of(tower: nn.Module) -> tuple[CLIPVisionConfig, dict[str, Tensor]] | str:
    """A plain tower as CLIPVisionModel's configuration and weights, or why it is none."""
    if type(tower) is not PackedVisionTransformer:
        return f"a {type(tower).__name__} is no plain ViT"
    try:
        dense = read_timm(tower)
    except ValueError as error:
        return str(error)
    given = dense.arguments
    for unlike, what in (
        (not given["pre_norm"], "it has no norm before the blocks"),
        (not given["class_token"], "it has no class token"),
        (given["reg_tokens"] > 0, "it has register tokens"),
        (given["qk_norm"] or not given["qkv_bias"] or not given["proj_bias"], "its attention is not CLIP's"),
        ("patch_embed.proj.bias" in dense.state, "its patch embedding has a bias"),
        (given["pos_embed"] == "none" or given["no_embed_class"], "its positions are not CLIP's"),
        ("init_values" in given, "it has layer scales"),
        (given["act_layer"] not in _ACTIVATIONS, f"its activation is {given['act_layer']}"),
        (not isinstance(given["img_size"], int), "its pictures are not square"),
    ):
        if unlike:
            return what
    return _clip_config(given), _clip_weights(dense)


def _clip_config(given: dict) -> CLIPVisionConfig:
    """given: timm arguments of a ViT, as Dense has them."""
    return CLIPVisionConfig(
        hidden_size=given["embed_dim"],
        intermediate_size=int(given["embed_dim"] * given["mlp_ratio"]),
        num_hidden_layers=given["depth"],
        num_attention_heads=given["num_heads"],
        image_size=given["img_size"],
        patch_size=given["patch_size"],
        hidden_act=_ACTIVATIONS.get(given["act_layer"], "gelu"),
        layer_norm_eps=given["norm_eps"],
    )


def _clip_weights(dense: Dense) -> dict[str, Tensor]:
    weights = {}
    for name, value in dense.state.items():
        if name.startswith(("head.", "fc_norm.", "norm.")):
            continue
        for ours, theirs in _CLIP_NAMES:
            name = name.replace(ours, theirs)
        if ".attn.qkv." in name:
            layer, _, kind = name.partition(".attn.qkv.")
            for which, part in zip("qkv", value.chunk(3)):
                weights[f"{layer}.self_attn.{which}_proj.{kind}"] = part.clone()
        elif name == "embeddings.class_embedding":
            weights[name] = value.flatten()
        elif name == "embeddings.position_embedding.weight":
            weights[name] = value[0]
        else:
            weights[name] = value
    width = len(weights["embeddings.class_embedding"])
    norm = ("norm.weight", "norm.bias")  # behind the last block; LLaVA reads before it, a tower may lack it
    final = [dense.state.get(name, start(width)) for name, start in zip(norm, (torch.ones, torch.zeros))]
    weights |= {"post_layernorm.weight": final[0], "post_layernorm.bias": final[1]}
    return weights


def shape_of(tower: nn.Module) -> CLIPVisionConfig:
    """A CLIP vision configuration of a tower's shape, for a server that is given embeddings and never runs it."""
    blocks = getattr(tower, "blocks", None)
    (side, _), (rows, _) = tower.patch_embed.img_size, tower.patch_embed.grid_size
    heads = blocks[0].attn.num_heads if blocks is not None else 1
    return CLIPVisionConfig(
        hidden_size=tower.num_features,
        intermediate_size=4 * tower.num_features,
        num_hidden_layers=len(blocks) if blocks is not None else 1,
        num_attention_heads=heads,
        image_size=side,
        patch_size=side // rows,
    )


@torch.no_grad()
def to_stock(model: LlavaDripForConditionalGeneration) -> tuple[LlavaForConditionalGeneration, str | None]:
    """The stock model with this assistant's weights, and why the tower is not among them (None: it is).

    Raises:
        ValueError: what the stock layout has no place for.
    """
    check_export(model)
    clip = clip_of(model.vision_tower)
    why_no_tower = clip if isinstance(clip, str) else None
    text_config = AutoConfig.for_model(**model.config.text_config.to_dict())
    config = LlavaConfig(
        vision_config=shape_of(model.vision_tower) if why_no_tower else clip[0],
        text_config=text_config,
        image_token_index=model.config.image_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy="default",
        image_seq_length=model.vision_tower.patch_embed.grid_size[0] * model.vision_tower.patch_embed.grid_size[1],
    )
    dtype = next(model.language_model.parameters()).dtype
    stock = LlavaForConditionalGeneration(config).to(dtype).eval()
    stock.model.language_model.load_state_dict(model.language_model.base_model.state_dict())
    stock.lm_head.load_state_dict(model.language_model.get_output_embeddings().state_dict())
    projector = stock.model.multi_modal_projector
    projector.linear_1.load_state_dict(model.multi_modal_projector[0].state_dict())
    projector.linear_2.load_state_dict(model.multi_modal_projector[2].state_dict())
    if not why_no_tower:
        tower = stock.model.vision_tower
        weights = {(f"vision_model.{k}" if hasattr(tower, "vision_model") else k): v for k, v in clip[1].items()}
        missing, unexpected = tower.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not name.endswith("position_ids")]
        assert not missing and not unexpected, f"{missing} {unexpected}"
    check_text(model, stock)
    stock.generation_config = model.generation_config
    return stock, why_no_tower


@torch.no_grad()
def check_text(model: LlavaDripForConditionalGeneration, stock: LlavaForConditionalGeneration) -> None:
    """ValueError where the two do not give the same logits for a few tokens of text."""
    ids = [i for i in range(min(17, model.config.text_config.vocab_size)) if i != model.config.image_token_id]
    ids = torch.tensor([ids], device=model.device)
    wanted, found = model(input_ids=ids).logits.float(), stock(input_ids=ids.to(stock.device)).logits.float()
    off = float((found.to(wanted.device) - wanted).abs().max() / wanted.abs().max())
    if not off <= 0.02:  # bfloat16's rounding; NaN is no match
        family = model.config.text_config.model_type
        raise ValueError(
            f"cannot be exported: the stock model does not compute what this language model ({family}) does; logits of text are "
            f"off by {off:.2g} of the largest"
        )


def stock_processor(processor: LlavaDripProcessor, config: LlavaConfig) -> LlavaProcessor:
    """transformers' LlavaProcessor: it writes one placeholder for each patch of a picture."""
    image_processor = processor.image_processor
    if not isinstance(image_processor, (CLIPImageProcessor, LlavaImageProcessor)):
        image_processor = CLIPImageProcessor(**image_processor.to_dict())
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=processor.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the class token, which "default" leaves out again
        chat_template=processor.chat_template,
        image_token=IMAGE_TOKEN,
    )


def export(
    model: LlavaDripForConditionalGeneration, processor: LlavaDripProcessor, output: str | Path
) -> tuple[Path, str | None]:
    """Writes a directory that LlavaForConditionalGeneration.from_pretrained reads; returns it, and why it has no tower (None: it
    has one). It appears when it is whole.

    Raises:
        ValueError: it is there already; or what to_stock says.
    """
    output = Path(output).expanduser()
    stock, why_no_tower = to_stock(model)
    with whole_folder(output) as partial:
        stock.save_pretrained(partial)
        stock_processor(processor, stock.config).save_pretrained(partial)
        note = {"vision_tower": "exported" if why_no_tower is None else f"of its shape, random weights: {why_no_tower}"}
        (partial / "llava_drip_export.json").write_text(json.dumps(note, indent=1))
    return output, why_no_tower
