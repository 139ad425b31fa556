"""What a server is told: the model's name, the key, the limits; and where the key comes from."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

KEY = "LLAVA_DRIP_API_KEY"


@dataclass(frozen=True)
class Settings:
    """Of one app.

    Attributes:
        model: the name that requests give, and /v1/models.
        api_key: asked for on every route; None: none is.
        loopback_only: the Host header must name this machine itself; for a server that listens there alone and has no key.
        remote_images: pictures are fetched from http(s) addresses too.
        time_limit: seconds, waiting included, after which an answer ends as it is.
        max_new_tokens: of a request that says no number. most_new_tokens: that a request may ask for; None: any number.
        max_body: bytes of a request.
        docs: the page /docs, which a browser gets from cdn.jsdelivr.net; /openapi.json is there without.
    """

    model: str
    api_key: str | None = None
    loopback_only: bool = False
    remote_images: bool = False
    time_limit: float = 120.0
    max_new_tokens: int = 512
    most_new_tokens: int | None = None
    max_body: int = 32 * 2**20
    docs: bool = False

    def __post_init__(self):
        if not self.time_limit > 0:
            raise ValueError(f"time limit: must be above 0 seconds, got {self.time_limit}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max new tokens: must be at least 1, got {self.max_new_tokens}")
        if self.most_new_tokens is not None and self.most_new_tokens < 1:
            raise ValueError(f"most new tokens: must be at least 1, got {self.most_new_tokens}")
        if self.api_key is not None:
            check_key(self.api_key)


def check_key(key: str) -> None:
    """ValueError: one that a header cannot carry."""
    if not (key.isascii() and key.isprintable() and key.strip()):
        raise ValueError("the API key must be printable ASCII, and not empty")


def api_key(path: Path | None) -> str | None:
    """The key in a file's first line, or in the environment. ValueError: both, or a file that has none."""
    given = os.environ.pop(KEY, None)  # no child inherits it
    if path is None:
        if given is not None and not given.strip():
            raise ValueError(f"{KEY} is empty; unset it to serve without a key")
        return given and given.strip()
    if given is not None:
        raise ValueError(f"--api-key-file and {KEY} are both given; leave one of them out")
    return key_of_file(path)


def key_of_file(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise ValueError(f"--api-key-file {path}: its first line has no key")
    return lines[0].strip()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_place(host: str, port: int) -> None:
    """Before a model is loaded for it. ValueError: nobody can listen there, as where another program does."""
    failed, some = None, False
    try:
        for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            try:
                socket.create_server(address[:2], family=family).close()
                some = True
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise
                failed = error  # another address of the name may do: there is no IPv6 here, say
        if some:
            return
    except OSError as error:
        failed = error
    raise ValueError(f"--host {host} --port {port}: {failed.strerror or failed}; give another one") from failed


def warn_of_no_key(prog: str, host: str, key: str | None) -> None:
    if key is None and not is_loopback(host):
        print(f"{prog}: --host {host} without a key: whoever reaches this machine can use it ({KEY})", file=sys.stderr)
