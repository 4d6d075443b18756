"""A server of OpenAI's completions API that fails in the ways that real ones do, on command. Standard library only.

It serves `GET /v1/models`, `POST /v1/completions` and `POST /v1/chat/completions` on a port of its own. A right answer
is a function of the prompt alone, so tests can tell whose answer they hold.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OK = "ok"
HTML = b"<html><body>This is no API.</body></html>"
# Name of a behaviour: status, headers, and what the right answer becomes.
ANSWERS: dict[str, tuple[int, dict, Callable[[dict], object]]] = {
    OK: (200, {}, lambda answer: answer),
    "length": (200, {}, lambda answer: _finish(answer, "length")),
    "429 with Retry-After": (429, {"Retry-After": "0.3"}, lambda answer: _error("too many requests")),
    "429": (429, {}, lambda answer: _error("too many requests")),
    "500": (500, {}, lambda answer: _error("out of memory")),
    "503 of a proxy": (503, {"Content-Type": "text/html"}, lambda answer: HTML),
    "424": (424, {}, lambda answer: {"error": "Request failed during generation", "error_type": "generation"}),
    "truncated JSON": (200, {}, lambda answer: json.dumps(answer).encode()[:-20]),
    "no JSON": (200, {"Content-Type": "text/html"}, lambda answer: HTML),
    "a list": (200, {}, lambda answer: [answer]),
    "no choices": (200, {}, lambda answer: {key: answer[key] for key in ("id", "model")}),
    "empty choices": (200, {}, lambda answer: {**answer, "choices": []}),
    "no text": (
        200,
        {},
        lambda answer: {**answer, "choices": [{**answer["choices"][0], "text": None, "message": None}]},
    ),
    "unfinished": (200, {}, lambda answer: _finish(answer, None)),
    "filtered": (200, {}, lambda answer: _finish(answer, "content_filter")),
    "400": (400, {}, lambda answer: _error("this model's context is 8 tokens")),
    "401": (401, {}, lambda answer: _error("wrong key")),
    "404": (404, {}, lambda answer: {"object": "error", "message": "the model is not there"}),
    "422": (422, {}, lambda answer: {"error": "inputs must have less than 8 tokens", "error_type": "validation"}),
}
# What is no whole answer: see `_Handler`.
RUDE = ("hang", "trickle", "short body", "disconnect")


def reply_to(prompt: str | list[int]) -> str:
    """The right answer to a prompt."""
    return f"reply {hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:12]}"


class MisbehavingServer(ThreadingHTTPServer):
    """A context manager; within it, the server runs at `url`.

    Args:
        behaviours: of the requests for a completion, by their number; further ones are answered right. Or a function
            of number and body.
        models: ids that it serves.
        card: what it says of each of them besides.
        answer: text of the right answer to a prompt.
        latency: longest time in seconds that a right answer takes; which takes how long, its prompt decides.

    Attributes:
        bodies: of all requests for a completion, in the order in which they came.
        keys: `Authorization` headers of all requests.
        most_at_once: requests for a completion that waited for their answer at a time.
    """

    daemon_threads = True
    request_queue_size = 256  # or connections wait a second for another chance

    def __init__(
        self,
        behaviours: Sequence[str] | Callable[[int, dict], str] = (),
        models: Sequence[str] = ("llm",),
        card: dict | None = None,
        answer: Callable[[str | list[int]], str] = reply_to,
        latency: float = 0.0,
    ):
        if not callable(behaviours) and (unknown := set(behaviours) - {*ANSWERS, *RUDE}):
            raise ValueError(f"There is no behaviour {unknown}.")
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviours, self.models, self.card = behaviours, models, card or {}
        self.answer, self.latency = answer, latency
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.most_at_once = self.at_once = 0
        self.lock, self.closing = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *failure):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients that hang up are none of the tests' business."""

    @contextmanager
    def counted(self):
        """Around a request, up to where its answer begins."""
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        yield
        with self.lock:
            self.at_once -= 1

    def note(self, body: dict) -> str:
        """Keep the request and say how to behave."""
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
        if callable(self.behaviours):
            return self.behaviours(number, body)
        return self.behaviours[number] if number < len(self.behaviours) else OK


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: MisbehavingServer

    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        if self.path == "/models":  # as web applications answer whatever they are asked
            return self.send(200, {"Content-Type": "text/html"}, HTML)
        if self.path != "/v1/models":
            return self.send(404, {}, {"detail": "Not Found"})
        cards = [{"id": name, "object": "model", **self.server.card} for name in self.server.models]
        self.send(200, {}, {"object": "list", "data": cards})

    def do_POST(self):
        self.server.keys.append(self.headers["Authorization"])
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "messages" in body:  # of a chat, whose last message is a text
            body["prompt"] = body["messages"][-1]["content"][0]["text"]
        with self.server.counted():
            behaviour = self.server.note(body)
            draw = hashlib.sha256(json.dumps(body["prompt"]).encode()).digest()[0] / 255
            time.sleep(self.server.latency * draw if behaviour == OK else 0)
        self.behave(behaviour, body)

    def behave(self, behaviour: str, body: dict):
        text = self.server.answer(body["prompt"])
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {}
        answer = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": body["model"]}
        answer["choices"] = [choice]
        if behaviour in ANSWERS:
            status, headers, change = ANSWERS[behaviour]
            return self.send(status, headers, change(answer))
        self.close_connection = True
        content = json.dumps(answer).encode()
        if behaviour == "hang":  # longer than any client waits
            self.server.closing.wait()
        elif behaviour == "trickle":  # never silent for long, nor ever done
            self.start(200, {}, len(content))
            for byte in content:
                self.wfile.write(bytes([byte]))
                if self.server.closing.wait(0.05):
                    break
        elif behaviour == "short body":
            self.start(200, {}, len(content))
            self.wfile.write(content[: len(content) // 2])
        # "disconnect" sends nothing

    def send(self, status: int, headers: dict, content: object):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.start(status, headers, len(content))
        self.wfile.write(content)

    def start(self, status: int, headers: dict, length: int):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": length}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *message):
        """Tests look at `bodies`."""


def _finish(answer: dict, reason: str | None) -> dict:
    return {**answer, "choices": [{**answer["choices"][0], "finish_reason": reason}]}


def _error(message: str) -> dict:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
