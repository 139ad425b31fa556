"""A reply is the one that the request gets alone, whoever joins and leaves beside it."""

from __future__ import annotations

import random
import time
from functools import partial

import pytest
import torch
from scheduling_helpers import answer, ask, at_once, picture, random_request, told
from slow_engine import slow
from transformers import TemperatureLogitsWarper

from llava_drip.engine import Engine
from llava_drip.scheduling.features import splice
from llava_drip.scheduling.requests import WorkFailed

COUNT = 24


@pytest.fixture(scope="module")
def endless(endless_checkpoint):
    return endless_checkpoint


@pytest.fixture(scope="module")
def alone(endless) -> list[tuple]:
    """What each random request gets from an engine that keeps nothing and has nothing else to do."""
    engine = Engine.load(endless, device="cpu", max_cached_tokens=0, image_bytes=0)
    replies = [told(answer(engine, **random_request(seed))) for seed in range(COUNT)]
    stats = engine.stats()
    assert stats["image_hits"] == stats["prefix_hits"] == 0 and len({reply[0] for reply in replies}) > COUNT // 2
    return replies


def test_alone_it_is_what_generate_gives(endless, alone):
    engine, compared = Engine.load(endless, device="cpu"), 0
    for seed in range(COUNT):
        request = random_request(seed)
        if "stop" in request or "compression" in request:
            continue
        options = {name: request[name] for name in ("temperature", "top_p", "seed") if name in request}
        (reply,) = engine.answer_batch([(request["messages"], request["images"])], request["max_new_tokens"], **options)
        text, *counts = told(reply)
        assert (text, *counts) == (alone[seed][0].strip(), *alone[seed][1:])
        compared += 1
    assert compared >= 10


def test_embeddings_are_those_of_the_model(tiny_checkpoint):
    engine = Engine.load(tiny_checkpoint, device="cpu")
    messages, images = ask("And these two?", 2), [picture(1), picture(2)]
    prompt = engine.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = engine.processor(text=[prompt], images=[images], return_tensors="pt")
    with torch.inference_mode():
        expected, expanded = engine.model.embed(**inputs)
        tokens = list(engine.model.encode_images(inputs["pixel_values"]).split())
        embeds, ids, is_image = splice(engine.model, inputs["input_ids"][0], tokens)
    assert is_image.sum() == sum(map(len, tokens)) > 2 and torch.equal(torch.from_numpy(is_image), expanded.is_image[0])
    assert torch.equal(embeds, expected[0]) and torch.equal(torch.from_numpy(ids), expanded.input_ids[0])


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_rows": 3, "quantum": 5},
        {"prefill_tokens": 7, "max_rows": 8},
        {"max_cached_tokens": 800, "quantum": 2, "prefill_tokens": 64},
        {"max_cached_tokens": 0},
    ],
    ids=str,
)
def test_neighbours_change_nothing(limits, endless, alone):
    engine, chance = Engine.load(endless, device="cpu", **limits), random.Random(1)
    for _ in range(2):  # the second time prefixes and pictures are kept
        delays = [chance.random() * 0.3 for _ in range(COUNT)]

        def call(seed: int, delay: float):
            time.sleep(delay)
            return told(answer(engine, **random_request(seed)))

        got = at_once(*(partial(call, seed, delay) for seed, delay in enumerate(delays)))
        assert got == alone
    stats = engine.stats()
    assert stats["stop"] + stats["length"] == 2 * COUNT and not stats["waiting"] and not stats["running"]
    assert stats["image_hits"] > 0 and stats["failed"] == 0
    assert (stats["prefix_hits"] > 0) == (limits.get("max_cached_tokens") != 0)
    assert (stats["parked"] > 0) == ("quantum" in limits)
    batch = engine.scheduler.batch
    assert not batch.rows and not batch.decoding and batch.cache.size == (0, 0)


def test_they_did_share_steps(endless):
    engine = Engine.load(endless, device="cpu")
    requests = [{"messages": ask(f"Question {number}"), "max_new_tokens": 60} for number in range(8)]
    at_once(*(lambda request=request: answer(engine, **request) for request in requests))
    stats = engine.stats()
    assert stats["decoded_tokens"] == 8 * 60 and stats["steps"] < 4 * 60


def test_a_nan_of_one_row_stays_there(endless):
    """Keys and values that broke lie in the memory that the next rows get."""
    engine = Engine.load(endless, device="cpu", max_cached_tokens=4000)
    request = {"messages": ask("What?", 1), "images": [picture(1)], "max_new_tokens": 30}
    expected = told(answer(engine, **request))
    other = {"messages": ask("why " * 50), "max_new_tokens": 20}
    broken = engine.scheduler.batch._forward
    bad = {"left": 3}

    def spoil(now, *rest, **inputs):
        if bad["left"] and len(now.slots) == 1 and now.queries > 40:
            bad["left"] -= 1
            inputs["inputs_embeds"] = torch.full_like(inputs["inputs_embeds"], float("nan"))
        return broken(now, *rest, **inputs)

    engine.scheduler.batch._forward = spoil
    calls = [lambda: answer(engine, **other), *[lambda: told(answer(engine, **request))] * 3]
    _, *got = at_once(*calls)
    assert got == [expected] * 3 and bad["left"] < 3


def test_eager_attention_too(endless, alone):
    engine = Engine.load(endless, device="cpu")
    engine.model.language_model.set_attn_implementation("eager")
    engine = Engine(engine.model, engine.processor)
    assert engine.scheduler.batch.eager
    seeds = [seed for seed in range(COUNT) if "seed" not in random_request(seed)]
    got = at_once(*(lambda seed=seed: told(answer(engine, **random_request(seed))) for seed in seeds))
    assert got == [alone[seed] for seed in seeds]


class Watching(TemperatureLogitsWarper):
    """Notes how many rows it is given together."""

    def __init__(self):
        super().__init__(1.0)
        self.rows: list[int] = []

    def __call__(self, input_ids, scores):
        self.rows.append(len(scores))
        return super().__call__(input_ids, scores)


def test_sampled_rows_are_chosen_together(endless):
    """And each as alone, by its own random numbers."""
    engine = Engine.load(endless, device="cpu")
    requests = [
        {"messages": ask(f"Question {n}"), "max_new_tokens": 30, "temperature": 1.3, "top_p": 0.9, "seed": n}
        for n in range(8)
    ]
    alone = [told(answer(engine, **request)) for request in requests]
    (made,) = engine.scheduler.preparer.made.values()
    made[0].append(watch := Watching())
    with slow(engine, 0.002):
        got = at_once(*(partial(lambda request: told(answer(engine, **request)), request) for request in requests))
    assert got == alone and len({text for text, *_ in got}) == 8
    assert sum(watch.rows) == 8 * 30 and max(watch.rows) > 4 and len(watch.rows) < 4 * 30


def test_penalties_look_at_each_rows_own_words(endless):
    """Which are of different lengths."""
    engine = Engine.load(endless, device="cpu")
    engine.model.generation_config.repetition_penalty = 1.4
    requests = [{"messages": ask(f"Question {n}"), "max_new_tokens": 10 + 5 * n} for n in range(6)]
    requests += [{**request, "temperature": 1.0, "seed": n} for n, request in enumerate(requests)]
    alone = [told(answer(engine, **request)) for request in requests]
    engine.model.generation_config.repetition_penalty = 1.0
    assert [told(answer(engine, **request)) for request in requests] != alone
    engine.model.generation_config.repetition_penalty = 1.4

    def call(number: int):
        time.sleep(0.01 * number)
        return told(answer(engine, **requests[number]))

    assert at_once(*(partial(call, number) for number in range(len(requests)))) == alone


def test_a_picture_that_fails_the_tower_fails_no_other(tiny_checkpoint):
    """Though they were to go through it together."""
    engine = Engine.load(tiny_checkpoint, device="cpu", image_bytes=0)
    requests = [{"messages": ask("What?", 1), "images": [picture(number)], "max_new_tokens": 6} for number in range(4)]
    alone = [answer(engine, **request).text for request in requests]
    bad, encode, groups = engine.prepared([picture(2)])[0].pixels, engine.model.encode_images, []

    def fail_with_the_bad_one(pixels):
        groups.append(len(pixels))
        if any(torch.equal(one, bad) for one in pixels):
            raise RuntimeError("of this picture")
        return encode(pixels)

    engine.model.encode_images = fail_with_the_bad_one
    with engine.lock:  # until all of them wait
        streams = [engine.stream(**request) for request in requests]
    for number, stream in enumerate(streams):
        if number == 2:
            with pytest.raises(WorkFailed, match="RuntimeError: of this picture"):
                list(stream)
        else:
            assert "".join(event.text for event in stream) == alone[number]
    assert groups[0] > 1 and 1 in groups
