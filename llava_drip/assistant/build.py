"""Put an assistant together from its parts: a language-model checkpoint, a tower, a projector."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llava_drip.assistant.configuration import LlavaDripConfig
from llava_drip.assistant.modeling import LlavaDripForConditionalGeneration
from llava_drip.assistant.names import BIN_WEIGHTS, CONVERT, model_directory
from llava_drip.assistant.processing import IMAGE_TOKEN, LlavaDripProcessor, add_image_token, image_processor_for
from llava_drip.assistant.quantization import Quantization, own_quantization
from llava_drip.files import read_object
from llava_drip.towers.contract import check_budget
from llava_drip.towers.io import describe_tower, load_tower


def check_checkpoint(directory: str | Path, assistant: bool = False) -> Path:
    """The directory that a name means (names.model_directory: a repository of the Hub is downloaded), if it looks like a saved
    model; ValueError naming what is missing otherwise.

    assistant: it must be one of ours, rather than any model.
    """
    path = model_directory(directory)
    config = path / "config.json"
    if not config.is_file():
        raise ValueError(f"{path}: has no config.json, so it is not a model directory")
    kind = read_object(config).get("model_type")
    if (generation := path / "generation_config.json").is_file():
        read_object(generation)  # transformers would go on without a word, and without its end marks
    if assistant and kind != LlavaDripConfig.model_type:
        raise ValueError(f"{config}: model_type is {kind!r}, not {LlavaDripConfig.model_type!r}")
    if not any(path.glob("*.safetensors")):
        convert = f"; {CONVERT} {path} --output DIR makes them" if any(path.glob(BIN_WEIGHTS[0])) else ""
        raise ValueError(f"{path}: no *.safetensors weights in it (other formats are not loaded){convert}")
    return path


def is_assistant(directory: str | Path) -> bool:
    """Whether a model directory holds an assistant of ours (by its model_type), rather than a language model."""
    return AutoConfig.from_pretrained(check_checkpoint(directory)).model_type == LlavaDripConfig.model_type


def load_whole(
    kind: type, directory: Path, dtype: torch.dtype | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """kind.from_pretrained of a directory, where a weight that is missing or misshapen is a ValueError, not a random one.

    dtype: the checkpoint's when None.
    quantization: linear layers are quantised as they are loaded; None: not.
    """
    options = {} if quantization is None else {"quantization_config": quantization}
    try:
        model, report = kind.from_pretrained(
            directory,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # json, safetensors and transformers each raise their own
        raise ValueError(f"{damaged(directory)}: cannot be loaded: {error}") from error
    lacking = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
    if lacking:
        raise ValueError(f"{directory}: {len(lacking)} weights are missing or misshapen, first {lacking[0]}")
    return model


def load_assistant(
    directory: str | Path, dtype: torch.dtype | None = None, quantization: Quantization | None = None
) -> tuple[LlavaDripForConditionalGeneration, LlavaDripProcessor]:
    """The assistant in a directory written by save_pretrained, or in the result of a LoRA run (adapter.py), whose adapter is
    then part of the weights; with its processor. On the CPU, in eval.

    dtype: the checkpoint's when None.
    quantization: of the language model's linear layers; bitsandbytes puts them on the GPU where there is one. An adapter then
        stays beside them.
    Raises:
        ValueError: naming the directory and what is wrong with it: no assistant, weights missing or misshapen; or the base of
            an adapter, where it is missing or not what it was.
    """
    path = check_checkpoint(directory, assistant=True)
    from llava_drip.assistant.adapter import is_adapted, load_adapted  # late: it loads its base by this module

    if is_adapted(path):
        model = load_adapted(path, dtype, quantization)
    elif quantization is None:
        model = load_whole(LlavaDripForConditionalGeneration, path, dtype)
    else:
        skip = ["vision_tower", "multi_modal_projector", output_layer(path)]
        model = load_whole(LlavaDripForConditionalGeneration, path, dtype, quantization.config(skip))
        own_quantization(model, quantization.bits)
    try:
        processor = LlavaDripProcessor.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a tokenizer's or an image processor's own
        raise ValueError(f"{damaged(path)}: cannot be loaded: {error}") from error
    return model, processor


def damaged(directory: Path) -> Path:
    """The first file of a model directory that cannot be read as what it is, for a message; the directory where all can."""
    for file in (*sorted(directory.glob("*.safetensors")), *sorted(directory.glob("*.json"))):
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            else:
                with safe_open(file, framework="pt"):  # its header, and whether the file is as long as that says
                    pass
        except (ValueError, OSError, SafetensorError):
            return file
    return directory


def dtype_of(directory: Path) -> torch.dtype:
    """The dtype that a model directory's configuration names, of a result that stands on a base its own; float32 where it
    names none."""
    return AutoConfig.from_pretrained(directory).dtype or torch.float32


def output_layer(directory: Path) -> str:
    """Name of the layer that gives an assistant's logits, most often language_model.lm_head. No weights are read."""
    with torch.device("meta"):
        model = LlavaDripForConditionalGeneration(LlavaDripConfig.from_pretrained(directory))
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def check_layer(tower: torch.nn.Module, layer: int | None, name: str) -> None:
    """ValueError for a layer that the tower `name` does not have, or that lies before its pooling.

    A tower of a foreign kind, which does not say how many blocks it has, refuses its layers itself, in its first step.
    """
    if layer is None or not hasattr(tower, "blocks"):
        return
    depth = len(tower.blocks)
    lowest = max(-depth, getattr(tower, "pool_depths", (0,))[-1] - depth - 1)
    if not lowest <= layer <= -1:
        raise ValueError(
            f"--mm_vision_select_layer {layer} (vision_feature_layer): {name} gives layers {lowest} to -1, from the end"
        )


def make_savable(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Drop sampling defaults that sampling is not switched on for, as Vicuna's: greedy decoding does not read them, and
    transformers refuses to save a changed configuration with them, as training may change it. And give it the padding token.

    Raises:
        ValueError: naming the file, for what it would refuse besides, if it were changed.
    """
    if config.pad_token_id is None or config.pad_token_id < 0:  # -1 in old conversions of LLaMA
        config.pad_token_id = tokenizer.pad_token_id
    if not config.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(config, name, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path / 'generation_config.json'}: transformers could not save it again: {reason}"
        ) from error


def tokenizer_for(path: Path) -> PreTrainedTokenizerBase:
    """A language model's tokenizer with what an assistant needs of it: an image token and a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    add_image_token(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def build_assistant(
    language_model: str,
    vision_tower: str,
    *,
    projector_type: str = "mlp2x_gelu",
    vision_feature_layer: int | None = -2,
    segment_positions: bool = False,
    compression: float | None = None,
    image_aspect_ratio: str = "square",
    chat_template: str | None = None,
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
) -> tuple[LlavaDripForConditionalGeneration, LlavaDripProcessor]:
    """A language model and a tower joined by a new projector.

    Args:
        language_model: a causal language model with its tokenizer (config.json, safetensors): a directory, or a repository of
            the Hub.
        vision_tower: directory written by save_tower, or of the run that did, a name of this package (random weights), or a
            pretrained plain ViT of timm, open_clip or Hugging Face, by name or directory.
        projector_type: "mlp2x_gelu" or "linear".
        vision_feature_layer: tower layer to project, -2 as in LLaVA; None for the tower's output.
        segment_positions: tell the language model where each token's segment lies.
        compression: token budget in patches per token, met exactly by each image and kept in the configuration; None: each
            image decides, as the tower was trained.
        image_aspect_ratio: "square" or "pad", as image_processor_for takes it.
        chat_template: Jinja template; the tokenizer's own when None.
        dtype: of the language model, the projector and the tower; the checkpoint's when None.
        quantization: of the language model's linear layers, but the output layer.
    Raises:
        ValueError: a directory or name that holds no such part, or not whole; a layer that the tower does not have;
            compression for a tower without a budget.
    """
    path = check_checkpoint(language_model)
    tower = load_tower(vision_tower)  # first: it may not have the layer, and the language model takes minutes
    check_layer(tower, vision_feature_layer, vision_tower)
    if compression is not None:
        check_budget(tower, vision_tower)
    text_model = load_whole(AutoModelForCausalLM, path, dtype, quantization and quantization.config())
    tokenizer = tokenizer_for(path)
    if len(tokenizer) > text_model.get_input_embeddings().num_embeddings:
        text_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    vision_config = describe_tower(tower)
    if compression is not None:
        vision_config["budget"] = float(compression)  # applied by the model
    config = LlavaDripConfig(
        text_config=text_model.config,
        vision_config=vision_config,
        projector_type=projector_type,
        vision_feature_layer=vision_feature_layer,
        segment_positions=segment_positions,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    model = LlavaDripForConditionalGeneration(config, tower, text_model)
    model.generation_config = text_model.generation_config
    make_savable(model.generation_config, tokenizer, path)
    if quantization is not None:
        own_quantization(model, quantization.bits)
    model.vision_tower.to(text_model.dtype)
    model.multi_modal_projector.to(text_model.dtype)
    image_processor = image_processor_for(config.vision_config, image_aspect_ratio)
    processor = LlavaDripProcessor(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
    return model, processor
