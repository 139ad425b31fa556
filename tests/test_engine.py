from __future__ import annotations

import json
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from slow_engine import slow

from llava_drip.engine import Engine
from llava_drip.images import load_image


def picture(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Blocks of colour, few or many: pictures that get different numbers of tokens."""
    cells = 2 + 5 * (seed % 3)
    small = np.random.default_rng(seed).integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.NEAREST)


def ask(text: str, images: int = 1) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint) -> Engine:
    return Engine.load(tiny_checkpoint, device="cpu")


def test_stream_gives_what_generate_gives(engine):
    image = picture(1)
    events = list(engine.stream(ask("What color is the circle?"), [image], max_new_tokens=24))
    prompt = engine.processor.apply_chat_template(
        ask("What color is the circle?"), add_generation_prompt=True, tokenize=False
    )
    inputs = engine.processor(text=[prompt], images=[[image]])
    ids = engine.model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "".join(event.text for event in events) == engine.processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert any(event.text for event in events)
    assert all(event.text and event.usage.finish is None for event in events[:-1]) and events[-1].text == ""

    usage = events[-1].usage
    assert usage.new_tokens == len(ids) <= 24
    assert usage.finish == ("length" if len(ids) == 24 else "stop")
    assert usage.visual_tokens == int(engine.model.encode_images(inputs["pixel_values"]).lengths[0])
    assert usage.patches == 64
    assert usage.prompt_tokens == inputs["input_ids"].shape[1] - 1 + usage.visual_tokens
    assert 0 < events[0].usage.first_token_ms == usage.first_token_ms < usage.total_ms


def test_prepared_pictures_serve_several_streams(engine):
    question, images = ask("And what do these two have in common?", 2), [picture(2), picture(3, (200, 60))]
    expected = [(event.text, event.usage.visual_tokens) for event in engine.stream(question, images)]
    prepared = engine.prepared(images)
    for _ in range(2):
        assert [(event.text, event.usage.visual_tokens) for event in engine.stream(question, prepared)] == expected


def test_batch_gives_what_stream_gives(engine):
    requests = [
        (ask("What color is the circle?"), [picture(0)]),
        (ask("Describe both."), [picture(1)]),
        (ask("And what do these two pictures have in common, if anything?", 2), [picture(2), picture(3, (200, 60))]),
        ([{"role": "user", "content": "No picture here."}], []),
    ]
    replies = engine.answer_batch(requests, max_new_tokens=12)
    for (messages, images), reply in zip(requests, replies):
        events = list(engine.stream(messages, images, max_new_tokens=12))
        assert reply.text == "".join(event.text for event in events).strip()
        for name in ("visual_tokens", "patches", "prompt_tokens", "new_tokens", "finish"):
            assert getattr(reply.usage, name) == getattr(events[-1].usage, name), name
    assert [reply.usage.patches for reply in replies] == [64, 64, 128, 0]
    assert replies[3].usage.visual_tokens == 0
    assert engine.answer_batch([]) == []


def test_beams_of_the_checkpoints_defaults_are_not_used(engine, monkeypatch):
    requests = [(ask("What is it?"), [picture(seed)]) for seed in range(2)]
    expected = [reply.text for reply in engine.answer_batch(requests, 6)]
    for name in ("num_beams", "num_return_sequences"):
        monkeypatch.setattr(engine.model.generation_config, name, 2)
    assert [reply.text for reply in engine.answer_batch(requests, 6)] == expected
    events = list(engine.stream(*requests[0], max_new_tokens=6))
    assert "".join(event.text for event in events).strip() == expected[0]


def test_the_picture_matters(engine):
    answers = {engine.answer_batch([(ask("What is it?"), [picture(seed)])], 12)[0].text for seed in range(4)}
    assert len(answers) > 1


def test_sampling_is_repeatable_with_a_seed_and_varies_without(engine):
    request = [(ask("What is it?"), [picture(1)])]
    sample = lambda seed: engine.answer_batch(request, 16, temperature=1.5, top_p=0.95, seed=seed)[0].text  # noqa: E731
    assert sample(0) == sample(0)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_special_tokens_in_a_users_text_are_only_text(engine):
    tokenizer = engine.processor.tokenizer
    special = {engine.processor.image_token, *tokenizer.all_special_tokens}
    assert {"<image>", "</s>"} <= special
    text = "a <image> b </s> c <im<image>age> " + " ".join(sorted(special))
    words = engine.processor(text=[engine.plain(text)], add_special_tokens=False)["input_ids"][0].tolist()
    assert not set(words) & set(tokenizer.convert_tokens_to_ids(sorted(special)))
    assert engine.plain("2 < 3, <images>, plain") == "2 < 3, <images>, plain"
    # in the user's, the assistant's and the system's turn alike
    messages = [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text},
        *ask(text),
    ]
    events = list(engine.stream(messages, [picture(0)], max_new_tokens=2))
    assert events[-1].usage.patches == 64


@pytest.mark.parametrize(
    ("messages", "images", "words"),
    [
        ([], 0, "messages: there are none"),
        (ask("x", 2), 1, "2 image parts, but 1 images"),
        (ask("x", 0), 1, "0 image parts, but 1 images"),
        ([{"role": "robot", "content": "x"}], 0, r"messages\[0\]: needs a role"),
        ([{"role": "user", "content": 3}], 0, r"messages\[0\]: content"),
        ([{"role": "user", "content": [{"type": "audio"}]}], 0, r"messages\[0\]\.content\[0\]"),
    ],
)
def test_bad_conversations_are_named(engine, messages, images, words):
    with pytest.raises(ValueError, match=words):
        engine.stream(messages, [picture(0)] * images)
    with pytest.raises(ValueError, match="request 1: .*" + words):
        engine.answer_batch([(ask("x"), [picture(0)]), (messages, [picture(0)] * images)])


@pytest.mark.parametrize(
    "bad", [{"max_new_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}]
)
def test_bad_sampling_is_named(engine, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        engine.stream(ask("x"), [picture(0)], **bad)


def test_context_is_never_exceeded(engine):
    long = ask("word " * 1000)
    context = engine.model.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=f"too long: .* context is {context}"):
        list(engine.stream(long, [picture(0)]))
    assert not engine.lock.locked()
    prompt = lambda text: engine.answer_batch([(ask(text), [picture(0)])], 1)[0].usage.prompt_tokens  # noqa: E731
    step = prompt("word word") - prompt("word")
    words = (context - prompt("word") - 10) // step
    usage = engine.answer_batch([(ask("word " * words), [picture(0)])], 200)[0].usage
    assert usage.finish == "stop" or usage.prompt_tokens + usage.new_tokens == context


def test_a_request_that_is_too_long_is_named_and_one_near_the_limit_changes_no_other(engine):
    prompt = lambda text: engine.answer_batch([(ask(text), [picture(0)])], 1)[0].usage.prompt_tokens  # noqa: E731
    context = engine.model.config.text_config.max_position_embeddings
    step = prompt("word word") - prompt("word")
    short = (ask("x"), [picture(1)])
    long = (ask("word " * ((context - prompt("word") - 5) // step)), [picture(0)])
    too_long = (ask("word " * context), [picture(0)])
    for place in range(3):
        requests = [short, short]
        requests.insert(place, too_long)
        with pytest.raises(ValueError, match=f"request {place}: the conversation is too long"):
            engine.answer_batch(requests)
    assert not engine.lock.locked()
    eos, engine.model.generation_config.eos_token_id = engine.model.generation_config.eos_token_id, None
    try:
        alone = [engine.answer_batch([request], 40)[0] for request in (short, long)]
        together = engine.answer_batch([short, long], 40)
    finally:
        engine.model.generation_config.eos_token_id = eos
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    for reply, single in zip(together, alone):
        assert reply.usage.finish == single.usage.finish == "length"
        assert reply.usage.new_tokens == single.usage.new_tokens
    assert together[0].usage.new_tokens == 40
    assert together[1].usage.prompt_tokens + together[1].usage.new_tokens == context


def endless(engine: Engine, **options):
    return engine.stream(ask("Go on."), [picture(1)], max_new_tokens=1500, temperature=2.0, seed=1, **options)


def test_cancel_ends_the_reply(engine):
    cancel = threading.Event()
    with slow(engine):
        events = []
        for event in endless(engine, cancel=cancel):
            events.append(event)
            if len(events) == 3:
                cancel.set()
    assert events[-1].usage.finish == "cancelled" and events[-1].usage.new_tokens < 100
    assert not engine.lock.locked()


def test_leaving_the_loop_frees_the_engine(engine):
    with slow(engine):
        stream = endless(engine)
        next(stream)
        assert engine.lock.locked()
        stream.close()
        assert engine.lock.acquire(timeout=2)
        engine.lock.release()
    assert engine.answer_batch([(ask("x"), [picture(0)])], 2)[0].usage.new_tokens >= 1


def test_cancelled_while_waiting_for_its_turn(engine):
    cancel, got = threading.Event(), []
    with engine.lock:
        waiting = threading.Thread(target=lambda: got.extend(endless(engine, cancel=cancel)))
        waiting.start()
        time.sleep(0.2)
        assert waiting.is_alive() and not got
        cancel.set()
        waiting.join(5)
    assert [event.usage.finish for event in got] == ["cancelled"]


def test_an_error_while_generating_reaches_the_caller(engine):
    def explode(*_):
        raise RuntimeError("out of memory, say")

    handle = engine.model.language_model.register_forward_pre_hook(explode)
    try:
        with pytest.raises(RuntimeError, match="out of memory, say"):
            list(engine.stream(ask("x"), [picture(0)]))
    finally:
        handle.remove()
    assert not engine.lock.locked()
    assert list(engine.stream(ask("x"), [picture(0)], max_new_tokens=2))[-1].usage.finish


def test_concurrent_chats_do_not_mix(engine):
    requests = [(ask(f"Question {i}?"), [picture(i)]) for i in range(4)]
    alone = ["".join(event.text for event in engine.stream(*request, max_new_tokens=16)) for request in requests]
    together = [""] * 4

    def chat(i: int) -> None:
        for event in engine.stream(*requests[i], max_new_tokens=16):
            together[i] += event.text

    threads = [threading.Thread(target=chat, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


def test_segments_and_view(engine):
    image = picture(1, (160, 80))
    count, segments, grid = engine.segments(image)
    assert grid == (8, 8) and segments.shape == (64,) and segments.unique().tolist() == list(range(count))
    usage = engine.answer_batch([(ask("x"), [image])], 1)[0].usage
    assert usage.visual_tokens == count
    view = engine.view(image)
    assert view.size == (80, 80)
    assert np.array_equal(np.asarray(view), np.asarray(image)[:, 40:120])
    assert engine.segments(view)[0] == count  # the tower sees nothing else
    # a tall one too
    assert engine.view(picture(1, (30, 90))).size == (30, 30)


def test_compression_at_load(tiny_checkpoint):
    engine = Engine.load(tiny_checkpoint, device="cpu", compression=8.0)
    assert engine.answer_batch([(ask("x"), [picture(1)])], 1)[0].usage.visual_tokens == 8
    with pytest.raises(ValueError, match="compression"):
        Engine.load(tiny_checkpoint, device="cpu", compression=0.5)


def test_dtype_and_device(tiny_checkpoint):
    engine = Engine.load(tiny_checkpoint, device="cpu", dtype="bfloat16")
    assert next(engine.model.language_model.parameters()).dtype == torch.bfloat16
    assert engine.answer_batch([(ask("x"), [picture(1)])], 2)[0].usage.new_tokens >= 1
    for bad in ({"dtype": "int8"}, {"dtype": "bf17"}, {"device": "quantum"}):
        with pytest.raises(ValueError, match=next(iter(bad.values()))):
            Engine.load(tiny_checkpoint, **{"device": "cpu", **bad})


def edit_config(directory, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def drop_a_weight(directory) -> None:
    from safetensors.torch import load_file, save_file

    path = next(directory.glob("*.safetensors"))
    weights = load_file(path)
    weights.pop("multi_modal_projector.0.weight")
    save_file(weights, path, metadata={"format": "pt"})


def to_pickle(directory) -> None:
    from safetensors.torch import load_file

    path = next(directory.glob("*.safetensors"))
    torch.save(load_file(path), directory / "pytorch_model.bin")
    path.unlink()


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: shutil.rmtree(d), "no such folder"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda d: edit_config(d, model_type="llama"), "model_type is 'llama'"),
        (to_pickle, r"no \*\.safetensors weights"),
        (lambda d: truncate(next(d.glob("*.safetensors"))), "/model.safetensors: cannot be loaded"),
        (lambda d: truncate(d / "tokenizer.json"), "/tokenizer.json: cannot be loaded"),
        (lambda d: (d / "generation_config.json").write_text("{"), "/generation_config.json: not valid JSON"),
        (drop_a_weight, "1 weights are missing or misshapen, first multi_modal_projector.0.weight"),
        (lambda d: (d / "tokenizer.json").unlink(), "cannot be loaded"),
    ],
)
def test_a_bad_checkpoint_is_named(tiny_checkpoint, tmp_path, spoil, words):
    directory = tmp_path / "spoilt"
    shutil.copytree(tiny_checkpoint, directory)
    spoil(directory)
    with pytest.raises(ValueError, match=f"spoilt.*{words}"):
        Engine.load(directory, device="cpu")


def test_load_image_feeds_the_engine(engine, tmp_path):
    picture(0).save(tmp_path / "a.png")
    assert engine.segments(load_image(tmp_path / "a.png"))[0] == engine.segments(picture(0))[0]
