from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from llava_drip import images
from llava_drip.images import ImageError, decode_image, load_image


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_declaring(width: int, height: int) -> bytes:
    """A valid PNG of a few bytes whose header declares any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_keep_their_pixels(format):
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode_image(encode(noise(), format, **options), "a")
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(noise()))


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P"])
def test_every_mode_becomes_rgb(mode):
    format = "JPEG" if mode == "CMYK" else "PNG"
    decoded = decode_image(encode(noise().convert(mode), format), "a")
    assert decoded.mode == "RGB" and decoded.size == (64, 48)


def test_16_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    decoded = np.asarray(decode_image(encode(Image.fromarray(ramp)), "a"))
    assert abs(decoded[0, 128, 0].astype(int) - 128) <= 1 and decoded[0, 255, 0] == 255 and decoded[0, 0, 0] == 0


def test_transparency_is_composed_on_white():
    half = np.zeros((2, 2, 4), np.uint8)
    half[0, 0], half[0, 1], half[1, 0] = (255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 127)
    decoded = np.asarray(decode_image(encode(Image.fromarray(half)), "a"))
    assert tuple(decoded[0, 0]) == (255, 0, 0) and tuple(decoded[0, 1]) == (255, 255, 255)
    assert abs(int(decoded[1, 0, 0]) - 128) <= 1


def test_palette_transparency_is_composed_on_white():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 200, 0, 0])
    picture.putpixel((0, 0), 0)
    decoded = decode_image(encode(picture, "GIF", transparency=0), "a")
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and decoded.getpixel((1, 1)) == (200, 0, 0)


def test_exif_orientation_is_applied():
    picture = noise(32, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    decoded = decode_image(encode(picture, "PNG", exif=exif), "a")
    assert decoded.size == (16, 32)
    assert np.array_equal(np.asarray(decoded), np.asarray(picture.transpose(Image.Transpose.ROTATE_270)))


def test_broken_exif_does_not_cost_the_picture():
    decoded = decode_image(encode(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), "a")
    assert decoded.size == (64, 48)


@pytest.mark.parametrize("size", [(6000, 6000), (13000, 13000), (60000, 60000)])
def test_declared_size_is_refused_before_decoding(size):
    with pytest.raises(ImageError, match=r"bomb\.png: .*25,000,000 pixels"):
        decode_image(png_declaring(*size), "bomb.png")


def test_max_pixels_is_the_callers():
    data = encode(noise())
    assert decode_image(data, "a", max_pixels=64 * 48).size == (64, 48)
    with pytest.raises(ImageError, match=r"a: 64 x 48 pixels; at most 3,071"):
        decode_image(data, "a", max_pixels=64 * 48 - 1)


def test_thin_strip_is_refused():
    with pytest.raises(ImageError, match="strip.png: 1000 x 1 is too thin"):
        decode_image(encode(Image.new("RGB", (1000, 1))), "strip.png")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_truncated_names_the_file(format, keep):
    data = encode(noise(), format)
    with pytest.raises(ImageError, match=r"^cut\.img: "):
        decode_image(data[: int(len(data) * keep)], "cut.img")


NOT_PICTURES = [b"", b"hello", b"<svg></svg>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a", b"\x89PNG\r\n\x1a\n"]


@pytest.mark.parametrize("data", NOT_PICTURES)
def test_what_is_no_picture_names_the_file(data):
    with pytest.raises(ImageError, match=r"^x\.jpg: "):
        decode_image(data, "x.jpg")


def test_corrupt_bytes_never_raise_anything_else():
    random = np.random.default_rng(0)
    outcomes = {"picture": 0, "error": 0}
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        data = encode(noise(), format)
        for _ in range(40):
            broken = bytearray(data)
            for position in random.integers(0, min(len(broken), 400), 8):
                broken[position] = random.integers(0, 256)
            try:
                decode_image(bytes(broken), "b")
                outcomes["picture"] += 1
            except ImageError:
                outcomes["error"] += 1
    assert outcomes["error"] > 20


def test_load_image(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encode(noise()))
    assert load_image(path).size == (64, 48) and load_image(str(path)).mode == "RGB"
    with pytest.raises(ImageError, match=r"none\.jpg: no such image file"):
        load_image(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="not a regular file"):
        load_image(tmp_path)
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(ImageError, match=r"a\.png: .* at most 100"):
        load_image(path)


def test_load_image_does_not_hang_on_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="not a regular file"):
        load_image(tmp_path / "pipe.jpg")
