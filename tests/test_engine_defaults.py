"""A checkpoint's generation_config.json: what of it counts in the engine, and what must not break an answer."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from PIL import Image

from llava_drip.conversation import user_turn
from llava_drip.engine import Engine, Reply

REQUESTS = [
    ([user_turn(text)], [Image.linear_gradient("L").convert("RGB")]) for text in ("What is it?", "Where?", "Who?")
]
TOKENS = 12


@pytest.fixture
def load(tiny_checkpoint, tmp_path):
    """Loads the small checkpoint with other defaults in its generation_config.json, and without an end mark."""

    def load(**defaults) -> Engine:
        directory = tmp_path / "assistant"
        shutil.copytree(tiny_checkpoint, directory, dirs_exist_ok=True)
        path = directory / "generation_config.json"
        kept = json.loads((tiny_checkpoint / path.name).read_text())
        path.write_text(json.dumps({**kept, "eos_token_id": None, **defaults}))
        return Engine.load(directory, device="cpu")

    return load


def streamed(engine: Engine, number: int) -> Reply:
    *events, last = engine.stream(*REQUESTS[number], max_new_tokens=TOKENS)
    return Reply("".join(event.text for event in events).strip(), last.usage)


def told(*replies: Reply) -> list[tuple]:
    return [(reply.text, reply.usage.finish, reply.usage.new_tokens) for reply in replies]


def answers(engine: Engine) -> list[tuple]:
    sampled = engine.answer_batch(REQUESTS, TOKENS, temperature=1.2, seed=0)
    return told(*engine.answer_batch(REQUESTS, TOKENS), *sampled, streamed(engine, 0))


@pytest.mark.parametrize(
    "defaults",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"constraints": []},
        {"force_words_ids": [[5]]},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"use_mtp": True},
        {"is_assistant": True},
        {"guidance_scale": 1.5},
        {"token_healing": True},
        {"prefill_chunk_size": 4},
        {"max_time": 1e-6},
        {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_attentions": True},
        {"do_sample": True, "temperature": 0.3, "top_p": 0.2, "top_k": 3},
        {"max_new_tokens": 3, "max_length": 5},
    ],
    ids=lambda defaults: next(iter(defaults)),
)
def test_defaults_that_have_no_place_here_change_nothing(load, defaults):
    expected = answers(load())
    assert all(finish == "length" and tokens == TOKENS for _, finish, tokens in expected)
    engine = load(**defaults)
    for name, value in defaults.items():
        assert getattr(engine.model.generation_config, name) == value, "not read"
    assert answers(engine) == expected
    assert all(getattr(engine.model.generation_config, name) == value for name, value in defaults.items())


def test_defaults_of_the_models_own_way_of_speaking_count(load):
    plain = answers(load())
    for defaults in ({"repetition_penalty": 5.0}, {"suppress_tokens": list(range(200))}):
        assert answers(load(**defaults)) != plain


@pytest.mark.parametrize("one", [True, False], ids=["a string", "a list"])
def test_a_stop_string_ends_its_row_as_stop(load, one):
    before = load().answer_batch(REQUESTS, TOKENS)
    row, word = next(  # in the middle of one answer, and not in all
        (row, found[0])
        for row, reply in enumerate(before)
        for found in re.finditer("[A-Za-z]{2,3}", reply.text[: len(reply.text) // 2])
        if any(found[0] not in other.text for other in before)
    )
    engine = load(stop_strings=word if one else [word, "never written"])
    after = engine.answer_batch(REQUESTS, TOKENS)
    assert after[row].usage.finish == "stop" and after[row].usage.new_tokens < TOKENS
    for number, (old, new) in enumerate(zip(before, after)):
        if word in old.text:
            assert new.usage.finish == "stop" and old.text.startswith(new.text) and word in new.text
            assert word not in new.text[: -len(word)] or len(new.text) < len(old.text)
        else:
            assert told(new) == told(old)
        assert told(streamed(engine, number)) == told(new)


def test_padding_is_no_stop_string(load):
    """A row that is through is padded while others go on; what pads it is nothing that it wrote."""
    engine = load()
    picture, context = REQUESTS[0][1], engine.model.config.text_config.max_position_embeddings
    length = lambda text: engine.answer_batch([([user_turn(text)], picture)], 1)[0].usage.prompt_tokens  # noqa: E731
    words = (context - length("word") - 5) // (length("word word") - length("word"))
    requests = [*REQUESTS, ([user_turn("word " * words)], picture)]  # the last has room for a few tokens only
    expected = told(*engine.answer_batch(requests, TOKENS))
    assert expected[-1][1] == "length" and expected[-1][2] < TOKENS == expected[0][2]
    assert told(*load(stop_strings=[engine.processor.tokenizer.pad_token]).answer_batch(requests, TOKENS)) == expected
