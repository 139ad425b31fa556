"""Requests for the scheduler's tests, and how they are answered at once."""

from __future__ import annotations

import random
import threading

import numpy as np
from PIL import Image

from llava_drip.conversation import user_turn
from llava_drip.engine import Engine, Reply

TEXT = "what color is the small blue circle at the top left of a grey square, and why"


def picture(seed: int) -> Image.Image:
    """Blocks of colour, few or many: pictures that get different numbers of tokens."""
    cells = 2 + 5 * (seed % 3)
    small = np.random.default_rng(seed).integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((96, 80), Image.Resampling.NEAREST)


def ask(text: str, images: int = 0) -> list[dict]:
    return [user_turn(text, images)]


def random_request(seed: int) -> dict:
    """Arguments of Engine.stream: long and short, greedy and sampled, with and without pictures, at several budgets."""
    chance = random.Random(seed)
    images = chance.choice([0, 1, 1, 2])
    text = " ".join(chance.choices(TEXT.split(), k=chance.choice([1, 5, 20, 120])))
    options = {"messages": ask(text, images), "images": [picture(chance.randrange(5)) for _ in range(images)]}
    options["max_new_tokens"] = chance.choice([1, 3, 10, 40])
    if chance.random() < 0.5:
        options |= {"temperature": 1.3, "top_p": chance.choice([1.0, 0.9]), "seed": seed}
    if images and chance.random() < 0.5:
        options["compression"] = chance.choice([2.0, 8.0])
    if chance.random() < 0.2:
        options["stop"] = ["e", "the "]
    return options


def answer(engine: Engine, **request) -> Reply:
    *events, last = engine.stream(**request)
    assert last.text == "" and last.usage.finish and all(event.text and not event.usage.finish for event in events)
    return Reply("".join(event.text for event in events), last.usage)


def told(reply: Reply) -> tuple:
    usage = reply.usage
    return reply.text, usage.finish, usage.new_tokens, usage.prompt_tokens, usage.visual_tokens


def at_once(*calls) -> list:
    """Results of functions that run in threads of their own, at once; an exception is a result."""
    results = [None] * len(calls)

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results
