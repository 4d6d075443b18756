"""The server as OpenAI's own client sees it, and as clients that behave badly do."""

import asyncio
import base64
import gc
import http.client
import io
import json
import socket
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import openai
import pytest
import soundfile
import torch
from api_server import Server

from language_models.generation import GREEDY, read_answers
from modeling_lsm import LsmForConditionalGeneration
from recipes.serving import api, downloads
from recipes.serving.api import Api
from recipes.serving.clips import Limits
from recipes.serving.engine import Engine
from recipes.serving.questions import RequestError, read_chat

LIMITS = Limits(body=2_000_000, seconds=40, clips=2, tokens=64, upload_seconds=0.7, answer_seconds=30)
INSTRUCTION = "Transcribe the speech."


@pytest.fixture(scope="module")
def engine(lsm_dir, processor):
    engine = Engine(LsmForConditionalGeneration.from_pretrained(lsm_dir).eval(), processor.tokenizer, 4, 8)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def server(engine, processor):
    with Server(Api(engine, processor, "tiny", INSTRUCTION, LIMITS)) as server:
        yield server


@pytest.fixture
def wav(clip):
    """`wav(seconds)` is a WAV file of noise, in base64."""

    def make(seconds: float) -> str:
        file = io.BytesIO()
        soundfile.write(file, clip(seconds), 16_000, format="WAV", subtype="FLOAT")
        return base64.b64encode(file.getvalue()).decode()

    return make


def question(data: str, instruction: str = "what is said?") -> list[dict]:
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return [{"role": "user", "content": [{"type": "text", "text": instruction}, audio]}]


@torch.no_grad()
def answer_alone(engine, processor, instruction: str, audio, tokens: int) -> str:
    content = [{"type": "text", "text": instruction}, {"type": "audio", "audio": audio}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = engine.model.generate(**inputs, **GREEDY, max_new_tokens=tokens, pad_token_id=0)
    return read_answers(processor.tokenizer, output[:, inputs["input_ids"].shape[1] :].tolist())[0]


def test_an_answer_whole_and_streamed(server, engine, processor, wav, clip):
    expected = answer_alone(engine, processor, "what is said?", clip(2), 9)
    settings = {"model": "tiny", "messages": question(wav(2)), "max_tokens": 9}
    whole = server.client().chat.completions.create(**settings)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 9
    chunks = list(
        server.client().chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage


def test_a_data_uri_and_a_conversation_of_several_turns(server, wav):
    messages = question(wav(1))
    first = server.client().chat.completions.create(model="tiny", messages=messages, max_tokens=5)
    uri = {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{wav(1)}"}}
    same = [{"role": "user", "content": [messages[0]["content"][0], uri]}]
    assert server.client().chat.completions.create(model="tiny", messages=same, max_tokens=5).choices == first.choices
    more = [*messages, {"role": "assistant", "content": "hm"}, {"role": "user", "content": "and then?"}]
    answer = server.client().chat.completions.create(model="tiny", messages=more, max_tokens=5)
    assert answer.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_transcription_whole_streamed_and_as_text(server, engine, processor, wav, clip):
    expected = answer_alone(engine, processor, INSTRUCTION, clip(1), LIMITS.tokens)
    file = ("clip.wav", base64.b64decode(wav(1)))
    ask = server.client().audio.transcriptions.create
    assert ask(model="tiny", file=file).text == expected
    assert ask(model="tiny", file=file, response_format="text").strip() == expected
    events = list(ask(model="tiny", file=file, stream=True))
    assert events[-1].text == expected == "".join(event.delta for event in events[:-1])


def test_models_health_and_metrics(server):
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    assert server.client().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="There is no model 'other'; this server has 'tiny'"):
        server.client().models.retrieve("other")
    for path, text in {"/health": "ok", "/metrics": 'lsm_requests_total{route="models",status="200"}'}.items():
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", path)
        assert text in connection.getresponse().read().decode()


@pytest.mark.parametrize(
    "changes, status, message",
    [
        ({"model": "gpt-4o-audio"}, 404, "There is no model 'gpt-4o-audio'"),
        ({"n": 2}, 400, "n=2 is not supported"),
        ({"logprobs": True}, 400, "logprobs=true is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools=.* is not supported"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty=0.5 is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format=.* is not supported"),
        ({"guided_regex": "a+"}, 400, "'guided_regex' is not supported"),
        ({"max_tokens": 65}, 400, "'max_tokens' must be an integer from 1 to 64, got 65"),
        ({"max_tokens": True}, 400, "'max_tokens' must be an integer"),
        ({"temperature": -1}, 400, "'temperature' must be a number from 0 to 2, got -1"),
        ({"top_p": "all"}, 400, "'top_p' must be a number"),
        ({"seed": 2**70}, 400, "'seed' must be an integer of 64 bits"),
        ({"stop": ["a"] * 5}, 400, "'stop' must be a text, or a list of up to 4 texts"),
        ({"stream": "yes"}, 400, "'stream' must be true or false"),
        ({"stream_options": {"x": 1}}, 400, "'stream_options' may have only 'include_usage'"),
        ({"messages": []}, 400, "'messages' must be a list with at least one message"),
        ({"messages": "hello"}, 400, "'messages' must be a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, r"messages\[0\] must have a role among"),
        ({"messages": [{"role": "user"}]}, 400, r"messages\[0\].content must be a text or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "has the type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "needs its data"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "http://a"}}]}]},
            400,
            "reads no URLs",
        ),
        ({"messages": question("aGVsbG8=")}, 400, "The clip cannot be read as audio"),
        ({"messages": question("no base64")}, 400, r"messages\[0\].content\[1\]: The clip is not base64"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "but the LLM has 2048 positions"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, 400, r"messages\[0\] must have a role among"),
        ({"messages": [{"role": {}, "content": "x"}]}, 400, r"messages\[0\] must have a role among"),
        ({"temperature": 10**400}, 400, "'temperature' must be a number from 0 to 2, got 1000"),
        ({"max_tokens": 1e18}, 400, r"'max_tokens' must be an integer from 1 to 64, got 1e\+18"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(server, wav, changes, status, message):
    body = {"model": "tiny", "messages": question(wav(0.5)), "max_tokens": 3, **changes}
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        server.client().post("/chat/completions", body=body, cast_to=object)
    assert refused.value.status_code == status
    assert refused.value.body["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_too_much_is_refused(server, wav):
    part = question(wav(0.2))[0]["content"][1]
    three = [{"role": "user", "content": [part] * 3}]
    for messages, message in (
        (three, "more than 2 clips"),
        (question(wav(0.2) * 0 + _minutes()), "takes clips of up to 40 s"),
    ):
        with pytest.raises(openai.APIStatusError, match=message) as refused:
            server.client().chat.completions.create(model="tiny", messages=messages)
        assert refused.value.status_code == 413
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("content-length", str(10**10))  # nothing of it is read
    connection.endheaders()
    assert connection.getresponse().status == 413


def _minutes() -> str:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8_000 * 120, np.int16), 8_000, format="FLAC")
    return base64.b64encode(file.getvalue()).decode()


HI = b'"messages": [{"role": "user", "content": "hi"}]'


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{%b, "\\ud800": 1}' % HI,
        b'{%b, "temperature": "%b"}' % (HI, b"a" * 10_000),
        b'{%b, "%b": 1}' % (HI, b"a" * 10_000),
        b'{%b, "max_tokens": %b}' % (HI, b"9" * 4_000),
        b'{%b, "tools": %b}' % (HI, b"[" * 940 + b"]" * 940),
        b'{%b, "seed": %b}' % (HI, b"[" * 940 + b"]" * 940),
        b'{%b, "temperature": 1%b}' % (HI, b"0" * 5_000),
    ],
    ids=lambda body: body[:80].decode() + "...",
)
def test_what_no_field_may_be_is_refused_in_few_words(server, body):
    status, content = server.post(body)
    assert status == 400 and len(json.dumps(content)) < 400
    assert content["error"]["type"] == "invalid_request_error"


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(server, monkeypatch):
    monkeypatch.setattr(server.api.processor, "apply_chat_template", lambda *args, **kwargs: pytest.fail("rendered"))
    longest = server.api.longest * 2048
    for content in ("x" * longest, [{"type": "text", "text": ""}] * (longest + 1)):
        with pytest.raises(
            openai.BadRequestError, match=r"has \d+ characters, but the LLM has 2048 positions of up to"
        ):
            server.client().chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": content}], max_tokens=1
            )


def test_not_a_number_is_no_temperature(server):
    status, content = server.post(b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}')
    assert (status, content["error"]["param"]) == (400, "temperature")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[1]", b'"text"', b"[" * 100_000])
def test_bodies_that_are_no_json(server, body):
    status, content = server.post(body)
    assert status == 400
    assert content["error"]["message"].startswith("The body")


def test_a_form_needs_a_file(server):
    assert server.post(b"{}", "/v1/audio/transcriptions")[0] == 400
    form = b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\nhello\r\n--x--\r\n'
    status, content = server.post(
        form, "/v1/audio/transcriptions", **{"content-type": "multipart/form-data; boundary=x"}
    )
    assert (status, content["error"]["message"]) == (400, "'file' must be an audio file.")
    assert server.post(b"nonsense", "/v1/audio/transcriptions", **{"content-type": "multipart/form-data"})[0] == 400
    form = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nhello\r\n'
    for name, value in ((b"\\ud800", b"1"), (b"stream", b"yes"), (b"temperature", b"a" * 10_000)):
        field = b'--x\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n--x--\r\n' % (name, value)
        kind = {"content-type": "multipart/form-data; boundary=x; charset=unicode_escape"}
        status, content = server.post(form + field, "/v1/audio/transcriptions", **kind)
        assert status == 400 and len(content["error"]["message"]) < 200
    with pytest.raises(openai.BadRequestError, match="'language' is not supported"):
        server.client().audio.transcriptions.create(model="tiny", file=("a.wav", b"x"), language="en")


def test_an_upload_that_does_not_arrive_is_given_up(server):
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
        assert half.recv(100).startswith(b"HTTP/1.1 408")
    assert server.api.requests == 0


@pytest.fixture
def gate(server, monkeypatch):
    """Decoding waits at a gate: `gate.entered` is set when a clip is there, and `gate.open` lets all go on."""
    inputs, gate = server.api._inputs, SimpleNamespace(entered=threading.Event(), open=threading.Event())

    def wait(*args):
        gate.entered.set()
        gate.open.wait(20)
        return inputs(*args)

    monkeypatch.setattr(server.api, "_inputs", wait)
    yield gate
    gate.open.set()


def send(server, body: dict) -> socket.socket:
    """Send a request, and return its connection."""
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(content)}\r\n\r\n".encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head + content)
    return connection


def wait_for(condition) -> bool:
    until = time.monotonic() + 20
    while not (met := condition()) and time.monotonic() < until:
        time.sleep(0.005)
    return met


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(server, engine, wav, stream):
    with send(server, {"messages": question(wav(1)), "max_tokens": 64, "stream": stream}):
        assert wait_for(lambda: engine.running)
    assert wait_for(lambda: not engine.running and not engine.waiting and not server.api.requests)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_clip_is_decoded_frees_its_place(server, engine, wav, gate, stream, monkeypatch):
    submitted = []
    monkeypatch.setattr(engine, "submit", submitted.append)
    body = {"messages": question(wav(1)), "max_tokens": 64, "stream": stream}
    with send(server, body), send(server, body), send(server, body):  # the last one waits for a decoder
        assert gate.entered.wait(20) and wait_for(lambda: server.api.requests == 3)
    assert wait_for(lambda: not server.api.requests)
    gate.open.set()
    server.api.workers.submit(int).result(20)  # what was decoded is there by now
    assert not submitted


def test_a_stream_that_is_left_before_its_first_event_frees_its_place(engine, processor, wav):
    """The server knows that the client has left when the answer begins, so that none of its events is asked for."""
    served, submitted = Api(engine, processor, "tiny", INSTRUCTION, LIMITS), []
    body = json.dumps({"messages": question(wav(0.5)), "max_tokens": 64, "stream": True}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}

    async def ask():
        arrived = asyncio.Queue()
        arrived.put_nowait({"type": "http.request", "body": body})
        submit = engine.submit

        def submit_and_leave(job):
            submit(job)
            submitted.append(job)
            arrived.put_nowait({"type": "http.disconnect"})
            arrived.put_nowait({"type": "http.disconnect"})

        async def send(message):
            await asyncio.sleep(0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "submit", submit_and_leave)
            await served.app({**scope, "app": served.app}, arrived.get, send)

    asyncio.run(ask())
    assert [job.cancelled for job in submitted] == [True]
    assert wait_for(lambda: not engine.running and not engine.waiting)


def test_what_a_request_held_is_freed_with_it(server, engine, wav, monkeypatch):
    """Its clips and its body, without a collection, which may be minutes away. An error knows the frames that have
    them."""
    kept, submit = [], engine.submit

    def submit_and_keep(job):
        kept.append(weakref.ref(job))
        submit(job)

    def refuse(files, limits):
        error = RequestError("refused")
        kept.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    monkeypatch.setattr(engine, "submit", submit_and_keep)
    monkeypatch.setattr("recipes.serving.engine.give_back_memory", lambda: None)  # it collects
    monkeypatch.setattr(
        api, "read_chat", lambda body, limits: refuse(body, limits) if "n" in body else read_chat(body, limits)
    )
    gc.collect()
    gc.disable()
    try:
        for stream in (True, False):
            body = {"messages": question(wav(1)), "max_tokens": 3, "stream": stream}
            with send(server, body) as connection:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
                assert wait_for(lambda: not engine.running and not server.api.requests)
        assert server.post(b'{"n": 1}')[0] == 400
        assert len(kept) == 3 and wait_for(lambda: not any(held() for held in kept))
    finally:
        gc.enable()


def test_slow_urls_hold_nobody_else_up(engine, processor, wav, monkeypatch):
    async def connected_to(host, port):
        return host, port

    monkeypatch.setattr(downloads, "_connected_to", connected_to)
    limits = Limits(urls=True, upload_seconds=5)
    with (
        socket.create_server(("127.0.0.1", 0)) as slow,  # it takes connections, and says nothing
        Server(Api(engine, processor, "tiny", INSTRUCTION, limits)) as server,
    ):
        url = {"type": "audio_url", "audio_url": {"url": f"http://127.0.0.1:{slow.getsockname()[1]}/"}}
        clients = [send(server, {"messages": [{"role": "user", "content": [url]}]}) for _ in range(3)]
        slow.settimeout(20)
        asked = [slow.accept()[0] for _ in clients]
        assert all(connection.recv(1_000).startswith(b"GET / HTTP") for connection in asked)
        assert server.client().chat.completions.create(model="tiny", messages=question(wav(0.5)), max_tokens=2).choices
        assert server.api.requests == 3
        clients[0].close()  # who leaves gives the download up
        asked[0].settimeout(20)
        assert asked[0].recv(1) == b""
        for connection in (*clients, *asked):
            connection.close()
        assert wait_for(lambda: not server.api.requests)


def test_an_answer_that_takes_too_long(engine, processor, wav):
    with Server(Api(engine, processor, "tiny", INSTRUCTION, Limits(answer_seconds=0.05))) as server:
        settings = {"model": "tiny", "messages": question(wav(30)), "max_tokens": 1000}
        with pytest.raises(openai.APIStatusError, match="The answer took too long") as late:
            server.client().chat.completions.create(**settings)
        assert late.value.status_code == 504


def test_a_full_server_says_so(engine, processor, wav):
    with Server(Api(engine, processor, "tiny", INSTRUCTION, LIMITS)) as server:
        server.api.requests = server.api.most_requests
        with pytest.raises(openai.RateLimitError, match="12 requests are being served already"):
            server.client().chat.completions.create(model="tiny", messages=question(wav(0.5)))


def test_a_key_is_asked_for(engine, processor, wav):
    with Server(Api(engine, processor, "tiny", INSTRUCTION, LIMITS, key="secret")) as server:
        for key in ("other", "é", ""):
            assert server.post(b"{}", authorization=f"Bearer {key}".encode())[0] == 401
        with pytest.raises(openai.AuthenticationError, match="The API key is missing or wrong") as refused:
            server.client("other").models.list()
        assert "secret" not in str(refused.value)
        assert server.client("secret").models.list().data


def test_a_fault_of_the_server_is_logged_and_not_told(server, wav, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise KeyError("/home/someone/secret")

    monkeypatch.setattr(server.api, "_inputs", fail)
    with pytest.raises(openai.InternalServerError, match="The server failed; its log says why") as error:
        server.client().chat.completions.create(model="tiny", messages=question(wav(0.5)))
    assert "secret" not in str(error.value)
    assert "/home/someone/secret" in caplog.text


def test_a_failure_of_the_model_is_told_in_a_stream(server, engine, wav, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory at 0x7f")

    monkeypatch.setattr(engine, "_choose", fail)
    stream = server.client().chat.completions.create(model="tiny", messages=question(wav(0.5)), stream=True)
    with pytest.raises(openai.APIError, match="The server failed"):
        list(stream)
