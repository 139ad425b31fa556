"""What answers behind the chat page: the model in this process. serve/api_backend.py has the other one, an API elsewhere."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image
from torch import Tensor

from llava_drip.engine import Engine, QueueFull, StreamEvent, WorkFailed
from llava_drip.images import load_image
from llava_drip.scheduling.row import Picture

DECODED = threading.Semaphore(4)  # pictures at once, of all visitors: one may take 75 MB


class Busy(RuntimeError):
    """Too many ask at once.

    Attributes:
        retry_after: seconds until there is probably room.
    """

    def __init__(self, retry_after: float):
        super().__init__(f"too many questions wait; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Failed(RuntimeError):
    """The answer failed for a reason that lies neither in the question nor in its settings. One line for the reader."""


@dataclass(frozen=True)
class Seen:
    """What the tower made of one picture.

    Attributes:
        count: visual tokens.
        view: the part of the picture that the tower saw.
        owners: [patches] int64, the token of each patch in raster order, -1 for none; None: its tokens are no segments.
        grid: rows and columns of patches.
    """

    count: int
    view: Image.Image
    owners: Tensor | None
    grid: tuple[int, int]


@contextlib.contextmanager
def decoded(path: str) -> Iterator[Image.Image]:
    """A picture's file, in RGB, for no longer than it is needed in full. ImageError: as load_image."""
    with DECODED:
        yield load_image(path)


class Backend(Protocol):
    """What the page needs. Called from several threads at once.

    Attributes:
        name: what to call the model.
        patches: of one picture; a dense tower makes each a token.
        fixed: why this tower's number of tokens cannot be chosen; "" where it can.
    """

    name: str
    patches: int
    fixed: str

    def stream(
        self,
        messages: Sequence[dict],
        paths: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        compression: float | None,
        cancel: threading.Event,
    ) -> Iterator[StreamEvent]:
        """As Engine.stream, paths being those of the pictures' files. Of an event that is not the last, usage.visual_tokens may
        be 0: not known yet.

        Raises:
            ImageError: a picture that cannot be read. ValueError: a conversation that cannot be answered.
            Busy, Failed: otherwise.
        """
        ...

    def see(self, image: Image.Image, compression: float | None) -> Seen:
        """compression: patches per visual token; None: as the model is set. Raises as `stream`."""
        ...


class LocalBackend:
    """An Engine in this process."""

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name, self.patches = engine, name, engine.patches
        try:
            engine.checked_budget(1.0)
            self.fixed = ""
        except ValueError as error:
            self.fixed = str(error)

    def stream(self, messages, paths, **options) -> Iterator[StreamEvent]:
        try:
            yield from self.engine.stream(messages, [self._prepared(path) for path in paths], **options)
        except QueueFull as error:
            raise Busy(error.retry_after) from error
        except WorkFailed as error:
            raise Failed("The answer failed on the server's side. The question may be asked again.") from error

    def _prepared(self, path: str) -> Picture:
        with decoded(path) as image:
            return self.engine.prepared([image])[0]

    def see(self, image: Image.Image, compression: float | None) -> Seen:
        count, owners, grid = self.engine.segments(image, compression)
        return Seen(count, self.engine.view(image), owners, grid)
