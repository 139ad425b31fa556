"""What a run under load comes to, from what clients got: speed, answers that are lost or another's, memory."""

from __future__ import annotations

import pytest

from llava_drip.draw.serving import Bar, draw_bars, draw_load
from llava_drip.serving_cost.clients import Got
from llava_drip.serving_cost.load_report import (
    Phase,
    busy,
    memory_summary,
    over_time,
    percentiles,
    phase_summary,
    ratios,
)
from llava_drip.serving_cost.server import Sample
from llava_drip.serving_cost.workload import make_asks
from llava_drip.world.scenes import scene_at
from llava_drip.world.texts import describe

ASKS = make_asks(40, (2, 1, 1), seed=3)
TRUE = {number: ", ".join(ask.truth) for number, ask in enumerate(ASKS) if ask.truth}


def got(number: int, text: str, at: float = 1.0, **fields) -> Got:
    return Got(number, True, sent=at - 0.5, first=at - 0.3, ended=at, text=text, finish="stop", tokens=4, **fields)


def test_asks_are_of_the_world_and_know_what_is_right():
    kinds = [ask.kind for ask in ASKS]
    assert set(kinds) == {"question", "description", "text"} and kinds.count("question") > kinds.count("text")
    pictures = [ask.messages[0]["content"][0]["image_url"]["url"] for ask in ASKS if ask.truth is not None]
    assert len(set(pictures)) == len(pictures)
    number = kinds.index("description")
    things = [describe(thing) for thing in scene_at(3, "test", number).objects]
    assert ASKS[number].is_right(", ".join(reversed(things))) and not ASKS[number].is_right(", ".join(things[1:]))
    assert ASKS[kinds.index("text")].is_right("anything") is None and make_asks(40, (2, 1, 1), seed=3) == ASKS
    assert {ask.kind for ask in make_asks(20, (0, 0, 1))} == {"text"}


def test_answers_of_others_lost_ones_and_errors_are_told_apart():
    numbers = list(TRUE)[:4]
    alone = {**{number: TRUE[number] for number in numbers}, numbers[3]: "wrong"}
    phase = Phase(
        "load",
        2,
        began=0.0,
        ended=2.0,
        got=[
            got(numbers[0], alone[numbers[0]]),
            got(numbers[1], alone[numbers[0]] + "?"),  # another's
            got(numbers[3], "wrong", at=2.5),  # as alone, and too late to count as speed
            Got(numbers[2], True, sent=0.1, ended=0.2, text="half"),  # its stream ended in the middle
            Got(numbers[2], False, sent=0.1, ended=0.2, refused=3, error="broken"),
        ],
        counts={"llava_drip_engine_steps": 7.0, "process_cpu_seconds_total": 0.6},
    )
    found = phase_summary(phase, ASKS, alone)
    assert (found["requests"], found["lost"], found["errors"], found["refused"]) == (3, 1, 1, 3)
    assert found["compared"] == 3 and found["same"] == 2 and found["different"][0]["number"] == numbers[1]
    assert sum(one["right"] for one in found["right"].values()) == 1
    assert sum(one["right_alone"] for one in found["right"].values()) == 2
    assert found["requests_per_second"] == 1.0 and found["tokens_per_second"] == 4.0 and found["counts"]["steps"] == 7
    assert found["first_ms"]["p50"] == pytest.approx(200) and found["error_examples"] == ["broken"]
    assert found["cpu_ms"] == 200
    before, after = ({**found, "requests_per_second": value, "tokens_per_second": 0.0} for value in (0.2, 0.3))
    assert ratios(before, found, after)["requests"] == {"mean": 4.0, "before": 5.0, "after": 3.333}
    assert ratios(before, found, after)["tokens"] == {"mean": None, "before": None, "after": None}
    assert ratios({**before, "cpu_ms": 800}, found, after)["requests by CPU seconds"]["before"] == 4.0
    assert percentiles([]) is None


def test_memory_that_grows_is_seen():
    samples = [Sample(float(at), (1000 + 0.5 * at) * 2**20, 0, 0) for at in range(100)]
    found = memory_summary(samples, 10.0, 90.0)
    assert found["mib_per_minute"] == pytest.approx(30, abs=0.1) and found["samples"] == 81
    assert (found["least_mib"], found["most_mib"], found["median_mib"]) == (1005, 1045, 1025)
    assert found["deviation"] == pytest.approx(20 / 1025, abs=1e-4)
    assert memory_summary(samples[:1], 0.0, 90.0) is None
    some = [Sample(float(at), 0.0, waiting=4 * (at > 2), running=2.0) for at in range(5)]
    assert busy(some, 1.0, 4.0) == {"running": 2.0, "waiting": 2.0} and busy(some, 8.0, 9.0) is None


def test_figures_are_drawn(tmp_path):
    phases = [
        Phase("before", 1, 0.0, 2.0, [got(0, "a", at=1.0)], {}),
        Phase("load", 8, 2.0, 6.0, [got(n, "b", at=2.1 + 0.2 * n) for n in range(10)], {}),
    ]
    series = over_time(phases, [Sample(float(at), 2**30, 0, 0) for at in range(6)], pieces=6)
    assert sum(series["tokens_per_second"]) * 1.0 == 44 and series["first_p50_ms"][1] is None
    draw_load(tmp_path / "load.png", series)
    draw_bars(
        tmp_path / "bars.png", [("ms", [Bar("a", 2, 1, 3), Bar("b", 4, 4, 4)]), ("tokens/s", [Bar("a", 1, 1, 1)])]
    )
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("load.png", "bars.png"))
    with pytest.raises(ValueError, match="must end in"):
        draw_load(tmp_path / "load.txt", series)
