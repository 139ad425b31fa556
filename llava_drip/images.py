"""The one way bytes become a picture, for training data, evaluation and the server alike.

Bytes of unknown origin can be a 20 KB file that unfolds into gigabytes, so nothing is decoded before the size its
header declares has been checked, and only formats whose Pillow decoders are plain pixel decoders are tried at all
(no PostScript, no PDF, no fonts). Whatever is wrong with the bytes comes out as one `ImageError` naming the file.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 25_000_000  # 25 megapixels: 75 MB once decoded to RGB
MAX_BYTES = 64 * 2**20  # of one encoded file
MAX_ASPECT = 200  # longer side over shorter; "resize the shorter side to 336" would turn a 1 x 100000 strip into 11 Gpx
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")  # endings of training's pictures, in shards and folders
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class ImageError(ValueError):
    """A picture that is missing, too large, of an unknown format, truncated or corrupt. The message names the file."""


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Decodes one encoded picture.

    Args:
        data: the encoded file (JPEG, PNG, WebP, GIF or BMP; of an animation the first frame is taken).
        name: what to call the picture in errors: its path, its archive member, or the uploaded file's name.
        max_pixels: width times height allowed, checked against the header before any pixel is decoded.
        formats: those of FORMATS that are taken.

    Returns:
        A loaded PIL image of mode RGB (uint8), upright according to its EXIF orientation, transparency on white.

    Raises:
        ImageError: naming `name`, when the data are no such picture, declare too many pixels, or are cut short.
    """
    with open_image(data, name, max_pixels, formats) as image:
        return rgb_image(image, name)


def open_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS) -> Image.Image:
    """A picture with its header read and its size checked, for `rgb_image`; nothing is decoded. Arguments and errors of
    `decode_image`."""
    if not data:
        raise ImageError(f"{name}: the file is empty")
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name}: {len(data):,} bytes; at most {MAX_BYTES:,} are allowed")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a readable picture; {', '.join(formats)} are understood") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: declares far more than the {max_pixels:,} pixels that are allowed") from error
    except Exception as error:  # Pillow's plug-ins raise many types on broken headers
        raise ImageError(f"{name}: broken header ({error})") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ImageError(f"{name}: {width} x {height} pixels; at most {max_pixels:,} pixels are allowed")
    return image


def rgb_image(image: Image.Image, name: str) -> Image.Image:
    """A picture that `open_image` or another library has opened → as `decode_image` gives it: loaded, RGB, upright, on white.

    Raises:
        ImageError: naming `name`: too thin a strip, or data that cannot be decoded.
    """
    width, height = image.size
    if max(width, height) > MAX_ASPECT * max(1, min(width, height)):
        raise ImageError(f"{name}: {width} x {height} is too thin a strip; {MAX_ASPECT}:1 is allowed")
    try:
        image.load()
    except Exception as error:
        raise ImageError(f"{name}: truncated or corrupt ({error})") from error
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the pixels, which did decode
        upright = image
    try:
        return _to_rgb(upright)
    except Exception as error:
        raise ImageError(f"{name}: cannot be turned into RGB ({error})") from error


def load_image(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads and decodes a picture file; see `decode_image`. Opens local regular files only, never an address.

    Raises:
        ImageError: naming `path`, also when there is no such file or it cannot be read.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path}: not a regular file")
        if status.st_size > MAX_BYTES:  # before reading it into memory
            raise ImageError(f"{path}: {status.st_size:,} bytes; at most {MAX_BYTES:,} are allowed")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such image file") from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error})") from error
    return decode_image(data, str(path), max_pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it to white at 255
        grey = (np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()
