"""Embeddings and segments over the API, beside the engine's own; pictures that are none, or too much; special tokens in text."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import httpx
import numpy as np
import openai
import pytest
from api_server import MODEL, chat, data_url, picture
from PIL import Image

from llava_drip.engine import Engine


@pytest.fixture
def http(api) -> httpx.Client:
    with httpx.Client(base_url=api.url, trust_env=False, timeout=60) as http:
        yield http


def test_embeddings(client, engine):
    pictures = [picture(0), picture(1, (80, 64))]
    urls = [data_url(image) for image in pictures]
    found = client.embeddings.create(model=MODEL, input=urls)  # the client asks for base64
    vectors = np.array([row.embedding for row in found.data])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5) and [row.index for row in found.data] == [0, 1]
    expected, counts = engine.embed(pictures)
    assert np.allclose(vectors, expected.numpy(), atol=1e-5) and found.usage.visual_tokens == sum(counts)
    floats = client.embeddings.create(model=MODEL, input=urls[0], encoding_format="float")
    assert np.allclose(floats.data[0].embedding, vectors[0], atol=1e-5)
    fewer = client.embeddings.create(model=MODEL, input=urls, extra_body={"max_visual_tokens": 4})
    assert fewer.usage.visual_tokens == 8 and not np.allclose(fewer.data[0].embedding, vectors[0], atol=1e-3)
    assert engine.embed(pictures)[1] == counts


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": "a text"}, "input"),
        ({"input": [data_url(picture(0)), "a text"]}, "input[1]"),
        ({"input": []}, "input"),
        ({"input": [1, 2]}, "input[0]"),
        ({"input": data_url(picture(0)), "dimensions": 8}, "dimensions"),
        ({"input": [data_url(picture(0))] * 9}, "input"),
    ],
)
def test_what_is_not_embedded(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, **fields)
    assert caught.value.param == param


def test_segments(http, engine):
    image = picture(1, (160, 80))
    body = {"model": MODEL, "image": data_url(image)}
    answer = http.post("/v1/images/segments", json=body).json()
    count, owners, grid = engine.segments(image)
    assert answer["visual_tokens"] == count and answer["segments"] == owners.tolist()
    assert answer["grid"] == list(grid) and answer["view"] == [80, 80] and answer["patches"] == 64
    answer = http.post("/v1/images/segments", json={**body, "compression": 8}).json()
    assert answer["visual_tokens"] == len(set(answer["segments"])) == 8
    drawn = http.post("/v1/images/segments", json={**body, "format": "png", "compression": 8})
    assert drawn.headers["content-type"] == "image/png" and drawn.headers["x-visual-tokens"] == "8"
    png = Image.open(io.BytesIO(drawn.content))
    assert png.format == "PNG" and png.width == png.height >= 448
    assert http.post("/v1/images/segments", json={**body, "format": "gif"}).json()["error"]["param"] == "format"


def png_that_declares(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def encoded(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def with_a_long_text() -> bytes:
    buffer, text = io.BytesIO(), zlib.compress(b"x" * 5_000_000)
    picture(0).save(buffer, "PNG")
    data = buffer.getvalue()
    chunk = b"zTXt" + b"Comment\0\0" + text
    return data[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


BAD_PICTURES = {
    "a bomb": encoded(png_that_declares(50_000, 50_000)),
    "just too large": encoded(png_that_declares(5001, 5000)),
    "a strip": encoded(png_that_declares(100_000, 1)),
    "cut short": encoded(png_that_declares(2000, 2000)),
    "a text that unfolds": encoded(with_a_long_text()),
    "a GIF": data_url(picture(0), "GIF"),
    "a GIF that says PNG": data_url(picture(0), "GIF").replace("gif", "png"),
    "a BMP that says PNG": data_url(picture(0), "BMP").replace("bmp", "png"),
    "an SVG": "data:image/svg+xml;base64," + base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode(),
    "PostScript": encoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "no base64": "data:image/png;base64,!!!!",
    "base64 with a line break": data_url(picture(0))[:60] + "\n" + data_url(picture(0))[60:],
    "no base64 marker": "data:image/png,abc",
    "nothing": "data:image/png;base64,",
    "empty": "",
    "a path": "/etc/passwd",
    "a file": "file:///etc/passwd",
    "an address": "https://example.com/a.png",
}


@pytest.mark.parametrize("url", BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_bad_pictures_are_refused(client, url):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**chat("What?", data_url(picture(0)), url))
    assert caught.value.param == "messages[0].content[1].image_url.url"
    assert caught.value.code in ("invalid_image", "remote_images_disabled")
    if "unfolds" not in caught.value.message and len(url) > 30:
        assert url[25:] not in caught.value.message


def test_a_picture_that_is_just_small_enough(client):
    assert client.chat.completions.create(**chat("What?", data_url(Image.new("RGB", (5000, 5000))))).usage.visual_tokens


def test_special_tokens_in_texts_are_words(client):
    def tokens(*texts: str) -> int:
        parts = [{"type": "text", "text": text} for text in texts]
        messages = [{"role": "user", "content": parts}]
        usage = client.chat.completions.create(**chat(messages=messages, max_tokens=1)).usage
        assert usage.visual_tokens == usage.patches == 0
        return usage.prompt_tokens

    for token in ("<image>", "</s>", "<s>", "<pad>", "<unk>"):
        apart = tokens(f"{token[0]} {token[1:]}")
        assert tokens(token) == tokens(token[:3], token[3:]) == apart > tokens("") + 2
    assert tokens("<</s>/s>") > tokens("") + 4
    usage = client.chat.completions.create(**chat("<image> What? <image>", data_url(picture(0)))).usage
    assert usage.patches == 64


def test_quantised_engines(checkpoint):
    from llava_drip.assistant.quantization import Quantization

    for quantization in (Quantization(4, "nf4", True), Quantization(8)):
        engine = Engine.load(checkpoint, device="cpu", quantization=quantization)
        kinds = {type(parameter).__name__ for parameter in engine.model.language_model.parameters()}
        assert kinds & {"Params4bit", "Int8Params"}
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
        assert list(engine.stream(messages, [picture(0)], 3))[-1].usage.new_tokens == 3
        assert engine.embed([picture(0)])[0].isfinite().all()
