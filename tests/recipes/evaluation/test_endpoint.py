"""A model behind a server is evaluated as it is without one."""

import pyarrow.parquet as pq
import pytest
from api_server import Server

from modeling_lsm import LsmForConditionalGeneration
from recipes import evaluate
from recipes.listening.served_llm import ServedLLM
from recipes.serving.api import Api
from recipes.serving.clips import Limits
from recipes.serving.engine import Engine


@pytest.fixture(scope="module")
def server(lsm_dir, processor):
    engine = Engine(LsmForConditionalGeneration.from_pretrained(lsm_dir).eval(), processor.tokenizer)
    engine.start()
    with Server(Api(engine, processor, "tiny", "Transcribe the speech.")) as server:
        yield server
    engine.stop()


@pytest.fixture
def evaluated(corpus_dir, tmp_path, monkeypatch):
    """Return `evaluated(name, *options)`, which evaluates and returns the predictions by system and id."""

    def run(name: str, *options: str) -> dict:
        output = str(tmp_path / name)
        data = [f"nano={corpus_dir}", "nano.split=train"]
        fixed = ["--tasks", "nano", "--data", *data, "--limit", "3", "--max-new-tokens", "6", "--output", output]
        monkeypatch.setattr("sys.argv", ["evaluate", *fixed, "--systems", "model", "silence", *options])
        evaluate.main()
        rows = pq.read_table(f"{output}/predictions.parquet").to_pylist()
        return {(row["task"], row["system"], row["id"]): (row["response"], row["finished"]) for row in rows}

    return run


def test_an_endpoint_gives_the_answers_of_its_checkpoint(server, evaluated, lsm_dir):
    url = f"http://127.0.0.1:{server.port}/v1"
    served = evaluated("served", "--endpoint", url, "--instruction-first")
    here = evaluated("here", "--model", str(lsm_dir), "--dtype", "float32")
    assert served == here
    assert len(served) > 6


def test_answers_of_another_order_are_not_reused(server, evaluated):
    url = f"http://127.0.0.1:{server.port}/v1"
    evaluated("order", "--endpoint", url)
    with pytest.raises(ValueError, match="holds answers with another endpoint"):
        evaluated("order", "--endpoint", url, "--instruction-first")


def test_endpoints_that_cannot_be_used(server, evaluated, lsm_dir, capsys):
    url = f"http://127.0.0.1:{server.port}/v1"
    with pytest.raises(ValueError, match=r"serves \['tiny'\] and not 'other'; name one of them with --endpoint-model"):
        evaluated("other", "--endpoint", url, "--endpoint-model", "other")
    with pytest.raises(ConnectionError, match="cannot be reached: .* Start the server first"):
        ServedLLM("http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="lists no models"):
        ServedLLM(f"{url}/nowhere")
    with pytest.raises(SystemExit):
        evaluated("both", "--endpoint", url, "--model", str(lsm_dir))
    assert "exclude each other" in capsys.readouterr().err


def test_a_clip_alone_is_sent_without_an_empty_text(server, clip):
    llm = ServedLLM(f"http://127.0.0.1:{server.port}/v1")
    row = {"instruction": "", "audio": clip(1), "transcript": "it was here"}
    assert [part["type"] for part in llm._content(row, "audio")] == ["input_audio"]
    assert llm._content(row, "transcript") == [{"type": "text", "text": "it was here"}]
    assert llm.respond([row], max_new_tokens=3)[0].finish == "length"


def test_refusals_and_failures_are_told_apart(server, clip, monkeypatch):
    llm = ServedLLM(f"http://127.0.0.1:{server.port}/v1")
    llm._access["max_retries"] = 0
    row = {"instruction": "what is said?", "audio": clip(1)}
    assert llm.respond([row | {"transcript": "it was here"}], "transcript", max_new_tokens=3)[0].finish == "length"
    with pytest.raises(ValueError, match="refuses a request: .*'max_tokens' must be"):
        llm.respond([row], max_new_tokens=10**6)
    monkeypatch.setattr(server.api, "most_requests", 0)
    with pytest.raises(ConnectionError, match="fails: .*already.*Run the same command again"):
        llm.respond([row])
    assert Limits().tokens < 10**6
