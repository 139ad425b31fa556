"""Put an assistant together from its parts: a language-model checkpoint, a tower, a projector."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llava_drip.assistant.configuration import LlavaDripConfig
from llava_drip.assistant.modeling import LlavaDripForConditionalGeneration
from llava_drip.assistant.processing import IMAGE_TOKEN, LlavaDripProcessor, image_processor_for
from llava_drip.towers.io import describe_tower, load_tower


def check_checkpoint(directory: str | Path) -> Path:
    """The directory, if it holds a model; ValueError naming what is missing otherwise."""
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise ValueError(f"{directory}: no such model directory")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: not a model directory, config.json is missing")
    return path


def is_assistant(directory: str | Path) -> bool:
    """Whether a model directory holds an assistant of ours (by its model_type), rather than a language model."""
    return AutoConfig.from_pretrained(check_checkpoint(directory)).model_type == LlavaDripConfig.model_type


def build_assistant(
    language_model: str,
    vision_tower: str,
    *,
    projector_type: str = "mlp2x_gelu",
    vision_feature_layer: int | None = -2,
    compression: float | None = None,
    chat_template: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[LlavaDripForConditionalGeneration, LlavaDripProcessor]:
    """A language model and a tower joined by a new projector.

    Args:
        language_model: directory of a causal language model with its tokenizer (config.json, safetensors).
        vision_tower: directory written by save_tower, or a timm name (random weights).
        projector_type: "mlp2x_gelu" or "linear".
        vision_feature_layer: tower layer to project, -2 as in LLaVA; None for the normed output.
        compression: tokens budget in patches per token; None leaves the tower's own.
        chat_template: Jinja template; the tokenizer's own when None.
        dtype: of the language model, the projector and the tower; the checkpoint's when None.
    Raises:
        ValueError: a directory or name that holds no such part.
    """
    path = check_checkpoint(language_model)
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"{path}: no *.safetensors weights in it")
    # dtype None is transformers' default; "auto" keeps the checkpoint's.
    text_model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if len(tokenizer) > text_model.get_input_embeddings().num_embeddings:
        text_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    arguments = {} if compression is None else {"compression": compression}
    tower = load_tower(vision_tower, **arguments)
    config = LlavaDripConfig(
        text_config=text_model.config,
        vision_config=describe_tower(tower),
        projector_type=projector_type,
        vision_feature_layer=vision_feature_layer,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    model = LlavaDripForConditionalGeneration(config, tower, text_model)
    model.generation_config = text_model.generation_config
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model = model.to(text_model.dtype)
    processor = LlavaDripProcessor(
        image_processor_for(config.vision_config), tokenizer, chat_template=chat_template or tokenizer.chat_template
    )
    return model, processor
