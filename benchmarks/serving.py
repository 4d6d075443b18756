"""Put the server of `recipes.serve` under load: 64 clients, clips of 1 to 30 s, and clients that behave badly.

    OMP_NUM_THREADS=1 python -m benchmarks.serving --model assets/nano/lsm --json serving.json
    python -m benchmarks.serving --model assets/nano/lsm --url http://localhost:8001 --name MODEL   # another server

Every answer is compared with that to the same clip alone. The first token of one client is compared with that of
`generate` in this process, in turns. With `--url`, a running server (such as vLLM's) gets the same load, without the
checks of bad behaviour.
"""

import base64
import contextlib
import http.client
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import soundfile
import torch

from benchmarks.machine import describe
from dataset_builders.corpora.audio import encode
from dataset_builders.nano.corpus import NanoCorpus
from language_models.command_line import parser_of
from language_models.generation import GREEDY, read_answers
from processing_lsm import load_audio
from recipes.listening.speech_llm import load

RATE, TOKENS = 16_000, 24
INSTRUCTIONS = ("Transcribe the speech.", "Continue the text.", "Translate what you hear into Spanish.")
Question = tuple[str, bytes]


def questions(count: int, seed: int = 0) -> list[Question]:
    """Return instructions with WAV files of 1 to 30 s, each of some sentences of the nano corpus."""
    draw, sentences = random.Random(seed), iter(NanoCorpus("test"))
    waves = [load_audio(next(sentences)["audio"]) for _ in range(40)]
    asked = []
    for number in range(count):
        seconds, wave = draw.uniform(1, 30), np.zeros(0, np.float32)
        while len(wave) < seconds * RATE:
            wave = np.concatenate([wave, draw.choice(waves)])
        asked.append((INSTRUCTIONS[number % len(INSTRUCTIONS)], encode(wave[: int(seconds * RATE)])))
    return asked


class Client:
    """A client of a server, which asks with streamed answers."""

    def __init__(self, url: str, model: str):
        self.address, self.model = urllib.parse.urlsplit(url).netloc, model

    def body(self, question: Question, **settings) -> bytes:
        instruction, file = question
        audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(file).decode(), "format": "wav"}}
        messages = [{"role": "user", "content": [{"type": "text", "text": instruction}, audio]}]
        fields = {"model": self.model, "messages": messages, "max_tokens": TOKENS, "temperature": 0, "stream": True}
        return json.dumps({**fields, **settings}).encode()

    def post(self, body: bytes, timeout: float = 300) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.address, timeout=timeout)
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        return connection.getresponse()

    def ask(self, question: Question) -> tuple[str, float, float, int]:
        """Return the answer, the seconds to its first text and to its end, and its number of parts."""
        began, first, text, parts = time.perf_counter(), 0.0, "", 0
        response = self.post(self.body(question))
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read()[:200]!r}")
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"])
                new = (event["choices"] or [{"delta": {}}])[0]["delta"].get("content") or ""
                first = first or (time.perf_counter() - began if new else 0.0)
                text, parts = text + new, parts + bool(new)
        return text, first, time.perf_counter() - began, parts


@contextlib.contextmanager
def served(model: str, *options: str) -> Iterator[tuple[str, int]]:
    """Run `recipes.serve`; yields its URL and its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "recipes.serve", "--model", model, "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
        if process.poll() is not None:
            raise RuntimeError("the server has died")
    finally:
        process.terminate()
        process.wait(20)


def load_test(client: Client, asked: list[Question], expected: list[str], clients: int, seconds: float) -> dict:
    """Ask from many clients for some time, and count the answers."""
    results: list[tuple[bool, float, float, int]] = []
    failed: Counter = Counter()
    until = time.perf_counter() + seconds

    def work(number: int) -> None:
        draw = random.Random(number)
        while time.perf_counter() < until:
            place = draw.randrange(len(asked))
            try:
                text, *figures = client.ask(asked[place])
                results.append((text.strip() == expected[place], *figures))
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                failed[f"{type(error).__name__}: {str(error)[:100]}"] += 1

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    spent = time.perf_counter() - began
    first, whole = (sorted(result[place] for result in results) for place in (1, 2))
    return {
        "clients": clients,
        "answers": len(results),
        "answers_per_second": len(results) / spent,
        "tokens_per_second": sum(result[3] for result in results) / spent,
        "other_answers": sum(not result[0] for result in results),
        "lost": dict(failed),
        **{f"first_token_{name}": quantile(first, at) for name, at in (("p50", 0.5), ("p95", 0.95))},
        **{f"answer_{name}": quantile(whole, at) for name, at in (("p50", 0.5), ("p95", 0.95))},
    }


def memory(pid: int | None) -> int:
    """Return the bytes that an idle server has in memory, after the time in which it gives back what is free."""
    time.sleep(3)
    return psutil.Process(pid).memory_info().rss if pid else 0


def quantile(values: list[float], at: float) -> float:
    return values[min(len(values) - 1, int(at * len(values)))] if values else float("nan")


def first_tokens(llm, client: Client, asked: list[Question]) -> dict:
    """Compare the time to the first token of one client with that of `generate` in this process, in turns."""
    bare, server = [], []
    for instruction, file in asked:
        server.append(client.ask((instruction, file))[1])
        began = time.perf_counter()
        inputs = llm.inputs([{"instruction": instruction, "audio": file}])
        with torch.inference_mode():
            llm.model.generate(**inputs, **GREEDY, max_new_tokens=1, pad_token_id=llm.tokenizer.pad_token_id)
        bare.append(time.perf_counter() - began)
    ratios = [one / other for one, other in zip(server, bare, strict=True)]
    return {"server": statistics.median(server), "bare": statistics.median(bare), "ratio": statistics.median(ratios)}


def expected_answers(llm, asked: list[Question]) -> list[str]:
    """Return the answer to each question alone."""
    answers = []
    for instruction, file in asked:
        inputs = llm.inputs([{"instruction": instruction, "audio": file}])
        with torch.inference_mode():  # transformers' own loop, and not the one that the server has, too
            output = llm.model.generate(**inputs, **GREEDY, max_new_tokens=TOKENS, pad_token_id=0)
        answers.extend(read_answers(llm.tokenizer, output[:, inputs["input_ids"].shape[1] :].tolist()))
    return answers


# Clients that behave badly


def flac_of_hours() -> bytes:
    """Return a small FLAC file that would be three hours of silence."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8_000, 1, "PCM_16", format="FLAC") as out:
        for _ in range(180):
            out.write(np.zeros(60 * 8_000, np.int16))
    return file.getvalue()


def refusals(client: Client, good: Question) -> dict[str, tuple[int, float]]:
    """Return the status and the seconds for requests that must be refused."""
    garbage = (good[0], os.urandom(50_000))
    text = good[1].hex().encode()
    bodies = {
        "a FLAC of three hours": client.body((good[0], flac_of_hours())),
        "garbage": client.body(garbage),
        "text as audio": client.body((good[0], text)),
        "40 clips": client.body(good),
        "no JSON": b"\xff\xfe{",
        "too large": b" " * (33 * 2**20),
    }
    whole = json.loads(bodies["40 clips"])
    whole["messages"][0]["content"] = [whole["messages"][0]["content"][1]] * 40
    bodies["40 clips"] = json.dumps(whole).encode()
    found = {}
    for name, body in bodies.items():
        began = time.perf_counter()
        try:
            response = client.post(body)
            status = response.status
            response.read()
        except (BrokenPipeError, ConnectionResetError):  # it stopped reading
            status = 413
        found[name] = (status, time.perf_counter() - began)
    return found


def misbehave(client: Client, question: Question, until: float) -> Counter:
    """Leave in the middle, send half a request, and read slowly, until a time."""
    done: Counter = Counter()
    host, port = client.address.split(":")
    body = client.body(question)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    half_sent = []
    while time.perf_counter() < until:
        half = socket.create_connection((host, int(port)))
        half.sendall(head.encode() + body[: len(body) // 2])
        half_sent.append(half)  # never finished
        leaving = socket.create_connection((host, int(port)))
        leaving.sendall(head.encode() + body)
        time.sleep(0.05)
        leaving.close()
        slow = socket.create_connection((host, int(port)))
        slow.sendall(head.encode() + body)
        for _ in range(20):
            slow.recv(16)
            time.sleep(0.02)
        slow.close()
        done.update(["half sent", "left", "slow"])
    for half in half_sent:
        half.close()
    return done


def full_queue(model: str, question: Question) -> dict[str, int]:
    """Return how many of 40 requests get which status from a server with one place and three that wait."""
    with served(model, "--max-batch", "1", "--max-waiting", "3", "--dtype", "float32") as (url, _):
        client = Client(url, Path(model).name)

        def ask(_) -> int:
            response = client.post(client.body(question, stream=False))
            response.read()
            return response.status

        with ThreadPoolExecutor(40) as pool:
            found = Counter(pool.map(ask, range(40)))
        found["afterwards"] = ask(None)
    return {str(status): count for status, count in found.items()}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True, help="folder of an LSM")
    parser.add_argument("--url", help="server that is running already")
    parser.add_argument("--name", help="name of the model at that server")
    parser.add_argument("--clients", type=int, default=64, help="clients at the same time")
    parser.add_argument("--seconds", type=float, default=120, help="duration of the load")
    parser.add_argument("--questions", type=int, default=60, help="different questions")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    asked, llm = questions(args.questions), load(args.model, "float32")
    expected = expected_answers(llm, asked)
    figures: dict = {"machine": describe(torch.device("cpu"))}
    with contextlib.ExitStack() as stack:
        url, pid = args.url, None
        if url is None:
            url, pid = stack.enter_context(served(args.model, "--dtype", "float32"))
        client = Client(url, args.name or Path(args.model).name)
        figures["first_token_of_one_client"] = first_tokens(llm, client, asked)
        figures["one_client"] = load_test(client, asked, expected, 1, min(args.seconds, 30))
        load_test(client, asked, expected, args.clients, 10)  # the first load of each length leaves kernels and caches
        before = memory(pid)
        figures["many_clients"] = load_test(client, asked, expected, args.clients, args.seconds)
        if pid:
            figures["memory_ratios"] = [memory(pid) / before]
            for _ in range(2):
                load_test(client, asked, expected, args.clients, args.seconds)
                figures["memory_ratios"].append(memory(pid) / before)
            figures["refusals"] = refusals(client, asked[0])
            until = time.perf_counter() + min(args.seconds, 30)
            with ThreadPoolExecutor(1) as pool:
                bad = pool.submit(misbehave, client, asked[0], until)
                figures["beside_bad_clients"] = load_test(client, asked, expected, 8, min(args.seconds, 30))
                figures["bad_clients"] = dict(bad.result())
            figures["memory_ratio_after_bad_clients"] = memory(pid) / before
    if pid:
        figures["full_queue"] = full_queue(args.model, asked[0])
    many, one = figures["many_clients"], figures["one_client"]
    figures["throughput_ratio"] = many["answers_per_second"] / one["answers_per_second"]
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
