"""An HTTP server on this machine with files to download, and with what goes wrong on the way; also the Hub."""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
import zipfile
from collections import defaultdict
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from hub_server import Handler as HubHandler
from hub_server import Hub, commit_of


class Files(Hub):
    """What is served, and how.

    files: path → content, below the address. faults: path → what the next requests get, one each, then all is well:
        503: that status. ("wait", seconds): 429 with Retry-After. ("drop", bytes): so many, then the connection closes.
    ranges, etags, lengths: False: the server knows no Range, or sends no ETag, or no length. ignore_if_range: as some servers.
    asked: (path, Range, If-Range) of each GET.
    """

    def __init__(self):
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list] = defaultdict(list)
        self.ranges = self.etags = self.lengths = True
        self.ignore_if_range = False
        self.asked: list[tuple[str, str | None, str | None]] = []

    def url(self, path: str) -> str:
        return f"{self.endpoint}/{path}"


class Handler(HubHandler):
    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/(.+)", path)
        if not found:
            return super().do_POST()
        body, branch = self.body().decode(), self.hub.repos.get(found[1], {}).get("main", {})
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        answer = []
        for name in asked:
            if name in branch:
                lfs = {"oid": self.sha_of(branch[name]), "size": len(branch[name]), "pointerSize": 130}
                answer.append({"type": "file", "path": name, "size": len(branch[name]), "oid": "0" * 40, "lfs": lfs})
        return self.answer(answer)

    def sha_of(self, content: bytes) -> str:
        return self.server.stated_sha or hashlib.sha256(content).hexdigest()

    def do_GET(self, head: bool = False):
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/datasets/"):
            found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/.+)?", path)
            if not found or found[1] not in self.hub.repos:
                return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"}, head)
            sha = commit_of(self.hub.repos[found[1]]["main"])
            return self.answer({"id": found[1], "sha": sha, "siblings": [], "tags": []}, 200, {}, head)
        if path.startswith("/datasets/"):
            self.path = self.path.removeprefix("/datasets")
            return super().do_GET(head)
        if path.removeprefix("/") in self.hub.files:
            return self.serve(path.removeprefix("/"))
        return self.answer({"error": "not here"}, 404, {}, head)

    def serve(self, path: str) -> None:
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        self.hub.asked.append((path, wanted, condition))
        content, fault = self.hub.files[path], None
        if self.hub.faults[path]:
            fault = self.hub.faults[path].pop(0)
        if isinstance(fault, int):
            return self.answer(b"", fault)
        if fault and fault[0] == "wait":
            return self.answer(b"", 429, {"Retry-After": str(fault[1])})
        etag, start = f'"{hashlib.md5(content).hexdigest()}"', 0
        if wanted and self.hub.ranges and (condition in (None, etag) or self.hub.ignore_if_range):
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        if start > len(content) or (start and start == len(content)):
            return self.answer(b"", 416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.hub.etags:
            self.send_header("ETag", etag)
        if self.hub.lengths:
            self.send_header("Content-Length", str(len(content) - start))
        else:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        if fault and fault[0] == "drop":
            self.wfile.write(content[start : start + fault[1]])
            self.close_connection = True
            return None
        self.wfile.write(content[start:])


@contextmanager
def running_files():
    """The server on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.stated_sha, server.hub = True, None, Files()
    server.hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    server.hub.server = server
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()
