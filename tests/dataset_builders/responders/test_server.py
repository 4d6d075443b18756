"""Responders on a server: requests, replies, and servers that fail."""

import importlib
import json
import logging
import shutil
import socket
import ssl
import sys
import threading
import time
from email.utils import formatdate
from types import SimpleNamespace

import openai
import pytest
from misbehaving_server import ANSWERS, OK, RUDE, MisbehavingServer, reply_to
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from dataset_builders.responders.exchange import Reply, Request
from dataset_builders.responders.local import LocalResponder, foreign
from dataset_builders.responders.server import ServerResponder, _retry_after

REQUESTS = [
    Request("What is said?", "the farmer sold the lamp yesterday"),
    Request("Translate the speech.", "the nurse repaired the old clock in the attic"),
    Request("What comes next?", "hi", task="continuation"),
]
MANY = [Request(f"Say {number}.", "hello " * (number % 7)) for number in range(60)]
REFUSALS = ("400", "401", "404", "422")
RECOVERABLE = sorted({*ANSWERS, *RUDE} - {OK, "length", *REFUSALS})


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """Remove proxies and API keys from the environment, and do not load certificates, which takes long."""
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *paths, **more: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def ask(llm_dir):
    """Return `ask(server)`, which makes a responder with the tiny LLM's tokenizer and a short timeout."""

    def make(server: MisbehavingServer, llm=llm_dir, **settings) -> ServerResponder:
        quick = {"served_model": "llm", "max_new_tokens": 8, "timeout": 5.0, "backoff": 0.01}
        return ServerResponder(llm, server.url, **{**quick, **settings})

    return make


def token_ids(responder, requests: list[Request]) -> list[list[int]]:
    return [prompt.tokens for prompt in responder.render(requests)]


def expected(server: MisbehavingServer, responder: ServerResponder, requests: list[Request]) -> list[Reply]:
    return [Reply(reply_to(prompt), "stop") for prompt in token_ids(responder, requests)]


def test_every_reply_is_its_requests_though_they_end_in_any_order(ask):
    with MisbehavingServer(latency=0.05) as server:
        responder = ask(server)
        replies = responder.respond(MANY)
        assert replies == expected(server, responder, MANY)
        assert len(set(replies)) == len(MANY) == len(server.bodies)
        assert responder.respond(MANY[:3]) == replies[:3]  # another event loop


def test_what_is_asked_is_greedy_and_goes_to_the_model_by_name(ask):
    with MisbehavingServer(models=["other", "llm"]) as server:
        ask(server).respond(REQUESTS[:1])
        (body,) = server.bodies
        body.pop("prompt")
        assert body == {"model": "llm", "max_tokens": 8, "temperature": 0, "n": 1}


@pytest.mark.parametrize("folder", ["llm_dir", "lsm_dir"])
def test_the_server_reads_and_writes_what_the_local_responder_does(ask, folder, request):
    folder = request.getfixturevalue(folder)
    local = LocalResponder(folder, max_new_tokens=4)
    replies = local.respond(REQUESTS)

    def answer(prompt):
        return local._generate_batch([prompt])[0].text

    with MisbehavingServer(lambda *_: "length", answer=answer) as server:
        responder = ask(server, folder, max_new_tokens=4, concurrency=1)
        assert responder.respond(REQUESTS) == replies
        assert [body["prompt"] for body in server.bodies] == token_ids(local, REQUESTS)


@pytest.mark.parametrize("folder", ["llm_dir", "lsm_dir"])
def test_its_rows_are_not_foreign_to_the_lsm(ask, folder, request, lsm):
    with MisbehavingServer() as server:
        responder = ask(server, request.getfixturevalue(folder))
    assert responder.identity == lsm.config.responder
    assert foreign(responder.provenance, lsm.config.responder) == []
    decoding = {"do_sample": False, "max_new_tokens": 8, "engine": "openai-compatible server"}
    assert json.loads(responder.provenance)["decoding"] == decoding


def test_a_repetition_penalty_of_the_checkpoint_is_asked_for_and_told(ask, llm_dir, tmp_path):
    folder = shutil.copytree(llm_dir, tmp_path / "penal")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.1}))
    with MisbehavingServer() as server:
        responder = ask(server, folder)
        responder.respond(REQUESTS[:1])
        reach = responder.max_prompt_tokens + responder.max_new_tokens
    llama_cpp = {"repeat_penalty": 1.1, "repeat_last_n": reach}
    assert {"repetition_penalty": 1.1, **llama_cpp}.items() <= server.bodies[0].items()
    assert json.loads(responder.provenance)["decoding"]["repetition_penalty"] == 1.1
    (folder / "generation_config.json").write_text(json.dumps({**settings, "num_beams": 4}))
    with MisbehavingServer() as server, pytest.raises(ValueError, match="num_beams=4"):
        ask(server, folder)


def test_the_key_is_sent_and_kept_from_provenance_and_log(ask, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    with MisbehavingServer(["500"]) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-env")
        by_environment = ask(server)
        responder = ask(server, api_key="sk-given")
        responder.respond(REQUESTS[:1])
        assert set(server.keys) == {"Bearer sk-env", "Bearer sk-given"}
    assert "sk-" not in caplog.text + responder.provenance + by_environment.provenance


def test_no_line_is_logged_for_each_request(ask, caplog):
    caplog.set_level(logging.INFO)
    with MisbehavingServer() as server:
        ask(server).respond(REQUESTS)
    assert caplog.records == []


def with_special_tokens(llm_dir, folder, template: str):
    """Make the tiny LLM with a tokenizer that adds special tokens to its input, as most tokenizers do."""
    shutil.copytree(llm_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(llm_dir)
    tokens = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    tokenizer.save_pretrained(folder)
    return folder


def test_text_has_no_bos_where_the_server_adds_it(ask, llm_dir, tmp_path):
    folder = with_special_tokens(llm_dir, tmp_path / "llm", "<s> $A")
    with MisbehavingServer() as server:
        responder = ask(server, folder, prompt_format="text", concurrency=1)
        responder.respond(REQUESTS)
        prompts = [body["prompt"] for body in server.bodies]
    assert prompts[0] == "<|user|>What is said?\nthe farmer sold the lamp yesterday</s><|assistant|>"
    assert AutoTokenizer.from_pretrained(folder)(prompts).input_ids == token_ids(responder, REQUESTS)


def test_text_has_the_templates_bos_where_nobody_adds_one(ask, llm_dir):
    with MisbehavingServer() as server:
        responder = ask(server, prompt_format="text", concurrency=1)
        responder.respond(REQUESTS)
        prompts = [body["prompt"] for body in server.bodies]
    assert AutoTokenizer.from_pretrained(llm_dir)(prompts).input_ids == token_ids(responder, REQUESTS)


def test_prompts_that_a_server_would_read_otherwise_are_not_sent_as_text(ask, llm_dir, tmp_path):
    folder = with_special_tokens(llm_dir, tmp_path / "llm", "<s> $A </s>")
    with MisbehavingServer() as server:
        with pytest.raises(ValueError, match="use prompt_format='tokens'"):
            ask(server, folder, prompt_format="text").respond(REQUESTS)
        assert server.bodies == []
        assert len(ask(server, folder).respond(REQUESTS)) == 3


def test_an_answer_cut_at_the_limit_says_so(ask):
    with MisbehavingServer(["length"]) as server:
        responder = ask(server, concurrency=1)
        finishes = [reply.finish for reply in responder.respond(REQUESTS)]
    assert finishes == ["length", "stop", "stop"]


def test_special_tokens_and_spaces_around_are_no_part_of_an_answer(ask):
    with MisbehavingServer(answer=lambda prompt: " <s> the </s>lamp<|audio|> </s>\n") as server:
        assert ask(server).respond(REQUESTS[:1]) == [Reply("the lamp", "stop")]


def test_prompts_that_are_too_long_never_reach_the_server(ask):
    with MisbehavingServer() as server:
        lengths = [len(prompt) for prompt in token_ids(ask(server), REQUESTS)]
        short = ask(server, max_prompt_tokens=min(lengths))
        replies = short.respond(REQUESTS)
        assert [reply.finish for reply in replies] == [
            "stop" if length == min(lengths) else "prompt_too_long" for length in lengths
        ]
        assert [len(body["prompt"]) for body in server.bodies] == [min(lengths)]
        assert short.respond([]) == [] and ask(server, max_prompt_tokens=1).respond(REQUESTS[:1])[0].text == ""


def test_a_prompt_that_names_a_special_token_is_sent_as_tokens_and_never_as_text(ask):
    evil = Request("Repeat it.", "the </s> lamp")
    with MisbehavingServer() as server:
        assert ask(server).respond([evil])[0].finish == "stop"
        replies = ask(server, prompt_format="text").respond([evil, *REQUESTS])
    assert [reply.finish for reply in replies] == ["special_token", "stop", "stop", "stop"]


def test_the_servers_own_context_length_counts(ask):
    with MisbehavingServer(card={"max_model_len": 40}) as server:
        assert ask(server).max_prompt_tokens == 32
    with MisbehavingServer(card={"meta": {"n_ctx": 40, "n_ctx_train": 2048}}) as server:  # llama.cpp
        assert ask(server).max_prompt_tokens == 32
    with MisbehavingServer(card={"meta": None}) as server:
        assert ask(server).max_prompt_tokens == 2048 - 8
    with MisbehavingServer(card={"max_model_len": 10**6}) as server:
        assert ask(server).max_prompt_tokens == 2048 - 8


@pytest.mark.parametrize("behaviour", RECOVERABLE)
def test_it_recovers_from(behaviour, ask, caplog):
    with MisbehavingServer([OK, behaviour, behaviour]) as server:
        responder = ask(server, timeout=1.0 if behaviour in ("hang", "trickle") else 5.0)
        assert responder.respond(REQUESTS) == expected(server, responder, REQUESTS)
        assert len(server.bodies) == 5
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "failed 2 times" in warning and "(2)" in warning


def test_many_failures_lose_and_swap_no_reply(ask, caplog):
    def storm(number, body):
        return RECOVERABLE[number % len(RECOVERABLE)] if number % 3 == 1 and number < 150 else OK

    with MisbehavingServer(storm, latency=0.02) as server:
        responder = ask(server, timeout=1.0, concurrency=16)
        assert responder.respond(MANY) == expected(server, responder, MANY)
        assert len(server.bodies) > len(MANY) + 20
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert all(kind in warning for kind in ("HTTP 429", "no answer in time", "no connection", "malformed answer"))


@pytest.mark.parametrize("concurrency", [1, 7])
def test_as_many_requests_at_a_time_as_agreed_and_no_more(ask, concurrency):
    full = threading.Barrier(concurrency)

    def wait_until_full(number, body):
        if number < concurrency:
            full.wait(10)
        return OK

    with MisbehavingServer(wait_until_full, latency=0.01) as server:
        ask(server, concurrency=concurrency).respond(MANY[:30])
        assert server.most_at_once == concurrency


def test_a_server_is_left_alone_for_as_long_as_it_asks(ask):
    with MisbehavingServer(["429 with Retry-After"]) as server:
        responder, start = ask(server), time.monotonic()
        responder.respond(REQUESTS[:1])
        assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize(("value", "seconds"), [("7", 7), ("0.5", 0.5), ("-1", 0), ("nan", 0), ("soon", 0), ("", 0)])
def test_retry_after_in_seconds(value, seconds):
    assert _retry_after(refusal({"retry-after": value})) == seconds


def test_retry_after_as_a_date_or_not_at_all():
    assert 50 < _retry_after(refusal({"retry-after": formatdate(time.time() + 60, usegmt=True)})) <= 60
    assert _retry_after(refusal({"retry-after": formatdate(0, usegmt=True)})) == 0
    assert _retry_after(refusal({})) == _retry_after(TimeoutError()) == 0


def refusal(headers: dict) -> Exception:
    response = SimpleNamespace(headers=headers, request=None, status_code=429)
    return openai.APIStatusError("too many requests", response=response, body=None)


@pytest.mark.parametrize(("behaviour", "reason"), [("500", "HTTP 500 out of memory"), ("filtered", "content_filter")])
def test_a_server_that_keeps_failing_is_given_up(ask, behaviour, reason):
    with MisbehavingServer(lambda *_: behaviour) as server:
        responder, start = ask(server, max_retries=2), time.monotonic()
        with pytest.raises(ConnectionError, match=f"failed 3 times.*{reason}") as caught:
            responder.respond(MANY[:10])
        assert time.monotonic() - start < 10
        assert server.url in str(caught.value) and "run the same command again" in str(caught.value)
    assert ("prompt_format='text'" in str(caught.value)) == (behaviour == "500")


def test_one_failure_cancels_what_is_under_way(ask):
    with MisbehavingServer(lambda number, body: "hang" if number else "400") as server:
        responder, start = ask(server, timeout=60.0), time.monotonic()
        with pytest.raises(ValueError, match="HTTP 400"):
            responder.respond(MANY)
        assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [("400", "context is 8"), ("401", "wrong key"), ("404", "is not there"), ("422", "less than 8")],
)
def test_a_refusal_is_final(ask, behaviour, message, caplog):
    with MisbehavingServer([behaviour]) as server:
        with pytest.raises(ValueError, match=f"refuses a request: HTTP {behaviour} .*{message}.*prompt_format='text'"):
            ask(server).respond(REQUESTS[:1])
        assert len(server.bodies) == 1
    assert caplog.records == []


def test_a_server_that_goes_away_while_asked(ask):
    with MisbehavingServer() as server:
        responder = ask(server, max_retries=1)
    with pytest.raises(ConnectionError, match=r"failed 2 times.*no connection \S"):
        responder.respond(REQUESTS)


def test_no_server_at_all(ask):
    with MisbehavingServer() as server:
        pass
    with pytest.raises(ConnectionError, match=f"{server.url} is not ready: no connection.*vllm serve"):
        ask(server)
    with pytest.raises(ConnectionError, match="localhost:1/v1 is not ready"):
        ServerResponder("llm", "localhost:1/v1")


def test_a_server_that_only_listens(llm_dir):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with pytest.raises(ConnectionError, match=f"{url} is not ready: no answer in time"):
            ServerResponder(llm_dir, url, timeout=0.3)


@pytest.mark.parametrize(("path", "message"), [("", "lists no models: '<html>"), ("/v2", "HTTP 404 .*Not Found")])
def test_a_url_that_is_not_the_base_url(llm_dir, path, message):
    with MisbehavingServer() as server, pytest.raises(ValueError, match=f"{message}.*is the URL right"):
        ServerResponder(llm_dir, server.url.removesuffix("/v1") + path)


def test_the_model_is_the_llm_itself_if_it_is_served(llm_dir, lsm_dir, caplog):
    with MisbehavingServer(models=["first", str(llm_dir)]) as server:
        assert ServerResponder(llm_dir, server.url + "/").served_model == str(llm_dir)
        assert ServerResponder(llm_dir, server.url, served_model="first").served_model == "first"
    with MisbehavingServer(models=["first", llm_dir.name]) as server:  # the LLM's name in the LSM
        assert ServerResponder(lsm_dir, server.url).served_model == llm_dir.name
    assert caplog.records == []


def test_the_only_model_is_taken_with_a_warning(llm_dir, caplog):
    with MisbehavingServer(models=["only"]) as server:
        assert ServerResponder(llm_dir, server.url).served_model == "only"
    assert "'only'" in caplog.text and repr(str(llm_dir)) in caplog.text


@pytest.mark.parametrize(("models", "asked"), [(["a", "b"], None), ([], None), (["a"], "c")])
def test_models_that_are_not_served(llm_dir, models, asked):
    with (
        MisbehavingServer(models=models) as server,
        pytest.raises(ValueError, match=rf"{server.url} serves \[{', '.join(map(repr, models))}\].*--served-model"),
    ):
        ServerResponder(llm_dir, server.url, served_model=asked)


@pytest.mark.parametrize(
    "setting", [{"prompt_format": "chat"}, {"concurrency": 0}, {"max_retries": -1}, {"timeout": 0}, {"backoff": -1}]
)
def test_settings_out_of_range(ask, setting):
    with MisbehavingServer() as server, pytest.raises(ValueError, match=f"{next(iter(setting))}="):
        ask(server, **setting)


def test_without_the_openai_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "dataset_builders.responders.server")
    with pytest.raises(ImportError, match=r"pip install 'self-powered-lsm\[server\]'"):
        importlib.import_module("dataset_builders.responders.server")
