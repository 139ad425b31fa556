"""What is kept for the next turn of a conversation, and for the next time that a picture comes."""

from __future__ import annotations

import numpy as np
import torch
from scheduling_helpers import answer, ask, picture, told

from llava_drip.engine import Engine
from llava_drip.scheduling.features import FeatureCache, digest
from llava_drip.scheduling.prefixes import BLOCK, PrefixCache, Sequence


def sequence(*ids: int, pictures=()) -> Sequence:
    return Sequence(np.array(ids, dtype=np.int64), tuple(pictures))


def numbered(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


def test_the_longest_common_beginning_is_found():
    cache, ids = PrefixCache(1000), numbered(50)
    cache.add(sequence(*ids[:30], *numbered(30, 500)), "thirty")
    cache.add(sequence(*ids[:20], *numbered(30, 600)), "twenty")
    assert cache.find(sequence(*ids)) == ("thirty", 30)
    assert cache.find(sequence(*ids[:30])) == ("thirty", 29)  # the last token has to be read
    assert cache.find(sequence(*ids[: BLOCK - 1], *numbered(9, 800))) == (None, 0)
    assert (cache.hits, cache.misses) == (2, 1)


def test_a_picture_counts_only_where_it_is_the_same():
    cache, ids = PrefixCache(1000), [7] * 60  # as placeholders: all alike
    cache.add(sequence(*ids, pictures=[(20, 16, ("a", 4.0))]), "a")
    for other in (("b", 4.0), ("a", 2.0)):
        assert cache.find(sequence(*ids, pictures=[(20, 16, other)])) == ("a", 20)
    assert cache.find(sequence(*ids, pictures=[(20, 15, ("a", 4.0))])) == ("a", 20)
    assert cache.find(sequence(*ids, pictures=[(20, 16, ("a", 4.0))])) == ("a", 59)
    assert cache.find(sequence(*ids, pictures=[(20, 16, ("a", 4.0)), (40, 16, ("c", 4.0))])) == ("a", 40)
    assert cache.find(sequence(*ids)) == ("a", 20)  # a text of placeholders is no picture


def test_it_is_bounded_and_forgets_what_was_used_least_recently():
    cache = PrefixCache(100)
    for number in range(3):
        cache.add(sequence(*numbered(40, 100 * number)), number)
        cache.find(sequence(*numbered(40)))  # the first is in use
    assert cache.tokens == 80 and [entry.kept for entry in cache.entries.values()] == [2, 0]
    cache.add(sequence(*numbered(101, 5000)), "too long")
    assert cache.tokens == 80
    cache.add(sequence(*numbered(60)), "next turn")  # the turn before goes
    assert [entry.kept for entry in cache.entries.values()] == [2, "next turn"]
    cache.shrink(0)
    assert not cache.tokens and not cache.entries and not cache.having


def test_the_next_turn_reads_only_what_is_new(tiny_checkpoint):
    first = ask("What is it? Describe the small blue square at the top left of the grey background.", 1)
    engine, fresh = (Engine.load(tiny_checkpoint, device="cpu", max_cached_tokens=size) for size in (4000, 0))
    reply = answer(engine, messages=first, images=[picture(1)], max_new_tokens=20)
    assert reply.usage.cached_tokens == 0
    turns = [*first, {"role": "assistant", "content": reply.text}, *ask("And why?")]
    request = {"messages": turns, "images": [picture(1)], "max_new_tokens": 20}
    before = engine.stats()["prefilled_tokens"]
    again = answer(engine, **request)
    assert told(again) == told(answer(fresh, **request))
    read = engine.stats()["prefilled_tokens"] - before
    assert read == again.usage.prompt_tokens - again.usage.cached_tokens
    assert again.usage.cached_tokens >= reply.usage.prompt_tokens > 30 and read < 60
    assert engine.stats()["image_hits"] == 1
    # another picture, or another budget, is read from its place on
    for change in ({"images": [picture(2)]}, {"compression": 2.0}):
        other = answer(engine, **request | change)
        assert told(other) == told(answer(fresh, **request | change))
        assert 0 < other.usage.cached_tokens < reply.usage.prompt_tokens - reply.usage.visual_tokens


def test_pictures_are_kept_by_content_and_budget_up_to_a_size(tiny_checkpoint):
    model = Engine.load(tiny_checkpoint, device="cpu").model
    chance = torch.Generator().manual_seed(0)
    pixels = [torch.randn(3, 64, 64, generator=chance) for _ in range(3)]
    size = 64 * 4  # bytes of a token
    with torch.inference_mode():
        cache = FeatureCache(model, max_bytes=40 * size)
        wanted = lambda *numbers, at=None: [(digest(pixels[i]), pixels[i].clone(), at) for i in numbers]  # noqa: E731
        (key, first), (same, second) = cache.tokens(wanted(0, 0, at=4.0))
        assert key == same and first is second and len(first) == 16 and (cache.hits, cache.misses) == (0, 2)
        assert torch.equal(cache.tokens(wanted(0, at=4.0))[0][1], first) and cache.hits == 1
        assert [len(values) for _, values in cache.tokens(wanted(0, 1, at=8.0))] == [8, 8]
        assert cache.bytes == 32 * size and model.vision_tower.budget is None
        cache.tokens(wanted(2, at=4.0))  # 16 more are too many
        assert cache.bytes == 32 * size and key not in cache.kept
        model.vision_tower.set_compression(8.0)
        try:
            hits = cache.hits
            cache.tokens(wanted(1))
            assert cache.hits == hits + 1  # the model's own budget is the same one
        finally:
            model.vision_tower.set_compression(None)
