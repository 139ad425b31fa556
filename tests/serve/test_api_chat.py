"""The official openai client against the API's process: chat with and without pictures, streams, budgets, refusals."""

from __future__ import annotations

import re

import httpx
import openai
import pytest
from api_server import MODEL, asking, chat, data_url, metric, picture, until
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from PIL import Image

from serve.openai_types import IGNORED, NOT_SUPPORTED, ChatRequest

PICTURES = [data_url(picture(seed)) for seed in range(3)]


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == MODEL and client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**chat(model="gpt-4"))
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_chat(client):
    reply = client.chat.completions.create(**chat("Hello", max_tokens=6))
    (choice,) = reply.choices
    assert reply.id.startswith("chatcmpl-") and reply.model == MODEL and reply.object == "chat.completion"
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    assert reply.usage.completion_tokens == 6 and reply.usage.visual_tokens == 0
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 6
    again = client.chat.completions.create(**chat("Hello", max_tokens=None, max_completion_tokens=6))
    assert again.choices[0].message.content == choice.message.content


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture(client, form):
    usage = client.chat.completions.create(**chat("What?", data_url(picture(0), form))).usage
    assert 1 <= usage.visual_tokens <= 64 and usage.patches == 64


def test_pictures_in_their_order(client):
    black, white = (data_url(Image.new("RGB", (48, 32), name)) for name in ("black", "white"))

    def answer(*urls: str) -> str:
        body = chat("What?", *urls, max_tokens=40, temperature=1.0, seed=0)
        return client.chat.completions.create(**body).choices[0].message.content

    assert answer(black, white) == answer(black, white) != answer(white, black)


def test_a_stream_has_the_text_of_the_whole_answer(client):
    body = chat("What?", PICTURES[0], max_tokens=12)
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.strip() == whole.choices[0].message.content.strip()
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert not chunks[-1].choices and all(chunk.usage is None for chunk in chunks[:-1])
    for name in ("prompt_tokens", "completion_tokens", "visual_tokens"):
        assert getattr(chunks[-1].usage, name) == getattr(whole.usage, name)


def test_the_stream_on_the_wire(api):
    with httpx.stream("POST", f"{api.url}/v1/chat/completions", json=chat(stream=True), trust_env=False) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    assert '"usage"' not in lines[0]


def test_several_turns_remember(client):
    first = asking("What?", PICTURES[0])
    reply = client.chat.completions.create(**chat(messages=first)).choices[0].message
    turns = [*first, reply, {"role": "user", "content": "And now?"}]
    second = client.chat.completions.create(**chat(messages=turns))
    dumped = client.chat.completions.create(**chat(messages=[*first, reply.model_dump(), turns[2]]))
    assert second.usage.visual_tokens > 0 and dumped.usage.prompt_tokens == second.usage.prompt_tokens
    alone = client.chat.completions.create(**chat("And now?"))
    assert second.usage.prompt_tokens > alone.usage.prompt_tokens + second.usage.visual_tokens


def test_a_developer_is_the_system(client):
    def asked(role: str):
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        return client.chat.completions.create(**chat(messages=messages, max_tokens=12))

    one, other = asked("developer"), asked("system")
    assert one.choices[0].message.content == other.choices[0].message.content
    assert one.usage.prompt_tokens == other.usage.prompt_tokens


def test_seeds_and_choices(client):
    def texts(**fields) -> list[str]:
        body = chat("Hello", **{"temperature": 1.5, "max_tokens": 12, **fields})
        return [choice.message.content for choice in client.chat.completions.create(**body).choices]

    three = texts(n=3, seed=7)
    assert len(set(three)) == 3 and texts(n=3, seed=7) == three
    assert texts(seed=7) == three[:1] and texts(seed=8) != texts(seed=7)
    assert len(texts(n=2, seed=2**63 - 1)) == 2
    default = chat("Hello", seed=3, max_tokens=12)
    del default["temperature"]  # OpenAI's default is 1
    sampled = client.chat.completions.create(**default).choices[0].message.content
    assert [sampled] == texts(seed=3, temperature=1) != texts(temperature=0)


def test_choices_in_a_stream(client):
    body = chat("Hello", temperature=1.5, max_tokens=12, n=2, seed=7)
    whole = client.chat.completions.create(**body)
    texts = ["", ""]
    for chunk in client.chat.completions.create(**body, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert [text.strip() for text in texts] == [choice.message.content.strip() for choice in whole.choices]
    assert whole.usage.completion_tokens == 24


def test_stop(client):
    text = client.chat.completions.create(**chat("Hello", max_tokens=20)).choices[0].message.content
    stop = text[5:8]
    for given in (stop, ["never said, this", stop]):
        choice = client.chat.completions.create(**chat("Hello", max_tokens=20, stop=given)).choices[0]
        assert choice.finish_reason == "stop" and choice.message.content == text[: text.index(stop)]


def test_a_budget_of_the_request(client):
    def visual(**extra) -> int:
        return client.chat.completions.create(**chat("What?", *PICTURES[:2]), extra_body=extra).usage.visual_tokens

    own = visual()
    assert visual(compression=8) == 16 and visual(max_visual_tokens=5) == 10 and visual(compression=1) == 128
    assert visual() == own


def refusal(client, **fields) -> openai.APIStatusError:
    extra = {
        name: fields.pop(name)
        for name in list(fields)
        if name in ("compression", "max_visual_tokens", "foo", "messages")
    }
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**chat(**fields), extra_body=extra)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"logit_bias": {"5": 10}}, "logit_bias", "unsupported_parameter"),
        ({"foo": 1}, "foo", "unknown_parameter"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 9}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, None, "conflicting_parameters"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, None, "conflicting_parameters"),
        ({"compression": 0.5}, "compression", "invalid_value"),
        ({"max_visual_tokens": 65}, "max_visual_tokens", "invalid_value"),
        ({"max_visual_tokens": 5, "compression": 2}, None, "conflicting_parameters"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages[0].content[0]",
            "invalid_value",
        ),
        ({"messages": asking("x") + [{"role": "assistant", "content": None}]}, "messages[1].content", "invalid_value"),
        ({"messages": asking("word " * 1000)}, "messages", "context_length_exceeded"),
        ({"messages": asking("word " * 100_000)}, "messages", "context_length_exceeded"),
        ({"messages": asking("x", *["data:image/png;base64,AA=="] * 9)}, "messages", "too_many_images"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named(client, fields, param, code):
    error = refusal(client, **fields)
    assert (error.status_code, error.param, error.code) == (400, param, code)
    assert error.type == "invalid_request_error" and (param is None or param in error.body["message"])


def test_what_changes_nothing_is_taken(client):
    same = {"tools": [], "logprobs": False, "frequency_penalty": 0.0, "response_format": {"type": "text"}}
    ignored = {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto"}
    plain = client.chat.completions.create(**chat(max_tokens=12))
    reply = client.chat.completions.create(**chat(max_tokens=12, **same, **ignored))
    assert reply.choices[0].message.content == plain.choices[0].message.content


def test_the_python_block_of_the_guide_runs(api, repository, tmp_path, monkeypatch, capsys):
    picture(0).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (repository / "docs" / "guides" / "serving.md").read_text(), re.S)
    exec(compile(block.replace("http://127.0.0.1:8000", api.url), "serving.md", "exec"), {})
    assert " 6 of 64" in capsys.readouterr().out.replace("\n", " ")  # 64 patches at 10 a token


def test_the_table_of_fields_is_whole(repository):
    """What is refused or ignored, and what is taken, is what the guide says."""
    guide = (repository / "docs" / "guides" / "serving.md").read_text()
    rows = [line for line in guide.splitlines() if line.startswith("| `")]
    refused = next(line for line in rows if "| refused by name" in line).split(" | ")[0]
    ignored = next(line for line in rows if "| ignored: they change" in line).split(" | ")[0]
    assert set(re.findall(r"`(\w+)`", refused)) == set(NOT_SUPPORTED) - {"dimensions"}
    assert set(re.findall(r"`(\w+)`", ignored)) == IGNORED
    of_openai = {*CompletionCreateParamsBase.__annotations__, "stream"}
    assert of_openai <= {*ChatRequest.model_fields, *NOT_SUPPORTED, *IGNORED}
    assert all(f"`{name}" in guide for name in ChatRequest.model_fields if name != "model")


def test_metrics_count(api, client):
    name = "llava_drip_tokens_total"
    before = metric(api.url, name)
    usage = client.chat.completions.create(**chat("What?", PICTURES[0])).usage
    counted = usage.prompt_tokens + usage.visual_tokens + usage.completion_tokens
    assert until(lambda: metric(api.url, name) == before + counted, 2)


def test_who_leaves_frees_the_engine(api, client):
    body = chat("Go on and on.", PICTURES[0], max_tokens=1500, stream=True, temperature=2.0)
    for stream in (True, False):
        if stream:
            events = client.chat.completions.create(**body)
            next(events)
            events.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                body = {**body, "stream": False}
                httpx.post(f"{api.url}/v1/chat/completions", json=body, timeout=0.4, trust_env=False)
        assert until(lambda: metric(api.url, "llava_drip_engine_running") == 0, 1)
    assert client.chat.completions.create(**chat()).choices[0].message.content
