from __future__ import annotations

import pytest

from llava_drip.evaluation.judging import Prices, Unusable, comparisons, estimate, parse_scores


@pytest.mark.parametrize(
    "text", ["8 6.5", "8 6.5\nBecause.", "  8,6.5\n", "\n8, 6.5\nBecause.", "8   6.5 \r\nBecause."]
)
def test_two_scores_on_the_first_line(text):
    assert parse_scores(text, "reference_first") == (8, 6.5)
    assert parse_scores(text, "model_first") == (6.5, 8)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        " \n",
        "8",
        "8 7 6",
        "8/10 7/10",
        "Assistant 1: 8, Assistant 2: 7",
        "(8, 7)",
        "**8 7**",
        "8 and 7",
        "8.5.1 7",
    ]
    + ["0 7", "8 10.5", "8 11", "-1 -1", "8 nan", "inf 7", "8e0 7", "Sorry.\n8 7", "8\n7", "8 7 because", "٨ ٧"],
)
def test_anything_else_is_no_review(text):
    with pytest.raises(Unusable) as error:
        parse_scores(text, "reference_first")
    assert error.value.outcome == "malformed"


def test_what_the_judge_reads():
    """The layout of LLaVA's scripts, in both orders."""
    questions = [{"question_id": 3, "image": "a.jpg", "text": "What?", "category": "conv"}]
    answers, references = {3: {"text": "A cat.", "answer_id": "m"}}, {3: {"text": "One cat."}}
    rules = {"conv": {"key": "llava_bench_conv", "role": "Assistant", "prompt": "Rate."}}
    asked = comparisons(questions, answers, references, {"a.jpg": "A tabby."}, rules, both_orders=True)
    assert asked[0].text == (
        "[Context]\nA tabby.\n\n[Question]\nWhat?\n\n[Assistant 1]\nOne cat.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nA cat.\n\n[End of Assistant 2]\n\n[System]\nRate.\n\n"
    )
    assert "[Assistant 1]\nA cat." in asked[1].text and "[Assistant 2]\nOne cat." in asked[1].text
    assert [one.order for one in asked] == ["reference_first", "model_first"]
    assert (asked[0].answer_id, asked[0].reference_id, asked[0].rule) == ("m", 3, "llava_bench_conv")
    assert [message["role"] for message in asked[0].messages] == ["system", "user"]
    assert asked[:1] == comparisons(questions, answers, references, {"a.jpg": "A tabby."}, rules)

    characters = sum(len(message["content"]) for one in asked for message in one.messages)
    said = estimate(asked, 1000, Prices(10, 30))
    assert f"2 reviews to ask for: about {round(characters / 4)} tokens" in said and "at most 2,000 to write" in said
    assert f"${(characters / 4 * 10 + 2000 * 30) / 1e6:.2f}" in said and "$" not in estimate(asked, 1000, None)
