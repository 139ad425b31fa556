"""A judge behind a real HTTP endpoint, in OpenAI's form, that says what a script tells it to, failures too."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PARTS = re.compile(
    r"\[Context\]\n(?P<context>.*)\n\n\[Question\]\n(?P<question>.*)\n\n\[Assistant 1\]\n(?P<first>.*)\n\n\[End of Assistant 1\]"
    r"\n\n\[Assistant 2\]\n(?P<second>.*)\n\n\[End of Assistant 2\]\n\n\[System\]\n(?P<prompt>.*)\n\n",
    re.DOTALL,
)


class JudgeServer(ThreadingHTTPServer):
    """A server on a free port of 127.0.0.1.

    Attributes:
        scores: (question, first answer, second answer) → the two scores.
        script: question → what happens to its requests, in their order, before it is answered well:
            "malformed", "429" (Retry-After: 1), "500", "slow" (a second and a half), "cut off", "drop", "html", "401", "400".
            "forever" at the end repeats the one before.
        requests: what was asked, {"time", "key", "body", and the parts of the prompt}.
        delay: seconds before each reply. most: the most requests that were open at once.
    """

    daemon_threads = True

    def __init__(self, scores: Callable[[str, str, str], tuple[float, float]] = lambda *_: (8, 6)):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.scores, self.script, self.requests, self.delay = scores, {}, [], 0.0
        self.happened: dict[str, int] = defaultdict(int)
        self.open = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next_act(self, question: str) -> str:
        acts = self.script.get(question, [])
        with self.lock:
            number = self.happened[question]
            self.happened[question] += 1
        if acts and acts[-1] == "forever":
            return acts[min(number, len(acts) - 2)]
        return acts[number] if number < len(acts) else "good"

    def asked(self, question: str) -> list[dict]:
        return [request for request in self.requests if request["question"] == question]

    def handle_error(self, request, client_address) -> None:
        """A client that has given up is none."""


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self.reply(404, {"error": {"message": f"no {self.path}"}})
        parts = PARTS.fullmatch(body["messages"][-1]["content"]).groupdict()
        with server.lock:
            server.requests.append(
                {"time": time.monotonic(), "key": self.headers["Authorization"], "body": body, **parts}
            )
            server.open += 1
            server.most = max(server.most, server.open)
        try:
            self.act(server.next_act(parts["question"]), body, parts)
        finally:
            with server.lock:
                server.open -= 1

    def act(self, what: str, body: dict, parts: dict) -> None:
        time.sleep(1.5 if what == "slow" else self.server.delay)
        first, second = self.server.scores(parts["question"], parts["first"], parts["second"])
        text, finish = f"{first:g} {second:g}\nThe first knows the cat.", "stop"
        if what == "drop":  # in the middle of a reply
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        if what in ("429", "500", "401", "400"):
            headers = {"Retry-After": "1"} if what == "429" else {}
            return self.reply(int(what), {"error": {"message": f"scripted {what}", "type": "scripted"}}, headers)
        if what == "html":
            return self.reply(200, "<html>a proxy's page</html>")
        if what == "malformed":
            text = f"Assistant 1: {first:g}, Assistant 2: {second:g}"
        if what == "cut off":
            finish = "length"
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        completion = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": f"{body['model']}-0001",
            "usage": usage,
        }
        self.reply(200, {**completion, "choices": [{"index": 0, "message": message, "finish_reason": finish}]})

    def reply(self, status: int, content: dict | str, headers: dict | None = None) -> None:
        page = isinstance(content, str)
        data = (content if page else json.dumps(content)).encode()
        kind = {"Content-Type": "text/html" if page else "application/json", "Content-Length": str(len(data))}
        self.send_response(status)
        for name, value in {**kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serving(server: JudgeServer) -> Iterator[JudgeServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
