"""Answers of assistants side by side: one language model behind a dense tower, behind a DRIP of the same weights at several
budgets, and all of it as transformers' own LLaVA. Weights are random: what an answer costs does not depend on them.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from llava_drip.assistant.configuration import LlavaDripConfig
from llava_drip.assistant.modeling import LlavaDripForConditionalGeneration
from llava_drip.assistant.processing import LlavaDripProcessor, image_processor_for
from llava_drip.assistant.stock import stock_processor, to_stock
from llava_drip.conversation import user_turn
from llava_drip.engine import Engine
from llava_drip.instruct.language import train_tokenizer
from llava_drip.instruct.stage_cost.plan import text_config
from llava_drip.instruct.templates import VICUNA_SYSTEM, VICUNA_V1
from llava_drip.measure.speed import DTYPES, synchronize
from llava_drip.scheduling.features import at_compression
from llava_drip.towers.convert import read_dense, to_drip
from llava_drip.towers.entry import SIZES
from llava_drip.towers.io import describe_tower
from llava_drip.towers.plain import PLAIN_PRESETS
from llava_drip.towers.rebuild import nearest, rebuild
from llava_drip.training.meters import peak_memory_gib, reset_peak_memory
from llava_drip.world.scenes import sample_scene
from llava_drip.world.texts import caption

STOCK, DENSE = "transformers", "dense"


@dataclass(frozen=True)
class Plan:
    """What is compared; see scripts/measure_answers.py for the flags of these names. ValueError: nothing that can be made."""

    language_model: str = "tinyllama-1.1b"
    layers: int | None = None
    tower: str = "large"
    image_size: int = 336
    patch_size: int = 14
    compressions: tuple[float, ...] = (4.0, 10.0)
    new_tokens: int = 32
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self):
        if self.tower not in SIZES:
            raise ValueError(f"--tower {self.tower}: one of {', '.join(SIZES)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"--image_size {self.image_size}: no multiple of --patch_size {self.patch_size}")
        text_config(self.language_model, self.layers)

    @property
    def labels(self) -> list[str]:
        return [STOCK, DENSE, *(f"{compression:g}x" for compression in self.compressions)]


@dataclass(frozen=True)
class Answered:
    """Seconds from a picture and a text to the first token, and to the last; tokens written, visual and prompt tokens read."""

    first: float
    total: float
    tokens: int
    visual: int
    prompt: int

    @property
    def tokens_per_second(self) -> float:
        """Of all after the first."""
        return (self.tokens - 1) / (self.total - self.first)


@dataclass(frozen=True)
class Case:
    """answer: the request of a round (as `request` makes it), answered as it is measured. ids: the tokens of its answer, by
    generate. model: whose weights it uses."""

    label: str
    answer: Callable[[int], Answered]
    ids: Callable[[int], list[int]]
    model: nn.Module


def request(plan: Plan, number: int) -> tuple[list[dict], Image.Image]:
    """A picture of noise, and words of the world; both new for each number."""
    chance = np.random.default_rng([plan.seed, number])
    pixels = chance.integers(0, 256, (plan.image_size, plan.image_size, 3), dtype=np.uint8)
    return [user_turn(caption(sample_scene(chance, "train"), chance))], Image.fromarray(pixels)


def make_cases(plan: Plan, labels: Sequence[str]) -> list[Case]:
    """Those of plan.labels that are asked for, on the plan's device, with one language model in memory."""
    torch.manual_seed(plan.seed)
    device, dtype = torch.device(plan.device), DTYPES[plan.dtype]
    config = text_config(plan.language_model, plan.layers)
    with device:  # where random numbers are fast
        language_model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    size = SIZES[plan.tower]
    clip = CLIPVisionConfig(
        hidden_size=size["embed_dim"],
        intermediate_size=4 * size["embed_dim"],
        num_hidden_layers=size["depth"],
        num_attention_heads=size["num_heads"],
        image_size=plan.image_size,
        patch_size=plan.patch_size,
    )
    dense, tokenizer, cases = read_dense(CLIPVisionModel(clip)), _tokenizer(config.vocab_size), []
    whole = partial(_assistant, language_model=language_model, tokenizer=tokenizer)
    if {STOCK, DENSE} & set(labels):
        tower = rebuild(dense, *nearest(dense, PLAIN_PRESETS, {"class_token": True, "global_pool": "token"}), {})
        model, processor = whole(tower)
        model.to(device)
        if STOCK in labels:
            cases.append(_stock_case(plan, model, processor))
        if DENSE in labels:
            cases.append(_own_case(plan, DENSE, _engine(model, processor), None))
        del model, tower
    if budgets := [compression for compression in plan.compressions if f"{compression:g}x" in labels]:
        model, processor = whole(to_drip(dense, compression=budgets[0]))
        engine = _engine(model.to(device), processor)
        cases += [_own_case(plan, f"{budget:g}x", engine, budget) for budget in budgets]
    gc.collect()
    return cases


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Of the words that are read here; vocabulary: of the language model."""
    chance = np.random.default_rng(0)
    texts = [VICUNA_SYSTEM, *(caption(sample_scene(chance, "train"), chance) for _ in range(300))]
    return train_tokenizer(texts * 2, min(768, vocabulary))


def _assistant(
    tower: nn.Module, language_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> tuple[LlavaDripForConditionalGeneration, LlavaDripProcessor]:
    vision = describe_tower(tower)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaDripConfig(text_config=language_model.config, vision_config=vision, image_token_id=image_token)
    model = LlavaDripForConditionalGeneration(config, tower, language_model)
    model.generation_config = GenerationConfig(
        eos_token_id=None, pad_token_id=tokenizer.pad_token_id
    )  # never ends itself
    for part in (model.vision_tower, model.multi_modal_projector):
        part.to(language_model.dtype)
    processor = LlavaDripProcessor(image_processor_for(vision, "square"), tokenizer, chat_template=VICUNA_V1)
    return model.eval(), processor


def _engine(model: LlavaDripForConditionalGeneration, processor: LlavaDripProcessor) -> Engine:
    """As it is served, but that nothing is kept from one request to the next."""
    return Engine(model, processor, max_cached_tokens=0, image_bytes=0)


def _own_case(plan: Plan, label: str, engine: Engine, compression: float | None) -> Case:
    def answer(number: int) -> Answered:
        messages, image = request(plan, number)
        started = time.perf_counter()
        stream = engine.stream(messages, [image], max_new_tokens=plan.new_tokens, compression=compression)
        *_, last = stream
        total, usage = time.perf_counter() - started, last.usage
        first = total - (usage.total_ms - usage.first_token_ms) / 1000
        return Answered(first, total, usage.new_tokens, usage.visual_tokens, usage.prompt_tokens)

    def ids(number: int) -> list[int]:
        messages, image = request(plan, number)
        prompt = engine.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = engine.processor(text=prompt, images=[image]).to(engine.device)
        with torch.inference_mode(), at_compression(engine.model, compression):
            answer = engine.model.generate(**inputs, max_new_tokens=plan.new_tokens, do_sample=False)
        return answer[0, inputs["input_ids"].shape[1] :].tolist()

    return Case(label, answer, ids, engine.model)


class _FirstToken(StoppingCriteria):
    """Notes when generate has its first token, and stops nothing."""

    def __init__(self):
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        if self.at is None:
            synchronize(input_ids.device)
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _stock_case(plan: Plan, model: LlavaDripForConditionalGeneration, processor: LlavaDripProcessor) -> Case:
    """LlavaForConditionalGeneration.generate with the dense assistant's weights, and LlavaProcessor."""
    stock, why_no_tower = to_stock(model)
    assert why_no_tower is None, why_no_tower
    stock.to(model.device)
    stock.model.language_model, stock.lm_head = model.language_model.model, model.language_model.lm_head  # not twice
    reader = stock_processor(processor, stock.config)
    settings = copy.deepcopy(model.generation_config)
    settings.update(max_new_tokens=plan.new_tokens, do_sample=False)

    def generated(messages: list[dict], image: Image.Image, watch: _FirstToken) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and of the answer."""
        prompt = reader.apply_chat_template(messages, add_generation_prompt=True)
        inputs = reader(images=[image], text=prompt, add_special_tokens=False, return_tensors="pt").to(stock.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(stock.dtype)
        with torch.inference_mode():
            ids = stock.generate(**inputs, generation_config=settings, stopping_criteria=StoppingCriteriaList([watch]))
        length = inputs["input_ids"].shape[1]
        return ids[0, :length].tolist(), ids[0, length:].tolist()  # which waits for a GPU

    def answer(number: int) -> Answered:
        messages, image = request(plan, number)
        started, watch = time.perf_counter(), _FirstToken()
        prompt, written = generated(messages, image, watch)
        total, visual = time.perf_counter() - started, prompt.count(stock.config.image_token_id)
        return Answered(watch.at - started, total, len(written), visual, len(prompt))

    return Case(STOCK, answer, lambda number: generated(*request(plan, number), _FirstToken())[1], stock)


def two_answers(plan: Plan, label: str) -> Callable[[], float]:
    """For measure.memory.rise_in_fresh_process: makes a case, and returns what answers twice and tells the peak in GiB."""
    (case,) = make_cases(plan, [label])

    def run() -> float:
        reset_peak_memory()  # making it may have taken more
        case.answer(0)
        case.answer(1)
        return peak_memory_gib()

    return run
