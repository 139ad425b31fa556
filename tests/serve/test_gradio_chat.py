"""What the chat page tells the engine of the conversation that it shows."""

from __future__ import annotations

import html
import importlib
import sys

import pytest


@pytest.fixture
def app(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository)
    return importlib.import_module("serve.gradio_app")


def said(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": html.escape(text)}]}


def uploaded(path: str) -> dict:
    return {"role": "user", "content": [{"type": "file", "file": {"path": path}}]}


def test_a_question_after_one_without_an_answer_is_a_line_of_its_own(app):
    """As after Stop before the first word."""
    chat = [said("user", "What is this?"), said("user", "And its <b>colour</b>?"), said("assistant", "Red.")]
    chat += [said("user", "Sure?")]
    assert app.from_chat(chat) == (
        [
            {"role": "user", "content": [{"type": "text", "text": "What is this?\nAnd its <b>colour</b>?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
            {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        ],
        [],
    )


def test_pictures_keep_their_places(app):
    chat = [uploaded("a.png"), said("user", "What?"), uploaded("b.png"), said("user", "And this?")]
    image = {"type": "image"}
    text = [{"type": "text", "text": "What?"}, {"type": "text", "text": "And this?"}]
    assert app.from_chat(chat) == ([{"role": "user", "content": [image, text[0], image, text[1]]}], ["a.png", "b.png"])


def test_help_says_that_the_checkpoints_budget_wins(app, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gradio_app", "--help"])
    with pytest.raises(SystemExit):
        app.main()
    assert "default: as the checkpoint says, else each image decides" in " ".join(capsys.readouterr().out.split())
