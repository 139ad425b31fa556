"""Requests that were never meant well, against the API's process: no 500, no crash, no memory kept."""

from __future__ import annotations

import itertools
import json

import httpx
import hypothesis
import psutil
import schemathesis
from api_server import MODEL, chat, data_url, picture
from test_api_images import BAD_PICTURES
from test_api_remote import NOT_PUBLIC

from serve.api import make_app
from serve.service import Settings

NAMES = ["temperature", "top_p", "n", "max_tokens", "stop", "seed", "stream", "messages", "model", "compression"]
NAMES += ["max_visual_tokens", "stream_options", "tools", "logprobs", "\u0000", "__proto__", "a" * 5000]
VALUES = [None, True, -1, 10**30, 1e308, "", "\u202e<image></s>", [], [[]], {}, {"a": {"a": {}}}, ["x"] * 2000]


def hostile() -> list[bytes]:
    """Some 280 bodies for /v1/chat/completions."""
    fields = [{name: value} for name, value in itertools.product(NAMES, VALUES)]
    bodies = [json.dumps(chat(**field)).encode() for field in fields]
    bodies += [json.dumps(chat("x", url)).encode() for url in BAD_PICTURES.values()]
    bodies += [json.dumps(chat("x", f"http://{host}/a.png")).encode() for host in NOT_PUBLIC]
    bodies += [json.dumps(chat("<image>" * 500)).encode(), json.dumps(chat("x", *[data_url(picture(0))] * 20)).encode()]
    bodies += [b"{" * 100_000, b'{"model": NaN}', b"\x00" * 100, b'"' + b"\\u0000" * 10_000 + b'"', b"1e999999"]
    return bodies


def test_hostile_requests(api, client, capsys):
    """Twice, for what the first round leaves in caches is no growth."""
    server = psutil.Process(api.pid)

    def send() -> set[int]:
        statuses = set()
        with httpx.Client(base_url=api.url, trust_env=False, timeout=60) as http:
            for body in hostile():
                answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
                statuses.add(answer.status_code)
                assert answer.status_code < 500, body[:300]
                if answer.status_code != 200:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return statuses

    assert send() == {200, 400, 404}
    before = server.memory_info().rss
    send()
    grown = server.memory_info().rss - before
    with capsys.disabled():
        print(f"\n{len(hostile())} hostile requests; memory grew by {grown / 2**20:.1f} MiB")
    assert grown < 50 * 2**20
    assert client.chat.completions.create(**chat()).choices[0].message.content


def test_what_the_schema_allows_is_answered_as_it_says(engine):
    """Fuzzed by schemathesis over the OpenAPI description: no 500."""
    app = make_app(engine, Settings(MODEL, time_limit=0.3, max_new_tokens=4))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    checks = [schemathesis.checks.not_a_server_error]
    settings = hypothesis.settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings
        @hypothesis.given(case=operation.as_strategy())
        def fuzz(case) -> None:
            if isinstance(case.body, dict) and case.body.get("model"):
                case.body["model"] = MODEL  # else all would end there
            response = case.call()
            seen.add((case.operation.path, response.status_code))
            case.validate_response(response, checks=checks)

        fuzz()
    assert {path for path, _ in seen} == set(app.openapi()["paths"])
    assert {("/v1/chat/completions", status) for status in (200, 400)} <= seen
