"""The server of `recipes.serve` in this process."""

import http.client
import json
import threading
import time

import openai
import uvicorn

from recipes.serving.api import Api


class Server:
    """An [`Api`] behind uvicorn, in a thread of its own."""

    def __init__(self, api: Api):
        self.api = api
        self.uvicorn = uvicorn.Server(uvicorn.Config(api.app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_):
        self.uvicorn.should_exit = True
        self.thread.join()

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, body: bytes, path: str = "/v1/chat/completions", **headers) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, body, {"content-type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
