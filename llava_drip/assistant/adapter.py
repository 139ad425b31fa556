"""A result that stands on a base: what was trained (LoRA, projector) and where the rest of the assistant lies.

    adapter_config.json, adapter_model.safetensors   LoRA and the projector, in peft's format (Hu et al., 2021)
    mm_projector.safetensors                         the projector alone
    base_model.json                                  the base, an assistant or a language model: its place and its fingerprint
    frozen_parts.safetensors                         of a base that is a language model: the tower, and rows of new tokens
    config.json, tokenizer and processor files       of the whole assistant

Without the first two files it is the projector that was trained alone, before a quantised language model.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from llava_drip.assistant.build import check_checkpoint, load_assistant, load_whole
from llava_drip.assistant.configuration import LlavaDripConfig
from llava_drip.assistant.modeling import LlavaDripForConditionalGeneration
from llava_drip.assistant.quantization import Quantization, own_quantization
from llava_drip.files import PARTIAL, write_whole
from llava_drip.fingerprint import fingerprint

BASE_FILE = "base_model.json"
FROZEN_FILE = "frozen_parts.safetensors"
PROJECTOR_FILE = "mm_projector.safetensors"
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")
_TOWER, _ROWS_IN, _ROWS_OUT = "vision_tower.", "input_embeddings", "output_embeddings"


@dataclass(frozen=True)
class Base:
    """What a result stands on.

    Attributes:
        path: directory of an assistant (which may itself stand on a base) or of a language model.
        fingerprint: llava_drip.fingerprint of it when the result was trained.
        is_assistant: which of the two.
        quantization: of its language model in training, as Quantization.as_dict gives it; {} for none.
    """

    path: Path
    fingerprint: str
    is_assistant: bool
    quantization: dict

    def write(self, directory: Path, model: LlavaDripForConditionalGeneration, frozen: dict[str, Tensor]) -> None:
        """Into a directory that holds the trained parts already: the base, and what else the assistant needs.

        frozen: what frozen_parts gave, {} for an assistant as a base.
        """
        model.config.save_pretrained(directory)
        model.generation_config.save_pretrained(directory)
        if frozen:
            save_file(frozen, directory / FROZEN_FILE, metadata={"format": "pt"})
        home = directory.parent if directory.name == PARTIAL else directory
        own = {
            "base_model": str(self.path.resolve()),
            "base_model_from_here": os.path.relpath(self.path.resolve(), home.resolve()),
            "kind": "assistant" if self.is_assistant else "language_model",
            "fingerprint": self.fingerprint,
            "trained_on": self.quantization,
        }
        write_whole(directory / BASE_FILE, json.dumps(own, indent=1))


def is_adapted(directory: str | Path) -> bool:
    """Whether a directory holds the trained parts of an assistant alone, and names its base."""
    return (Path(directory).expanduser() / BASE_FILE).is_file()


def read_base(directory: Path, elsewhere: str | Path | None = None, check: bool = True) -> Base:
    """The base of a result, where it lay or, moved along with the result, where it lies from there. Where there is something at
    both places, the one whose fingerprint fits.

    elsewhere: where it lies now; None: where it is said to lie.
    check: compare its fingerprint, which reads every byte of it, also where there is one place.
    Raises:
        ValueError: the file is damaged; the base is missing, or not what the result was trained on.
    """
    file = directory / BASE_FILE
    try:
        own = json.loads(file.read_text(encoding="utf-8"))
        places = [Path(own["base_model"]), (directory / own["base_model_from_here"]).resolve()]
        kind, expected, quantization = own["kind"], own["fingerprint"], dict(own["trained_on"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({type(error).__name__}: {error})") from error
    places = places if elsewhere is None else [Path(elsewhere).expanduser()]
    there = list(dict.fromkeys(place for place in places if place.is_dir()))
    if not there:
        what = "an assistant" if kind == "assistant" else "a language model"
        raise ValueError(
            f"{directory}: its base, {what}, is not at {places[0]}; put it back, or merge: scripts/merge_lora.py {directory} "
            "--base WHERE_IT_IS --output DIR"
        )
    path, found = there[0], []
    if check or len(there) > 1:
        for path in there:
            found.append(fingerprint(path))
            if found[-1] == expected:
                break
        else:
            named = " and ".join(f"{path} (fingerprint {given})" for path, given in zip(there, found, strict=True))
            raise ValueError(
                f"{directory}: its base {named} is not what it was trained on (then {expected}); put the former one back"
            )
    return Base(path, expected, kind == "assistant", quantization)


def bases_of(directory: str | Path) -> list[Path]:
    """The base of a result, the base's base, and so on; none for whole models."""
    found, path = [], Path(directory).expanduser()
    while is_adapted(path) and path not in found:
        path = read_base(path, check=False).path
        found.append(path)
    return found


def frozen_parts(model: LlavaDripForConditionalGeneration, vocabulary: int) -> dict[str, Tensor]:
    """What an assistant has that neither its language model's directory nor the trained parts hold: the tower, and the rows
    [new, D] of tokens beyond the language model's own `vocabulary`."""
    parts = {f"{_TOWER}{key}": value.detach() for key, value in model.vision_tower.state_dict().items()}
    for name, layer in _embeddings(model):
        if len(layer.weight) > vocabulary:
            parts[name] = layer.weight.detach()[vocabulary:].clone()
    return {key: value.contiguous() for key, value in parts.items()}


def _embeddings(model: nn.Module) -> list[tuple[str, nn.Module]]:
    layers = ((_ROWS_IN, model.get_input_embeddings()), (_ROWS_OUT, model.get_output_embeddings()))
    return [(name, layer) for name, layer in layers if layer is not None]


def load_adapted(
    directory: Path,
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    base: str | Path | None = None,
) -> LlavaDripForConditionalGeneration:
    """The assistant of a result that stands on a base, in eval. LoRA is merged into its weights; beside quantised ones it stays.

    dtype: the base's when None.
    base: where it lies now; None: where the result says.
    Raises:
        ValueError: naming the file or the base that is missing, damaged, changed or does not fit.
    """
    given = read_base(directory, base)
    config = LlavaDripConfig.from_pretrained(directory)
    if given.is_assistant:
        if quantization is not None and is_adapted(given.path):
            raise ValueError(
                f"{given.path}: stands on a base itself, and cannot be quantised; merge it first: scripts/merge_lora.py"
            )
        model, _ = load_assistant(given.path, dtype, quantization)
        _check_vocabulary(model, config, directory, given.path)
    else:
        model = _from_language_model(directory, config, given.path, dtype, quantization)
    if config.vision_config.get("budget") != model.config.vision_config.get("budget"):
        model.set_compression(config.vision_config.get("budget"))
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    if (directory / LORA_FILES[0]).is_file():
        model = _with_lora(model, directory, merge=quantization is None)
    else:
        _load(model.multi_modal_projector, _read(directory / PROJECTOR_FILE), directory / PROJECTOR_FILE)
    return model.eval()


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: missing, cut off or no safetensors file ({error})") from error


def _load(module: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def _check_vocabulary(model: nn.Module, config: LlavaDripConfig, directory: Path, base: Path) -> None:
    own, others = config.text_config.vocab_size, model.config.text_config.vocab_size
    if own != others:
        raise ValueError(f"{directory}: has a vocabulary of {own} tokens, and its base {base} one of {others}")


def _from_language_model(
    directory: Path, config: LlavaDripConfig, base: Path, dtype: torch.dtype | None, quantization: Quantization | None
) -> LlavaDripForConditionalGeneration:
    """A language model with the tower and the rows of new tokens from frozen_parts.safetensors; the projector is random."""
    text_model = load_whole(AutoModelForCausalLM, check_checkpoint(base), dtype, quantization and quantization.config())
    frozen = _read(directory / FROZEN_FILE)
    had, wanted = text_model.get_input_embeddings().num_embeddings, config.text_config.vocab_size
    new = len(frozen.get(_ROWS_IN, ()))
    if had + new != wanted:
        raise ValueError(
            f"{directory}: has a vocabulary of {wanted} tokens, {new} of them new, and its base {base} one of {had}"
        )
    if new:
        text_model.resize_token_embeddings(wanted, mean_resizing=False)
    config.text_config = text_model.config
    model = LlavaDripForConditionalGeneration(config, None, text_model)
    with torch.no_grad():
        for name, layer in _embeddings(model):
            if new:
                layer.weight[had:] = frozen[name].to(layer.weight)
    tower = {key.removeprefix(_TOWER): value for key, value in frozen.items() if key.startswith(_TOWER)}
    _load(model.vision_tower, tower, directory / FROZEN_FILE)
    if quantization is not None:
        own_quantization(model, quantization.bits)
    model.vision_tower.to(text_model.dtype)
    model.multi_modal_projector.to(text_model.dtype)
    return model


def _with_lora(
    model: LlavaDripForConditionalGeneration, directory: Path, merge: bool
) -> LlavaDripForConditionalGeneration:
    """The model with LoRA and projector of adapter_model.safetensors, every one of its tensors in its place."""
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    except ImportError as error:
        raise ValueError(f"{directory}: a LoRA adapter needs peft ({error}): pip install peft") from error
    tensors = _read(directory / LORA_FILES[1])
    try:
        adapted = PeftModel(model, PeftConfig.from_pretrained(directory), "default")
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        if own != tensors.keys():
            odd = sorted(own ^ tensors.keys())[0]
            raise ValueError(f"{odd} is {'missing' if odd in own else 'not of this model'}")
        set_peft_model_state_dict(adapted, tensors)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{directory}: its adapter does not fit its base: {' '.join(str(error).split())}") from error
    if merge:
        return adapted.merge_and_unload(safe_merge=True)
    return adapted.get_base_model()
