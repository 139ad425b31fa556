"""What a judge is asked about two answers, and what counts as its review: LLaVA's protocol, read strictly.

The judge reads the image's context, the question and both answers, with the benchmark's own prompt for the category
(`rule.json`), and writes two scores from 1 to 10 on its first line. As in LLaVA's `eval_gpt_review_bench.py` and
`eval_gpt_review_visual.py`: the layout, the system message, temperature 0.2, at most 1,024 tokens, the reference as Assistant 1.

Two things are not as there. A review counts only if it can be read without doubt; LLaVA writes [-1, -1], which its summary then
averages. And the context of In-the-Wild is given as it is; LLaVA's script puts each letter of it on a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Order = Literal["reference_first", "model_first"]
ORDERS: tuple[Order, ...] = ("reference_first", "model_first")
# Part of the protocol, as the prompts are, but not among the benchmark's files.
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
SCALE = (1.0, 10.0)
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_FIRST_LINE = re.compile(rf"{_NUMBER}(?:\s*,\s*|\s+){_NUMBER}")
CHARACTERS_A_TOKEN = 4  # of English text, about; nothing but the estimate depends on it


class Unusable(Exception):
    """A reply that is no review. `outcome`: "malformed" or "cut off"."""

    def __init__(self, outcome: str, reason: str):
        super().__init__(reason)
        self.outcome = outcome


@dataclass(frozen=True)
class Comparison:
    """One thing to ask: an answer beside the reference's, in one order.

    Attributes:
        question_id, answer_id, reference_id: of the benchmark's and the answers' rows.
        rule: the prompt's name in rule.json, "conv" or "llava_bench_conv".
        order: who is Assistant 1.
        text: the user's message.
    """

    question_id: int | str
    answer_id: int | str
    reference_id: int | str
    rule: str
    order: Order
    text: str

    @property
    def messages(self) -> list[dict]:
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.text}]

    @property
    def name(self) -> str:
        return f"question_id {self.question_id!r}, {self.order.replace('_', ' ')}"


def comparisons(
    questions: list[dict],
    answers: dict,
    references: dict,
    contexts: dict[str, str],
    rules: dict[str, dict],
    both_orders: bool = False,
) -> list[Comparison]:
    """What to ask, question by question; with both orders two of each. The arguments are what evaluation.llava_bench reads.

    ValueError: a text has letters that cannot be sent.
    """
    found = []
    for question in questions:
        key = question["question_id"]
        rule, answer, reference = rules[question["category"]], answers[key], references[key]
        for order in ORDERS[: 1 + both_orders]:
            texts = [reference["text"], answer["text"]]
            first, second = texts if order == "reference_first" else texts[::-1]
            role = rule["role"]
            text = (
                f"[Context]\n{contexts[question['image']]}\n\n[Question]\n{question['text']}\n\n"
                f"[{role} 1]\n{first}\n\n[End of {role} 1]\n\n[{role} 2]\n{second}\n\n[End of {role} 2]\n\n"
                f"[System]\n{rule['prompt']}\n\n"
            )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                what = f"{text[error.start]!r}, half of a letter, in its answer or reference"
                raise ValueError(f"question_id {key!r} cannot be sent to a judge: {what}") from error
            ids = (answer.get("answer_id", key), reference.get("answer_id", key))
            found.append(Comparison(key, *ids, rule["key"], order, text))
    return found


def parse_scores(text: str | None, order: Order) -> tuple[float, float]:
    """(reference's, model's) score of a review: two numbers from 1 to 10 alone on its first line, a space or a comma between.

    Raises:
        Unusable: anything else. Words, "8/10" and a third number are not guessed at.
    """
    if not text or not text.strip():
        raise Unusable("malformed", "the review is empty")
    line = text.strip().split("\n")[0].strip()
    found = _FIRST_LINE.fullmatch(line)
    if not found:
        raise Unusable("malformed", f"its first line is not two scores: {line[:80]!r}")
    scores = float(found[1]), float(found[2])
    if not all(in_scale(score) for score in scores):
        raise Unusable("malformed", f"a score is outside {SCALE[0]:g} to {SCALE[1]:g}: {line[:80]!r}")
    return scores if order == "reference_first" else scores[::-1]


def in_scale(score: float) -> bool:
    return SCALE[0] <= score <= SCALE[1]


@dataclass(frozen=True)
class Prices:
    """US dollars a million tokens, read and written."""

    read: float
    written: float

    def of(self, read: int, written: int) -> float:
        return (read * self.read + written * self.written) / 1e6


def estimate(asked: Iterable[Comparison], max_tokens: int, prices: Prices | None) -> str:
    """What asking costs, in a sentence: tokens read are guessed from the characters, tokens written are the most there can be."""
    asked = list(asked)
    characters = sum(len(message["content"]) for comparison in asked for message in comparison.messages)
    read, most = round(characters / CHARACTERS_A_TOKEN), max_tokens * len(asked)
    cost = "" if prices is None else f", at most about ${prices.of(read, most):.2f}"
    return (
        f"{len(asked):,} reviews to ask for: about {read:,} tokens to read ({CHARACTERS_A_TOKEN} characters each) and at most "
        f"{most:,} to write{cost}; each repetition costs as much again"
    )
