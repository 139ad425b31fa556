"""uvicorn's faster reading of HTTP, with the two things that its other one has: a bound on heads, and bodies of requests that
offer to go on in another protocol."""

from __future__ import annotations

import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 2**16  # bytes of a request's line and headers; also of what is no body after them, as trailers
# An offer that is not taken (RFC 9110, 7.8), as Java's client makes it at first. The parser would stop before the body.
OFFER = re.compile(rb"(?im)^upgrade(?=:)")
FIRST_LINE = re.compile(rb"[!-~]+ \S+ HTTP/1\.[01]\r")


class BoundedHttp(HttpToolsProtocol):
    """A head is kept until it is whole, and refused where it does not end in time: the parser would keep any amount."""

    head, in_message, bodiless = b"", False, 0

    def data_received(self, data: bytes) -> None:
        if not self.in_message:
            data, self.head = self.head + data, b""
            end = data.find(b"\r\n\r\n")
            if end < 0 and len(data) <= MAX_HEAD and self._may_be_http(data):
                self.head = data
                return
            if max(end, len(data) if end < 0 else 0) > MAX_HEAD:
                return self._refuse()
            if end >= 0:
                data = OFFER.sub(b"x-upgrade", data[:end]) + data[end:]
        self.bodiless += len(data)
        super().data_received(data)
        if self.in_message and self.bodiless > MAX_HEAD + len(data):
            self._refuse()

    @staticmethod
    def _may_be_http(data: bytes) -> bool:
        """What is not is refused by the parser at once."""
        line, end, _ = data.partition(b"\n")
        return not end or FIRST_LINE.fullmatch(line) is not None

    def _refuse(self) -> None:
        self._unset_keepalive_if_required()
        self.in_message = True  # nothing more of it is kept
        self.send_400_response("The request's head is too long.")

    def on_message_begin(self) -> None:
        self.in_message, self.bodiless = True, 0
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self.bodiless = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.in_message = False
        super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing for a log: anybody may send CONNECT."""
