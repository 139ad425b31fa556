"""The chat page's other backend against the API in this process: the same answers, tokens and segments as the engine gives."""

from __future__ import annotations

import importlib
import threading

import numpy as np
import pytest
from PIL import Image

from llava_drip.engine import Engine


def test_the_api_answers_as_the_engine_does(tiny_checkpoint, repository, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(repository)
    check(Engine.load(tiny_checkpoint, device="cpu"), str(tmp_path / "picture.png"))


def check(engine: Engine, path: str) -> None:
    from api_server import on_loopback

    from serve.api import make_app
    from serve.service import Settings

    backends, remote = (importlib.import_module(f"serve.{name}") for name in ("backends", "api_backend"))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((120, 90), Image.Resampling.NEAREST)
    image.save(path)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    options = {"max_new_tokens": 12, "temperature": 0.0, "cancel": threading.Event()}
    local = backends.LocalBackend(engine, "small")
    with on_loopback(make_app(engine, Settings(model="small", loopback_only=True))) as url:
        api = remote.ApiBackend(url)
        assert (api.name, api.patches, api.fixed) == ("small", 64, "")
        for budget in None, 8.0:
            here, there = (list(b.stream(messages, [path], compression=budget, **options)) for b in (local, api))
            assert "".join(event.text for event in there) == "".join(event.text for event in here)
            assert there[-1].usage.visual_tokens == here[-1].usage.visual_tokens
            assert there[-1].usage.finish == here[-1].usage.finish and there[-1].usage.first_token_ms > 0
            seen, ours = api.see(image, budget), local.see(image, budget)
            assert (seen.count, seen.grid, seen.view.size) == (ours.count, ours.grid, ours.view.size)
            assert seen.owners.equal(ours.owners)
        with pytest.raises(ValueError, match="too long"):
            list(api.stream([{"role": "user", "content": [{"type": "text", "text": "word " * 3000}]}], [],
                            compression=None, **options))  # fmt: skip
    with pytest.raises(ValueError, match="cannot be reached"):
        remote.ApiBackend(url)
