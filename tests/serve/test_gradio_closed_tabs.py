"""What the chat page's server remembers of tabs that were closed. No browser is needed."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from types import SimpleNamespace

from llava_drip.engine import Engine


def test_turns_of_closed_tabs_are_forgotten(tiny_checkpoint, repository, monkeypatch):
    monkeypatch.syspath_prepend(repository)
    app = importlib.import_module("serve.gradio_app")
    page = app.make_page(Engine.load(tiny_checkpoint, device="cpu"), "small")
    begin = next(function.fn for function in page.fns.values() if function.fn.__name__ == "begin")
    known = inspect.getclosurevars(begin).nonlocals
    waiting = known["turns"]["tab that waits"] = app.Turn()
    known["line"].append(waiting)

    async def many() -> None:
        for tab in range(2 * app.MAX_TURNS):
            await begin(SimpleNamespace(session_hash=f"tab {tab}"))  # and closed

    asyncio.run(many())
    assert len(known["turns"]) == app.MAX_TURNS
    assert known["turns"]["tab that waits"] is waiting and f"tab {2 * app.MAX_TURNS - 1}" in known["turns"]
