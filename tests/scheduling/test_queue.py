"""Waiting, leaving, limits, failures: what happens to one request is no matter of the others."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from scheduling_helpers import answer, ask, at_once, picture, told
from slow_engine import slow
from transformers import GenerationConfig

from llava_drip.engine import Engine, QueueFull, WorkFailed
from llava_drip.scheduling.batch import prompt_shares
from llava_drip.scheduling.fair_lock import FairLock
from llava_drip.scheduling.line import WaitingLine
from llava_drip.scheduling.prefixes import Sequence
from llava_drip.scheduling.row import Request, Row
from llava_drip.scheduling.ticket import ReplyStream


def until(true, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def load(checkpoint, **limits) -> Engine:
    return Engine.load(checkpoint, device="cpu", **limits)


def test_a_full_queue_refuses_and_says_when_to_come_again(tiny_checkpoint):
    engine = load(tiny_checkpoint, max_rows=1, max_waiting=2)
    with slow(engine):
        streams = [engine.stream(ask("Go on."), max_new_tokens=500) for _ in range(1)]
        next(streams[0])
        streams += [engine.stream(ask("Go on."), max_new_tokens=500) for _ in range(2)]
        assert engine.stats()["waiting"] == 2 and engine.stats()["running"] == 1
        with pytest.raises(QueueFull, match="2 requests wait") as refusal:
            engine.stream(ask("And I?"))
        assert 1 <= refusal.value.retry_after <= 60 and engine.stats()["refused"] == 1
        streams[2].close()  # one that waits leaves: there is room at once
        assert engine.stats()["waiting"] == 1
        streams.append(engine.stream(ask("And I?"), max_new_tokens=2))
        for stream in streams[:2]:
            stream.close()
        *_, last = streams[3]
    assert last.usage.finish == "length" and last.usage.waited_ms > 0
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        load(tiny_checkpoint, max_rows=0)


def test_without_a_queue_who_gets_a_place_at_once_is_taken(tiny_checkpoint):
    engine = load(tiny_checkpoint, max_rows=2, max_waiting=0)
    with slow(engine):
        streams = [engine.stream(ask("Go on."), max_new_tokens=500) for _ in range(2)]
        for _ in range(2):  # while they wait for their step, and when they run
            with pytest.raises(QueueFull):
                engine.stream(ask("And I?"))
            for stream in streams:
                next(stream)
        streams[0].close()
        until(lambda: engine.stats()["running"] == 1)
        assert answer(engine, messages=ask("And I?"), max_new_tokens=2).usage.new_tokens == 2
        streams[1].close()


def test_leaving_frees_the_place_within_a_step(tiny_checkpoint):
    engine = load(tiny_checkpoint)
    cancel = threading.Event()
    with slow(engine):
        kept = engine.stream(ask("Go on."), max_new_tokens=1000)
        left = engine.stream(ask("Go on."), max_new_tokens=1000)
        dropped = engine.stream(ask("Go on."), max_new_tokens=1000)
        told_to = engine.stream(ask("Go on."), max_new_tokens=1000, cancel=cancel)
        for stream in (kept, left, dropped, told_to):
            next(stream)
        assert engine.stats()["running"] == 4
        left.close()
        del dropped, stream
        cancel.set()
        until(lambda: engine.stats()["running"] == 1, seconds=1)
        *_, last = told_to
        assert last.usage.finish == "cancelled" and 0 < last.usage.new_tokens < 500
        assert list(left) == []
        assert next(kept).usage.finish is None
        kept.close()
        until(lambda: not engine.stats()["running"], seconds=1)
    assert engine.stats()["cancelled"] == 4 and not engine.lock.locked()


def test_time_limits_count_waiting_and_running(tiny_checkpoint):
    engine = load(tiny_checkpoint, max_rows=1)
    with slow(engine):
        started = time.perf_counter()
        running = engine.stream(ask("Go on."), max_new_tokens=1500, time_limit=0.6)
        next(running)
        waits = answer(engine, messages=ask("And I?"), time_limit=0.2)
        assert 0.2 <= time.perf_counter() - started < 0.6
        assert waits.usage.finish == "timeout" and waits.text == "" and waits.usage.new_tokens == 0
        *_, last = running
        assert last.usage.finish == "timeout" and last.usage.new_tokens > 5
        assert 0.6 <= time.perf_counter() - started < 1.6
    with pytest.raises(ValueError, match="time_limit"):
        engine.stream(ask("x"), time_limit=0)


def test_nobody_waits_for_other_work_once_it_has_left(tiny_checkpoint):
    """answer_batch, say, has the model for minutes."""
    engine = load(tiny_checkpoint)
    cancel = threading.Event()
    with slow(engine):
        stream = engine.stream(ask("Go on."), max_new_tokens=1000, cancel=cancel)
        next(stream)
        with engine.lock:
            cancel.set()
            started = time.perf_counter()
            *_, last = stream
            assert time.perf_counter() - started < 1 and last.usage.finish == "cancelled"
        until(lambda: not engine.stats()["running"], seconds=1)


def test_a_batch_takes_its_turn_between_steps(tiny_checkpoint):
    engine = load(tiny_checkpoint)
    alone = engine.answer_batch([(ask("What?", 1), [picture(1)])], 6)[0].text
    with slow(engine):
        stream = engine.stream(ask("Go on."), max_new_tokens=1000)
        next(stream)
        engine.model.generation_config.eos_token_id = engine.processor.tokenizer.eos_token_id
        assert engine.answer_batch([(ask("What?", 1), [picture(1)])], 6)[0].text == alone
        assert next(stream).usage.finish is None
        stream.close()


def test_short_ones_do_not_wait_for_long_ones(tiny_checkpoint):
    """All places are taken by endless replies, and a prompt of 1,500 tokens is being read."""
    engine = load(tiny_checkpoint, max_rows=3, quantum=8, prefill_tokens=32)
    with slow(engine, 0.002):
        long = [engine.stream(ask("Go on."), max_new_tokens=1500) for _ in range(3)]
        reads = engine.stream(ask("word " * 350), max_new_tokens=300)
        until(lambda: engine.stats()["parked"] > 0)
        for number in range(3):
            usage = answer(engine, messages=ask(f"Short {number}?"), max_new_tokens=4).usage
            assert usage.new_tokens == 4
        assert engine.stats()["length"] == 3 and engine.stats()["parked"] > 1  # none of the long ones is through
        for stream in (*long, reads):
            stream.close()


def test_short_ones_do_not_wait_for_a_long_prompt(tiny_checkpoint):
    """It is read for a while, gives up its place, and is read on from there."""
    engine = load(tiny_checkpoint, max_rows=1, quantum=8, prefill_tokens=32)
    long = {"messages": ask("word " * 350, 1), "images": [picture(1)], "max_new_tokens": 6}
    alone = told(answer(engine, **long))
    engine = load(tiny_checkpoint, max_rows=1, quantum=8, prefill_tokens=32)
    engine.model.generation_config.eos_token_id = None
    with slow(engine):
        stream = engine.stream(**long)
        until(lambda: engine.stats()["prefilled_tokens"])  # of 1,500; 128 are its quantum
        short = answer(engine, messages=ask("Short?"), max_new_tokens=2)
        assert short.usage.new_tokens == 2 and not stream._row.prefilled and engine.stats()["parked"]
        engine.model.generation_config.eos_token_id = engine.processor.tokenizer.eos_token_id
    *events, last = stream
    assert "".join(event.text for event in events) == alone[0] and last.usage.new_tokens == alone[2]
    assert last.usage.waited_ms > short.usage.total_ms  # what it waited in the middle


def test_waiting_for_room_is_waiting(tiny_checkpoint):
    """Its picture has been through the tower, but there are not keys and values enough for two."""
    engine = load(tiny_checkpoint, max_rows=2, quantum=40, max_cached_tokens=4000)
    with slow(engine):
        first = engine.stream(ask("Go on."), max_new_tokens=1500)
        next(first)
        second = engine.stream(ask("And I?", 1), [picture(1)], max_new_tokens=1500)
        usage = next(second).usage
        assert usage.waited_ms > 200 and usage.first_token_ms < usage.waited_ms
        for stream in (first, second):
            stream.close()


def test_pixels_are_let_go_once_they_are_encoded(tiny_checkpoint):
    engine = load(tiny_checkpoint)
    with slow(engine):
        stream = engine.stream(ask("Go on.", 2), [picture(1), picture(2)], max_new_tokens=500)
        next(stream)
        assert stream._row.request.pixels == []
        stream.close()


def test_what_a_parked_reply_held_back_is_told_when_its_time_is_up(tiny_tokenizer):
    """Words that might have become a stop string."""
    generation = GenerationConfig(max_new_tokens=50)
    until_then = time.perf_counter() + 0.1
    request = Request(
        torch.zeros(3, dtype=torch.int64), [], [], 0, None, generation, None, ("The circle is blue",), [], until_then
    )
    row = Row(request, tiny_tokenizer)
    row.started, row.budget, row.sequence = time.perf_counter(), 50, Sequence(np.zeros(3, np.int64))
    for token in tiny_tokenizer("The circle is")["input_ids"]:
        assert row.push(token) == ([], None)
    line = WaitingLine(1)
    line.park(row)
    *events, last = ReplyStream(row, line.leave)
    assert "".join(event.text for event in events) == "The circle is" and last.usage.finish == "timeout"


def test_neither_long_nor_short_prompts_are_held_up():
    assert prompt_shares([500, 10, 20], 100, oldest=0) == [70, 10, 20]
    assert prompt_shares([500, 60, 40, 30], 100, oldest=0) == [50, 0, 20, 30]  # one after the other
    assert prompt_shares([60, 60, 60], 100, oldest=1) == [50, 50, 0]
    assert prompt_shares([5, 5], 100, oldest=1) == [5, 5] and prompt_shares([9], 7, oldest=0) == [7]
    assert sum(prompt_shares([9, 9, 9], 7, oldest=2)) == 7 and prompt_shares([9, 9], 1, oldest=1) == [0, 1]


def test_a_bad_request_is_told_and_no_other(tiny_checkpoint):
    engine = load(tiny_checkpoint)
    request = {"messages": ask("What?", 1), "images": [picture(1)], "max_new_tokens": 12}
    alone = told(answer(engine, **request))
    good = [lambda: told(answer(engine, **request))] * 4
    pictures = {"messages": ask("word " * 385, 8), "images": [picture(1)] * 8}  # too long with their tokens
    *got, error = at_once(*good, lambda: answer(engine, **pictures))
    assert got == [alone] * 4
    assert isinstance(error, ValueError) and "too long" in str(error) and engine.stats()["failed"] == 1
    with pytest.raises(ValueError, match="too long: 10572 tokens"):  # without them: at the call
        engine.stream(ask("word " * 2100))
    with pytest.raises(ValueError, match="seed must be a whole number of 64 bits"):
        engine.stream(ask("What?"), seed=2**70)
    for bad in ({"compression": 0.5}, {"max_visual_tokens": 65}, {"compression": 2.0, "max_visual_tokens": 3}):
        with pytest.raises(ValueError, match="compression|max_visual_tokens"):
            engine.stream(ask("x"), **bad)
    assert answer(engine, **request, max_visual_tokens=5).usage.visual_tokens == 5
    assert engine.model.vision_tower.budget is None and told(answer(engine, **request)) == alone


def test_a_step_that_fails_ends_what_runs_and_not_the_service(tiny_checkpoint):
    engine = load(tiny_checkpoint)
    request = {"messages": ask("What?", 1), "images": [picture(1)], "max_new_tokens": 12}
    alone = told(answer(engine, **request))
    fail = {"now": True}

    def explode(*_):
        if fail["now"]:
            raise ValueError("out of memory, say")

    handle = engine.model.language_model.register_forward_pre_hook(explode)
    errors = at_once(*[lambda: answer(engine, **request)] * 3)
    assert [type(error) for error in errors] == [WorkFailed] * 3
    assert "ValueError: out of memory, say" in str(errors[0])
    fail["now"] = False
    assert told(answer(engine, **request)) == alone
    handle.remove()
    # and the tower's failure is that of the requests with pictures
    handle = engine.model.vision_tower.register_forward_pre_hook(explode)
    engine.model.encode_images, encode = explode, engine.model.encode_images
    fail["now"] = True
    new = {"messages": ask("What?", 1), "images": [picture(4)], "max_new_tokens": 12}
    text = {"messages": ask("What?"), "max_new_tokens": 3}
    got = at_once(lambda: answer(engine, **new), lambda: answer(engine, **text), lambda: answer(engine, **new))
    assert isinstance(got[0], Exception) and isinstance(got[2], Exception) and got[1].usage.new_tokens == 3
    engine.model.encode_images = encode
    handle.remove()
    assert answer(engine, **new).usage.finish and not engine.lock.locked()


def test_close_lets_them_finish_and_takes_no_more(tiny_checkpoint):
    engine = load(tiny_checkpoint, max_rows=1)
    with slow(engine):
        streams = [engine.stream(ask("Go on."), max_new_tokens=20) for _ in range(2)]
        engine.close()
        assert [list(stream)[-1].usage.new_tokens for stream in streams] == [20, 20]
        with pytest.raises(RuntimeError, match="closed"):
            engine.stream(ask("x"))
    assert not engine.scheduler.thread.is_alive()


def test_the_lock_is_handed_on_in_order():
    lock, order = FairLock(), []

    def take(number: int) -> None:
        with lock:
            order.append(number)

    with lock:
        threads = []
        for number in range(4):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            until(lambda count=number + 1: len(lock._waiters) == count)
        assert not lock.acquire(timeout=0.01) and not lock.acquire(blocking=False) and len(lock._waiters) == 4
        lock.give_way()  # comes back when they are through
        assert order == [0, 1, 2, 3] and lock.locked()
    assert not lock.locked() and lock.acquire(timeout=1)
    lock.release()


def test_a_row_that_breaks_ends_alone(tiny_checkpoint):
    """And is not kept: what comes after it with the same words is answered as ever. Sampled rows too."""
    engine = load(tiny_checkpoint)
    sampled = {"messages": ask("What?"), "temperature": 1.0, "seed": 1, "max_new_tokens": 12}
    greedy = {"messages": ask("Who? " * 20), "max_new_tokens": 12}
    expected = [told(answer(engine, **request)) for request in (sampled, greedy)]
    choose, spoiled = engine.scheduler._write, []

    def spoil(rows, logits):
        for number, row in enumerate(rows):
            if row.request.seed == 7:
                spoiled.append(row)
                logits[number, 0] = float("nan")
        return choose(rows, logits)

    engine.scheduler._write = spoil
    bad = {**sampled, "seed": 7}
    calls = [lambda: answer(engine, **bad), *(lambda r=r: told(answer(engine, **r)) for r in (sampled, greedy))]
    error, *got = at_once(*calls)
    assert isinstance(error, WorkFailed) and "not a number" in str(error) and got == expected and len(spoiled) == 1
    assert engine.stats()["failed"] == 1 and engine.stats()["running"] == 0


def test_a_temperature_near_nothing_is_greedy(tiny_checkpoint):
    engine = load(tiny_checkpoint)
    request = {"messages": ask("What?"), "max_new_tokens": 8}
    assert told(answer(engine, **request, temperature=1e-40)) == told(answer(engine, **request))


def test_no_caller_waits_for_a_thread_that_is_gone(tiny_checkpoint):
    """A failure while a failure is dealt with, as after an error that a GPU does not get over."""
    engine = load(tiny_checkpoint)
    expected = told(answer(engine, messages=ask("What?"), max_new_tokens=4))

    def fail(*_):
        raise RuntimeError("gone")

    handle = engine.model.language_model.register_forward_pre_hook(fail)
    shrink, engine.scheduler.prefixes.shrink = engine.scheduler.prefixes.shrink, fail
    streams = [engine.stream(ask("What?"), max_new_tokens=4) for _ in range(3)]
    assert all(isinstance(error, WorkFailed) for error in at_once(*(lambda s=s: list(s) for s in streams)))
    until(lambda: not engine.lock.locked())
    handle.remove()
    engine.scheduler.prefixes.shrink = shrink
    assert told(answer(engine, messages=ask("What?"), max_new_tokens=4)) == expected


def test_parking_is_bounded_and_so_is_what_is_kept(tiny_checkpoint):
    engine = load(tiny_checkpoint, max_rows=4, quantum=8, max_cached_tokens=4000)
    scheduler, most = engine.scheduler, []
    step = scheduler._step

    def watched():
        step()
        most.append(scheduler.prefixes.tokens + scheduler.line.parked_tokens)

    scheduler._step = watched
    with slow(engine, 0.0):
        calls = [(f"Go on {number}." + " word" * 60, 100) for number in range(5)]
        calls += [(f"Short {number}" + " word" * 50, 6) for number in range(20)]
        at_once(
            *(
                lambda text=text, count=count: answer(engine, messages=ask(text), max_new_tokens=count)
                for text, count in calls
            )
        )
    assert max(most) <= scheduler.prefixes.max_tokens
    stats = engine.stats()
    assert stats["length"] == 25 and 0 < stats["parked"] <= stats["decoded_tokens"] / 8


def test_a_program_that_ends_in_the_middle_of_an_answer(tiny_checkpoint):
    code = f"""
import sys
from llava_drip.engine import Engine
engine = Engine.load({str(tiny_checkpoint)!r}, device="cpu")
engine.model.generation_config.eos_token_id = None
stream = engine.stream([{{"role": "user", "content": [{{"type": "text", "text": "Go on."}}]}}], max_new_tokens=1500)
next(stream)
sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and "terminate called" not in done.stderr, done.stderr[-2000:]
