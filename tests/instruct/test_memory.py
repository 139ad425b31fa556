"""The estimate of memory beside what a real run holds."""

from __future__ import annotations

import pytest
import torch
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaModel, TrainerCallback

from llava_drip.assistant import build_assistant
from llava_drip.instruct.arguments import parse
from llava_drip.instruct.data import Collator, ConversationDataset, load_records
from llava_drip.instruct.freeze import freeze_for
from llava_drip.instruct.memory import Setting, activation_bytes, gpu_total, parameter_bytes, setting_of, state_bytes
from llava_drip.instruct.stage import set_dtypes
from llava_drip.instruct.templates import VICUNA_V1
from llava_drip.instruct.trainer import StageTrainer

from .conftest import common, parts

pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(language_model, tower, world, output, *flags: str):
    needed = [*parts(language_model, tower, output), "--data_path", str(world.instruct_train)]
    return parse([*needed, *common(2, 1), *flags], "finetune.py", "test")[2]


class Held(TrainerCallback):
    """Bytes that a real step holds, by what they are for."""

    def __init__(self):
        self.found: dict[str, int] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = list(model.parameters())
        self.found["weights"] = sum(p.nbytes for p in parameters)
        self.found["gradients"] = sum(p.grad.nbytes for p in parameters if p.grad is not None)

    def on_step_end(self, args, state, control, optimizer: Optimizer = None, **kwargs):
        states = (value for state in optimizer.state.values() for value in state.values())
        self.found["states"] = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd"])
def test_what_a_real_step_holds(stage, optimizer, tiny_language_model, tiny_tower, tiny_world, tmp_path):
    args = arguments(tiny_language_model, tiny_tower, tiny_world, tmp_path / "out", "--optim", optimizer)
    model, processor = build_assistant(str(tiny_language_model), str(tiny_tower))
    freeze_for(stage, model)
    set_dtypes(model, args)
    estimate = parameter_bytes(model.parameters(), setting_of(args))
    records = load_records(tiny_world.instruct_train, tiny_world.images)
    held = Held()
    StageTrainer(
        model=model,
        args=args,
        train_dataset=ConversationDataset(records, processor, VICUNA_V1, tiny_world.images),
        data_collator=Collator(processor.tokenizer.pad_token_id),
        processing_class=processor,
        callbacks=[held],
    ).train()
    weights = sum(value for what, value in estimate.items() if what.startswith("weights"))
    assert weights == held.found["weights"] and estimate["gradients (fp32)"] == held.found["gradients"]
    if optimizer == "adafactor":  # a row and a column of each matrix, of small ones here
        assert held.found["states"] < 0.1 * held.found["gradients"]
    else:
        assert estimate["optimizer states"] == pytest.approx(held.found["states"], rel=0.01)


SHAPES = [(256, 512, 4, 4), (256, 1024, 4, 4), (512, 1024, 8, 2)]  # width, MLP, heads, heads of keys


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_autograd_keeps(dtype, trained, shape):
    """As the formula says, within a tenth: storages saved for the backward pass, but parameters."""
    h, f, heads, kv = shape
    config = LlamaConfig(
        hidden_size=h, intermediate_size=f, num_hidden_layers=5, num_attention_heads=heads, num_key_value_heads=kv,
        vocab_size=64,
    )  # fmt: skip
    model = LlamaModel(config).to(dtype).requires_grad_(trained).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(1, 96, h, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(inputs_embeds=x, use_cache=False).last_hidden_state
    measured = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    setting = Setting(half=dtype == torch.bfloat16)
    estimate = activation_bytes(config, 96, 0, setting, trained)["activations of the layers"]
    assert out.requires_grad and estimate == pytest.approx(measured, rel=0.1)
    checkpointed = activation_bytes(config, 96, 0, Setting(half=setting.half, checkpointing=True), trained)
    assert sum(checkpointed.values()) == pytest.approx(estimate / 5 + 5 * x.nbytes)


def test_zero_divides_among_the_processes():
    """Bytes a weight, trained and frozen, in 16 bits with Adam: Rajbhandari et al. (2020), figure 1, and DeepSpeed's fp32 copy of
    the gradients within the optimizer's step."""
    trained = torch.nn.Parameter(torch.zeros(1000))
    frozen = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16), requires_grad=False)
    for zero, on_gpu in ((0, 2 + 2 + 2 + 16), (1, 2 + 2 + 2 + 16 / 4), (2, 2 + 2 + 18 / 4), (3, (2 + 2 + 18) / 4)):
        found = parameter_bytes([trained, frozen], Setting(ranks=4, zero=zero, half=True))
        assert gpu_total(found) == pytest.approx(1000 * on_gpu)
    offloaded = parameter_bytes([trained, frozen], Setting(4, 3, True, offload_optimizer=True, offload_param=True))
    assert gpu_total(offloaded) == 0 and sum(offloaded.values()) == pytest.approx(1000 * 22 / 4)
    alone = parameter_bytes([trained, frozen], Setting(ranks=2, half=True))  # fp32 weights, autocast, DDP
    assert gpu_total(alone) == 1000 * (4 + 2 + 4 + 8 + 2 + 4)


def test_the_setting_is_the_runs(tiny_language_model, tiny_tower, tiny_world, tmp_path, repository):
    def setting(*flags: str) -> Setting:
        return setting_of(arguments(tiny_language_model, tiny_tower, tiny_world, tmp_path / "out", *flags))

    assert setting() == Setting()
    assert setting("--bf16", "true", "--gradient_checkpointing", "true", "--optim", "lomo") == Setting(
        half=True, checkpointing=True, states=None
    )
    pytest.importorskip("deepspeed")
    folder = repository / "scripts" / "deepspeed"
    assert setting("--deepspeed", str(folder / "zero2.json")) == Setting(zero=2)
    assert [state_bytes(name) for name in ("adamw_torch_fused", "paged_adamw_8bit", "adamw_8bit", "AdamW".lower())] == [
        *(8, 2, 2, 8),
    ]
