"""What the plugin of lmms-eval makes of its arguments, a task's settings and a task's messages. Without lmms-eval."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

from llava_drip.evaluation.lmms.asked import MOST_ROUNDS, Asked, in_batches, read_messages
from llava_drip.evaluation.lmms.settings import MAX_NEW_TOKENS, Generation, Settings, seed_of, unused


def test_model_args(tmp_path):
    given = {
        "pretrained": 7,
        "compression": 2.5,
        "seed": 3,
        "record": f"{tmp_path}/r.json",
        "batch_size": "4",
        "device": None,
    }
    settings = Settings.read(given | {"device": "cpu"})
    assert (settings.pretrained, settings.compression, settings.batch_size, settings.device) == ("7", 2.5, 4, "cpu")
    assert settings.record == tmp_path / "r.json" and settings.seed == 3
    assert Settings.read({"pretrained": "x", "device": None}) == Settings("x")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"pretrained": "x", "max_token": 3, "compress": 2},
            "compress, max_token: not known; there are pretrained, compression",
        ),
        ({"compression": 2}, "pretrained=DIR is missing"),
        ({"pretrained": "x", "batch_size": "auto"}, "--batch_size auto: give a number"),
        ({"pretrained": "x", "batch_size": "0"}, "--batch_size 0: give a number"),
        ({"pretrained": "x", "max_batch_size": 64}, "the largest that fits is not looked for"),
        ({"pretrained": "x", "seed": "one"}, "seed=one: give a whole number"),
        ({"pretrained": "x", "record": "no/such/folder/r.json"}, "record=no/such/folder/r.json: give a file"),
    ],
)
def test_model_args_that_are_refused(given, words):
    with pytest.raises(ValueError) as error:
        Settings.read(given)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Generation()),
        ({"max_new_tokens": 16, "temperature": 0.0, "top_p": 0, "num_beams": 1, "do_sample": False}, Generation(16)),
        (
            {"temperature": 0.7, "do_sample": False, "top_p": 0.9},
            Generation(),
        ),  # transformers' generate would not sample
        ({"temperature": 0.7, "top_p": 0.9}, Generation(MAX_NEW_TOKENS, 0.7, 0.9)),
        ({"do_sample": True}, Generation(MAX_NEW_TOKENS, 1.0)),
        ({"do_sample": True, "temperature": 0}, Generation()),
        ({"until": ["\n\n"], "temperature": None}, Generation()),  # filled in by lmms-eval
        ({"until": ["Q:", "", "\n\n"]}, Generation(until=("Q:", "\n\n"))),
        ({"until": "ASSISTANT:"}, Generation(until=("ASSISTANT:",))),
    ],
)
def test_generation_kwargs(given, expected):
    assert Generation.read(given) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_beams": 3}, "num_beams=3: there is no beam search"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": "hot"}, "could not convert"),
        ({"temperature": 1, "top_p": 0}, "top_p must be above 0"),
    ],
)
def test_generation_kwargs_that_are_refused(given, words):
    with pytest.raises(ValueError, match=f"generation_kwargs: .*{words}"):
        Generation.read(given)


def test_an_answer_ends_before_the_first_mark():
    generation = Generation(until=("Q:", "\n"))
    assert generation.ended("yes\nQ: no") == "yes" and generation.ended("yes Q: no\n") == "yes "
    assert generation.ended("yes") == "yes" and Generation().ended("a\n\nb") == "a\n\nb"
    assert unused({"top_k": 1, "until": None, "seed": None, "temperature": 0}) == {"top_k"}


def turn(doc: int, generation: Generation, messages=None) -> Asked:
    return Asked("task", "test", doc, 0, messages, generation)


def test_sampled_requests_stand_alone_and_others_with_their_like():
    greedy, longer, sampled = Generation(8), Generation(9), Generation(8, 0.5)
    asked = [turn(i, (greedy, longer, sampled)[i % 3]) for i in range(12)]
    batches = [[one.doc for one in batch] for batch in in_batches(asked, 3)]
    assert batches == [[0, 3, 6], [9], [1, 4, 7], [10], [2], [5], [8], [11]]
    seeds = {seed_of(0, "task", "test", doc, attempt, 0) for doc in range(20) for attempt in range(5)}
    assert len(seeds) == 100 and all(0 <= seed < 2**31 for seed in seeds)


def test_a_task_that_never_ends_is_named():
    """As lmms-eval has it for one whose rounds are texts alone."""
    endless = turn(3, Generation(), lambda document, **more: ([], False, [], None))
    endless.replies = [SimpleNamespace(text="x")] * MOST_ROUNDS
    with pytest.raises(ValueError, match=f"task, test 3: the task does not end after {MOST_ROUNDS} rounds"):
        endless.next_messages({})


def test_messages_and_their_pictures(tmp_path):
    see_through = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    content = [
        {"type": "image", "url": see_through},
        {"type": "text", "text": "Which?"},
        {"type": "image", "url": f"{tmp_path}/grey.png"},
    ]
    messages, images = read_messages([{"role": "user", "content": content}], "here")
    kinds = [{"type": "image"}, {"type": "text", "text": "Which?"}, {"type": "image"}]
    assert messages == [{"role": "user", "content": kinds}]
    assert [image.mode for image in images] == ["RGB", "RGB"]
    assert images[0].getpixel((0, 0)) == (255, 255, 255) and images[1].getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "video", "url": "film.mp4"}, "a part of type 'video': the assistant takes text and pictures alone"),
        ({"type": "image", "url": {"bytes": b""}}, "a part of type 'image'"),
        ({"type": "image", "url": "no/such.png"}, "picture 1: no/such.png: no such image file"),
        ({"type": "image", "url": Image.new("RGB", (1000, 1))}, "picture 1: 1000 x 1 is too thin a strip"),
    ],
)
def test_messages_that_are_refused(part, words):
    with pytest.raises(ValueError) as error:
        read_messages([{"role": "user", "content": [part]}], "task, test 5")
    assert str(error.value).startswith("task, test 5") and words in str(error.value)
