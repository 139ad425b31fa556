"""A small HTTP server that speaks as much of the Hugging Face Hub's protocol as its client needs to upload and to download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, READ_ONLY = "hf_writes", "hf_reads"


class Hub:
    """What was sent. repos: name → branch → path → content."""

    def __init__(self):
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.endpoint = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *args):
        pass

    def answer(self, content, status: int = 200, headers: dict | None = None, head: bool = False) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        body, path = self.body(), unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_ONLY):
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            found = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
            good = isinstance(yaml.safe_load(found[1]), dict) if found else False
            return self.answer(
                {"errors": [] if good else [{"message": "no metadata"}], "warnings": []}, 200 if good else 400
            )
        if token == READ_ONLY:
            return self.answer({"error": "You don't have the rights to create a model"}, 403)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            new = name not in self.hub.repos
            if new:
                self.hub.repos[name], self.hub.private[name] = (
                    {"main": {}},
                    asked.get("visibility") == "private" or bool(asked.get("private")),
                )
            return self.answer({"url": f"{self.hub.endpoint}/{name}"}, 200 if new else 409)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            self.hub.repos[found[1]].setdefault(found[2], {})
            return self.answer({})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/.+", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            branch = self.hub.repos[found[1]][found[2]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    branch[value["path"]] = base64.b64decode(value["content"])
                else:
                    assert line["key"] == "lfsFile", line
                    branch[value["path"]] = self.hub.blobs[value["oid"]]
            url = f"{self.hub.endpoint}/{found[1]}/commit/{commit_of(branch)}"
            return self.answer({"commitUrl": url, "commitOid": commit_of(branch), "success": True})
        return self.answer({"error": f"no POST {path}"}, 404)

    def do_PUT(self):
        content = self.body()
        oid = self.path.rsplit("/", 1)[-1]
        good = hashlib.sha256(content).hexdigest() == oid
        if good:
            self.hub.blobs[oid] = content
        self.answer({}, 200 if good else 400)

    def do_GET(self, head: bool = False):
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            branches = self.hub.repos.get(found[1], {})
            branch = next((b for name, b in branches.items() if found[2] in (name, commit_of(b))), None)
            if branch is None or found[3] not in branch:
                return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"}, head)
            content = branch[found[3]]
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit_of(branch)}
            return self.answer(content, 200, headers, head)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            branch = self.hub.repos.get(found[1], {}).get(found[2], {})
            names = [name for name in branch if not found[3] or name.startswith(f"{found[3]}/")]
            files = [{"type": "file", "path": name, "size": len(branch[name]), "oid": "0" * 40} for name in names]
            if not files:
                return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return self.answer(files)
        if (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)) and found[
            1
        ] in self.hub.repos:
            branch = self.hub.repos[found[1]][found[2] or "main"]
            return self.answer(
                {"id": found[1], "sha": commit_of(branch), "siblings": [{"rfilename": name} for name in branch]}
            )
        return self.answer({"error": f"no GET {path}"}, 404, {}, head)

    def do_HEAD(self):
        self.do_GET(head=True)


def commit_of(branch: dict[str, bytes]) -> str:
    """A branch's state as the 40 digits of a commit."""
    return hashlib.sha1(repr(sorted((name, hash_of(data)) for name, data in branch.items())).encode()).hexdigest()


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def running_hub():
    """The Hub on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub()
    server.hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
