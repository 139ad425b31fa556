from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from llava_drip.conversation import user_turn
from llava_drip.engine import Engine, RequestError
from llava_drip.evaluation.likelihood import answer_likelihoods


@pytest.fixture(scope="module")
def engine(tiny_checkpoint) -> Engine:
    return Engine.load(tiny_checkpoint, "cpu")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64)) for _ in range(2)]


def requests(pictures):
    asked = [("What is it?\nA. one\nB. two", pictures[:1]), ("Which of these?\nA. a\nB. b\nC. c", [])]
    asked.append(("And this one, which is the longest of the three questions?", pictures[1:]))
    return [([user_turn(text, len(images))], images) for text, images in asked]


def test_they_are_the_models_own_of_the_whole_conversation(engine, pictures):
    """Against a plain pass over prompt and answer, one at a time."""
    answers = [["The answer is A.", "The answer is B."], ["A", "B", "C"], ["A", "B"]]
    found = answer_likelihoods(engine, requests(pictures), answers)
    tokenizer, model = engine.processor.tokenizer, engine.model
    for (messages, images), texts, one in zip(requests(pictures), answers, found):
        whole = []
        for text in texts:
            turns = [*messages, {"role": "assistant", "content": text}]
            written = tokenizer.apply_chat_template(turns, chat_template=engine.processor.chat_template, tokenize=False)
            letter = written.rindex(next(letter for letter in "ABC" if letter in text.removeprefix("The answer is ")))
            batch = engine.processor(text=written, images=[images])
            offsets = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            behind = len(offsets) - next(i for i, (a, b) in enumerate(offsets) if a <= letter < b)
            with torch.no_grad():
                logits = model(**batch).logits[0]
            token = batch["input_ids"][0, -behind]
            whole.append(float(logits[-behind - 1].log_softmax(-1)[token]))
        assert one.log_probabilities == pytest.approx(whole, abs=1e-4)
        assert len(set(one.log_probabilities)) == len(texts)
        assert (one.visual_tokens > 0) == bool(images)
    assert found[0].visual_tokens <= 64


def test_whole_answers_are_the_mean_over_their_tokens(engine, pictures):
    """Against the model's own loss of the conversation, one at a time, from the first token in which the answers differ."""
    answers = [["The answer is a cork.", "The answer is an old anvil."], ["one", "one two", "three"], ["yes", "no"]]
    found = answer_likelihoods(engine, requests(pictures), answers, whole=True)
    tokenizer, template = engine.processor.tokenizer, engine.processor.chat_template
    for (messages, images), texts, one in zip(requests(pictures), answers, found):
        written = [
            tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": text}], chat_template=template, tokenize=False
            )
            for text in texts
        ]
        batches = [engine.processor(text=text, images=[images]) for text in written]
        rows = [batch["input_ids"][0].tolist() for batch in batches]
        same = next(i for i, tokens in enumerate(zip(*rows)) if len(set(tokens)) > 1)
        for batch, value in zip(batches, one.log_probabilities):
            labels = batch["input_ids"].clone()
            labels[:, :same] = -100
            with torch.no_grad():
                loss = engine.model(**batch, labels=labels).loss
            assert value == pytest.approx(-float(loss), abs=1e-4)
        assert len(one.log_probabilities) == len(texts) and (one.visual_tokens > 0) == bool(images)


def test_batch_mates_do_not_matter(engine, pictures):
    answers = [["A", "B"], ["A", "B", "C"], ["A", "B"]]
    together = answer_likelihoods(engine, requests(pictures), answers)
    for request, texts, one in zip(requests(pictures), answers, together):
        (alone,) = answer_likelihoods(engine, [request], [texts])
        assert alone.log_probabilities == pytest.approx(one.log_probabilities, abs=1e-5)


def test_an_answer_to_choose_from_alone(engine):
    (one,) = answer_likelihoods(engine, [([user_turn("Which?", 0)], [])], [["A"]])
    assert len(one.log_probabilities) == 1


def test_requests_that_cannot_be_answered_are_named(engine, pictures):
    good = ([user_turn("Which?", 0)], [])
    with pytest.raises(RequestError, match="1 image parts, but 0") as error:
        answer_likelihoods(engine, [good, ([user_turn("Which?")], [])], [["A", "B"]] * 2)
    assert error.value.number == 1
    with pytest.raises(RequestError, match="context is 2048") as error:
        answer_likelihoods(engine, [good, ([user_turn("Which? " * 1000, 0)], [])], [["A", "B"]] * 2)
    assert error.value.number == 1
    with pytest.raises(RequestError, match="apart by one token"):
        answer_likelihoods(engine, [good], [["A", "B", "B"]])
