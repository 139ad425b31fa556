"""What the chat page tells the engine of the conversation that it shows."""

from __future__ import annotations

import asyncio
import html
import importlib
import sys
from types import SimpleNamespace

import pytest
import timm
import torch

from llava_drip.assistant import build_assistant
from llava_drip.engine import Engine
from llava_drip.instruct.templates import VICUNA_V1
from llava_drip.towers.io import save_tower


@pytest.fixture
def serve(repository, monkeypatch):
    """serve("chat_turns"): that module of serve/."""
    monkeypatch.syspath_prepend(repository)
    return lambda name: importlib.import_module(f"serve.{name}")


@pytest.fixture
def turns(serve, tiny_checkpoint):
    """turns(**limits): the handlers of a page over an engine with these limits."""

    def make(**limits):
        backend = serve("backends").LocalBackend(Engine.load(tiny_checkpoint, device="cpu", **limits), "small")
        return serve("chat_turns").Turns(backend, serve("chat_examples").Examples())

    return make


VISITOR = SimpleNamespace(session_hash="a visitor")


def said(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": html.escape(text)}]}


def uploaded(path: str) -> dict:
    return {"role": "user", "content": [{"type": "file", "file": {"path": path}}]}


def test_a_question_after_one_without_an_answer_is_a_line_of_its_own(serve):
    """As after Stop before the first word."""
    chat = [said("user", "What is this?"), said("user", "And its <b>colour</b>?"), said("assistant", "Red.")]
    chat += [said("user", "Sure?")]
    assert serve("chat_turns").from_chat(chat) == (
        [
            {"role": "user", "content": [{"type": "text", "text": "What is this?\nAnd its <b>colour</b>?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
            {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        ],
        [],
    )


def test_pictures_keep_their_places(serve):
    chat = [uploaded("a.png"), said("user", "What?"), uploaded("b.png"), said("user", "And this?")]
    image = {"type": "image"}
    text = [{"type": "text", "text": "What?"}, {"type": "text", "text": "And this?"}]
    assert serve("chat_turns").from_chat(chat) == (
        [{"role": "user", "content": [image, text[0], image, text[1]]}],
        ["a.png", "b.png"],
    )


def test_help_says_that_the_checkpoints_budget_wins(serve, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gradio_app", "--help"])
    with pytest.raises(SystemExit):
        serve("gradio_app").main()
    assert "default: as the checkpoint says, else each image decides" in " ".join(capsys.readouterr().out.split())


def test_turns_of_closed_tabs_are_forgotten(serve, turns):
    turns, most = turns(), serve("chat_turns").MAX_TURNS
    answered = turns.turns["tab with an answer"] = serve("chat_turns").Turn(answering=True)

    async def many() -> None:
        for tab in range(2 * most):
            await turns.begin(SimpleNamespace(session_hash=f"tab {tab}"))  # and closed

    asyncio.run(many())
    assert len(turns.turns) == most
    assert turns.turns["tab with an answer"] is answered and f"tab {2 * most - 1}" in turns.turns


def test_a_full_queue_gives_the_question_back(turns):
    turns = turns(max_rows=1, max_waiting=0)
    asyncio.run(turns.begin(VISITOR))
    other = turns.backend.engine.stream([said("user", "Go on")], max_new_tokens=1000)  # has the one place
    next(other)
    chat = [said("user", "What is 1 < 2?")]
    with pytest.warns(UserWarning, match=r"Many people are asking .* in \d+ s"):
        *_, (left, _, _, box) = turns.reply(chat, True, 4, 16, 0, VISITOR)
    other.close()
    assert left == [] and box["value"] == {"text": "What is 1 < 2?", "files": []}
    assert not turns.turns["a visitor"].answering


def test_a_tower_without_a_budget_says_why_and_shows_no_slider(serve, turns, tiny_language_model, tmp_path):
    torch.manual_seed(0)
    tower = timm.create_model("tokenlearner_mini_patch8_64", num_classes=0)
    directory = save_tower(tower, tmp_path / "tower", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    engine = Engine(*build_assistant(str(tiny_language_model), str(directory), chat_template=VICUNA_V1))
    fixed = serve("backends").LocalBackend(engine, "fixed")
    free = turns().backend
    assert "no adjustable token budget" in fixed.fixed and not free.fixed

    def slider_and_texts(backend) -> tuple[bool, str]:
        blocks = serve("chat_page").make_page(backend).blocks.values()
        block = next(block for block in blocks if getattr(block, "elem_id", None) == "budget")
        around = [block]
        while around[-1].parent is not None:
            around.append(around[-1].parent)
        return all(block.visible for block in around), " ".join(str(getattr(block, "value", "")) for block in blocks)

    visible, texts = slider_and_texts(fixed)
    assert not visible and "no adjustable token budget" in texts
    visible, texts = slider_and_texts(free)
    assert visible and "No budget to choose" not in texts

    # and a budget that a browser sends all the same is not handed on
    turns = serve("chat_turns").Turns(fixed, serve("chat_examples").Examples())
    asyncio.run(turns.begin(VISITOR))
    last = list(turns.reply([said("user", "What?")], False, 4, 4, 0, VISITOR))[-1]
    assert last[0][-1]["role"] == "assistant"
