"""What a run over a frozen base saves: what it trains, and the base by name, in each checkpoint as in the result."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from llava_drip.assistant.adapter import LORA_FILES, PROJECTOR_FILE, Base, frozen_parts
from llava_drip.assistant.build import is_assistant
from llava_drip.assistant.quantization import Quantization
from llava_drip.instruct.zero import gathered

_PROJECTOR = "multi_modal_projector."


class Standing:
    """Holds, on the rank that writes, what a language model's directory lacks of the assistant: make it before parameters
    change their dtype, place or owner."""

    def __init__(self, model, path: str, quantization: Quantization | None, saves: bool = True):
        """All ranks call it.

        Args:
            model: LlavaDripForConditionalGeneration as load_parts gave it.
            path: --model_name_or_path.
            quantization: of the language model in training.
            saves: whether this rank writes.
        """
        self.model, self.path = model, Path(path).expanduser()
        self.quantization = {} if quantization is None else quantization.as_dict()
        self.is_assistant, self.frozen = is_assistant(self.path), {}
        if not self.is_assistant:
            vocabulary = AutoConfig.from_pretrained(self.path).get_text_config().vocab_size
            layers = (model.get_input_embeddings(), model.get_output_embeddings())
            with gathered([layer.weight for layer in layers if layer is not None]):
                self.frozen = frozen_parts(model, vocabulary) if saves else {}
        self.fingerprint: str | None = None  # of the base: set before the first save

    def trained(self, model: torch.nn.Module, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Of a state dict (the model's when None) what a run without LoRA trains, the projector; with it peft chooses."""
        if hasattr(model, "peft_config"):
            return state
        state = model.state_dict() if state is None else state
        return {key: value for key, value in state.items() if key.startswith(_PROJECTOR)}

    def write(self, directory: Path) -> None:
        """Into a directory that holds the trained parts."""
        assert self.fingerprint is not None
        (directory / "README.md").unlink(missing_ok=True)  # peft's form for a model card, not filled in
        base = Base(self.path, self.fingerprint, self.is_assistant, self.quantization)
        base.write(directory, self.model, self.frozen)
        write_projector(directory)  # without LoRA it is what loading reads; model.safetensors is what resuming reads


def write_projector(directory: Path) -> None:
    """The projector's tensors of a directory's saved weights, as a small file of its own beside them.

    From the files: under ZeRO-3 no rank has the whole in memory.
    """
    projector, name = {}, _PROJECTOR
    for file in sorted([*directory.glob("model*.safetensors"), *directory.glob(LORA_FILES[1])]):
        prefix = f"base_model.model.{name}" if file.name == LORA_FILES[1] else name
        with safe_open(file, framework="pt") as weights:
            keys = [key for key in weights.keys() if key.startswith(prefix)]  # noqa: SIM118
            projector |= {key.removeprefix(prefix): weights.get_tensor(key) for key in keys}
    assert projector, f"{directory}: no projector among the saved weights"
    save_file(projector, directory / PROJECTOR_FILE)
