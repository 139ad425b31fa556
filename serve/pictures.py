"""Strings of a request → decoded pictures: data URLs, or addresses where the server allows them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re

from PIL import Image

from llava_drip.images import ImageError, decode_image, open_image, rgb_image
from serve.errors import bad_request, busy
from serve.remote import Fetcher, RemoteRefused
from serve.threads import Share, Tally, Threads

FORMATS = ("JPEG", "PNG", "WEBP")
HELD_PIXELS = 400_000_000  # of all requests together, 3 bytes each; as many as 16 of the largest pictures
# Decoded at once, in a millisecond or two: a thread would wait longer for its turn.
SMALL_PIXELS, SMALL_BYTES = 256 * 256, 2**18
DATA_URL = re.compile(r"data:image/(?:jpeg|jpg|png|webp);base64,", re.IGNORECASE)


class Pictures:
    """Decodes pictures, a few at a time, and holds no more of them than fit: eight of 25 Mpx are 600 MB of one request."""

    def __init__(self, fetcher: Fetcher | None):
        """fetcher: None: addresses are refused."""
        self.fetcher, self.tally = fetcher, Tally()
        self.decoders = Threads(2, "decode")

    @property
    def pixels(self) -> int:
        """Of the pictures that are there or on their way, whoever still wants them."""
        return self.tally.total

    async def decode(self, url: str, param: str) -> Image.Image:
        """One picture, in RGB, which counts until it is let go.

        Raises:
            ApiError: naming `param`.
        """
        data = await self._data(url, param)
        try:
            with open_image(data, "the picture", formats=FORMATS) as image:
                pixels = image.width * image.height
                if self.pixels + pixels > HELD_PIXELS:
                    raise busy("the server holds as many pictures as it can; try again soon", 2)
                share = self.tally.take(pixels)
                if pixels <= SMALL_PIXELS and len(data) <= SMALL_BYTES:
                    return counted(rgb_image(image, "the picture"), share)
            # Opened once more there: were this task cancelled meanwhile, the picture would be closed under the decoder's hands.
            return await self.decoders.run(lambda: counted(decode_image(data, "the picture", formats=FORMATS), share))
        except ImageError as error:
            raise bad_request(f"{param}: {error}", param, "invalid_image") from error

    async def _data(self, url: str, param: str) -> bytes:
        """The encoded file."""
        if url[:5].lower() == "data:":
            if not (start := DATA_URL.match(url)):
                raise bad_request(
                    f"{param}: a data URL must begin with data:image/png;base64, (or jpeg, webp)",
                    param,
                    "invalid_image",
                )
            try:
                if len(url) <= SMALL_BYTES:
                    return base64.b64decode(url[start.end() :], validate=True)
                return await asyncio.to_thread(base64.b64decode, url[start.end() :], validate=True)
            except (binascii.Error, ValueError) as error:
                raise bad_request(f"{param}: what follows base64, is not base64", param, "invalid_image") from error
        if not re.match(r"https?:", url, re.IGNORECASE):
            raise bad_request(f"{param}: give a data URL, data:image/png;base64,...", param, "invalid_image")
        if self.fetcher is None:
            raise bad_request(
                f"{param}: this server does not fetch pictures from addresses; send a data URL, data:image/png;base64,...",
                param,
                "remote_images_disabled",
            )
        try:
            return await self.fetcher.fetch(url)
        except RemoteRefused as error:
            raise bad_request(
                f"{param}: the picture was not fetched: {error}", param, "remote_image_refused"
            ) from error


def counted(image: Image.Image, share: Share) -> Image.Image:
    """The picture, which has its share until it is let go."""
    image.share = share
    return image
