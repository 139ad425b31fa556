"""Language models of several families: those with plain keys and values share a batch, the others answer one at a time."""

from __future__ import annotations

import logging

import pytest
import torch
from scheduling_helpers import answer, ask, at_once, picture
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llava_drip.assistant import build_assistant
from llava_drip.engine import Engine
from llava_drip.instruct.templates import VICUNA_V1

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TOGETHER = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 8},
    "phi": {},
    "gpt_neox": {},
    "olmo2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
}
ALONE = {
    "mistral": ({"sliding_window": 12}, "DynamicSlidingWindowLayer"),
    "llama": ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "dynamic"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "position_ids"),
    "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 12},
        "local attention",
    ),
}
REQUESTS = [
    {"messages": ask(text, images), "images": [picture(number)] * images, "max_new_tokens": tokens, **sampling}
    for number, (text, images, tokens, sampling) in enumerate(
        [
            ("What is it?", 1, 12, {}),
            ("why " * 40, 0, 20, {}),
            ("And the two?", 2, 5, {"temperature": 1.2, "seed": 3}),
            ("Go on.", 0, 30, {"stop": ["q"]}),
        ]
    )
]


@pytest.fixture
def load(tiny_tokenizer, tiny_tower, tmp_path):
    def load(family: str, options: dict, **limits) -> Engine:
        torch.manual_seed(0)
        marks = {f"{mark}_token_id": getattr(tiny_tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
        config = CONFIG_MAPPING[family](**{"vocab_size": len(tiny_tokenizer), **SMALL, **marks, **options})
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # larger than any family starts with: answers are to differ
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.15)
        directory = tmp_path / "language_model"
        model.save_pretrained(directory)
        tiny_tokenizer.save_pretrained(directory)
        model, processor = build_assistant(str(directory), str(tiny_tower), chat_template=VICUNA_V1)
        model.generation_config.eos_token_id = None
        return Engine(model, processor, **limits)

    return load


def expected(engine: Engine) -> list[tuple]:
    """What transformers' generate gives."""
    replies = []
    for request in REQUESTS:
        sampling = {name: request[name] for name in ("temperature", "seed") if name in request}
        (reply,) = engine.answer_batch(
            [(request["messages"], request["images"])], request["max_new_tokens"], **sampling
        )
        replies.append(reply.text.split(request["stop"][0])[0] if "stop" in request else reply.text)
    assert len(set(replies)) == len(replies)
    return replies


def together(engine: Engine) -> list[str]:
    replies = at_once(*(lambda request=request: answer(engine, **request) for request in REQUESTS))
    return [reply.text.strip() for reply in replies]


@pytest.mark.parametrize("family", TOGETHER)
def test_families_that_share_a_batch(family, load):
    engine = load(family, TOGETHER[family], prefill_tokens=32)
    assert engine.scheduler.why_alone is None
    assert together(engine) == [text.strip() for text in expected(engine)]
    assert together(engine) == [text.strip() for text in expected(engine)] and engine.stats()["prefix_hits"] > 0


@pytest.mark.parametrize("family", ALONE)
def test_families_that_answer_one_at_a_time(family, load, caplog):
    options, why = ALONE[family]
    with caplog.at_level(logging.WARNING):
        engine = load(family, options)
    assert [why in record.message and "one at a time" in record.message for record in caplog.records].count(True) == 1
    assert together(engine) == [text.strip() for text in expected(engine)]
    assert engine.stats()["running"] == 0 and engine.stats()["decoded_tokens"] > 0 and not engine.lock.locked()
    too_long = at_once(lambda: answer(engine, messages=ask("word " * 600)))[0]
    assert isinstance(too_long, ValueError) or family == "bloom"  # whose positions have no end
    stream = engine.stream(ask("Go on."), max_new_tokens=300)
    next(stream)
    stream.close()
    with engine.lock:  # comes free at once
        pass
    assert engine.stats()["cancelled"] == 1 or engine.stats()["length"] < 6


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_padding_beside_a_row_near_the_end_of_the_context(family, load):
    """Learned positions end there."""
    engine = load(family, TOGETHER[family], prefill_tokens=150)
    step, made = engine.scheduler._step, []

    def with_another():
        if not made and any(row.length >= 450 for row in engine.scheduler.batch.rows):
            made.append(engine.stream(ask("b " * 60), max_new_tokens=2))
        step()

    engine.scheduler._step = with_another
    *_, last = engine.stream(ask("ab" * 216), max_new_tokens=2)
    assert last.usage.prompt_tokens > 490 and last.usage.finish == "length"
    assert made and list(made[0])[-1].usage.finish == "length"
