"""The self-powered set: what is asked of which utterance, what is kept, and what lies on disk afterwards."""

import json
from collections import Counter

import pytest
from datasets import Audio, Dataset, load_dataset

from dataset_builders import self_powered
from dataset_builders.asr_corpora import load_corpus
from dataset_builders.instructions import load_pool
from dataset_builders.responders import LocalResponder
from dataset_builders.self_powered import (
    SELF_POWERED_TASKS,
    TRANSCRIPTION,
    answer,
    build,
    draw_requests,
    reason_to_drop,
)

COLUMNS = ["id", "audio", "transcript", "task", "instruction", "response", "duration", "source", "responder"]
EVENLY = dict.fromkeys(SELF_POWERED_TASKS, 1.0)


@pytest.fixture(scope="module")
def corpus(corpus_dir):
    return load_corpus(corpus_dir, "train")


@pytest.fixture
def chatty(monkeypatch):
    """The LLM's text does not matter here: it answers with the transcript's words backwards."""
    answers = lambda self, requests: [" ".join(transcript.split()[::-1]) for _, transcript in requests]  # noqa: E731
    monkeypatch.setattr(LocalResponder, "respond", answers)


# What is asked


def test_every_utterance_has_one_self_powered_task_and_its_transcription(corpus):
    requests = draw_requests(corpus, EVENLY, seed=0)
    assert [request["row"] for request in requests] == [row for row in range(8) for _ in range(2)]
    for request in requests:
        utterance = corpus[request["row"]]
        assert request["id"] == f"{utterance['id']}/{request['task']}"
        assert request["transcript"] == utterance["transcript"]
        assert request["instruction"] in load_pool()[request["task"]].seen
    assert [request["task"] for request in requests[1::2]] == [TRANSCRIPTION] * 8
    assert all(request["task"] in SELF_POWERED_TASKS for request in requests[::2])


def test_a_draw_is_a_function_of_seed_and_id(corpus):
    requests = {request["id"]: request for request in draw_requests(corpus, EVENLY, seed=0)}
    few = draw_requests(corpus.select([5, 2]), EVENLY, seed=0)
    for request in few:
        assert {**request, "row": None} == {**requests[request["id"]], "row": None}
    assert {request["id"] for request in draw_requests(corpus, EVENLY, seed=1)} != set(requests)


def test_tasks_are_drawn_by_weight_and_wordings_may_be_held_out():
    many = Dataset.from_dict({"id": [f"u{i}" for i in range(900)], "transcript": ["hi"] * 900})
    requests = draw_requests(many, {"intent": 2.0, "keyword": 1.0}, seed=0, paraphrases="held_out")
    counts = Counter(request["task"] for request in requests)
    assert counts[TRANSCRIPTION] == 900
    assert counts["intent"] == pytest.approx(600, abs=50)
    assert counts["keyword"] == 900 - counts["intent"]
    wordings = {request["instruction"] for request in requests if request["task"] == "intent"}
    assert wordings == set(load_pool()["intent"].held_out)


def test_a_task_that_the_pool_lacks_is_refused(corpus):
    with pytest.raises(ValueError, match=r"'singing'.*add a block"):
        draw_requests(corpus, {"singing": 1.0}, seed=0)


# What is kept


@pytest.mark.parametrize(
    ("task", "response", "reason"),
    [
        ("intent", None, "truncated"),
        ("intent", "", "empty"),
        ("intent", "The Farmer sold it", "copy of the transcript"),
        ("repetition", "the farmer sold it", "copy of the transcript"),
        ("intent", "The intent is shopping.", None),
        ("transcription", "the farmer sold it", None),
    ],
)
def test_why_a_response_is_dropped(task, response, reason):
    assert reason_to_drop({"task": task, "transcript": "the farmer sold it"}, response) == reason


def test_what_was_dropped_is_counted_and_told(corpus, caplog):
    class Moody:
        provenance = "{}"

        def respond(self, pairs):
            replies = [None, "", pairs[2][1].upper(), None]
            return replies + [f"about {said}" for _, said in pairs[4:]]

    requests = draw_requests(corpus, {"intent": 1.0}, seed=0)
    kept, dropped = answer(requests, Moody())
    assert dropped == {("intent", "truncated"): 2, ("intent", "empty"): 1, ("intent", "copy of the transcript"): 1}
    assert "intent: dropped 2 rows: truncated" in caplog.text
    assert Counter(row["task"] for row in kept) == {"intent": 4, TRANSCRIPTION: 8}
    for row in kept:
        said = row["transcript"]
        assert row["response"] == (said if row["task"] == TRANSCRIPTION else f"about {said}")


# What lies on disk


@pytest.fixture
def built(chatty, lsm_dir, corpus_dir, tmp_path):
    return build(lsm_dir, corpus_dir, "train", tmp_path / "set")


def test_load_dataset_reads_all_and_every_task(built):
    everything = load_dataset(str(built), "all", split="train")
    assert len(everything) == 16
    counts = Counter(everything["task"])
    assert counts[TRANSCRIPTION] == 8
    for task, count in counts.items():
        part = load_dataset(str(built), task, split="train")
        assert (len(part), set(part["task"])) == (count, {task})
        assert (built / "data" / task / "train.parquet").is_file()


def test_the_columns_are_the_contract(built):
    dataset = load_dataset(str(built), "all", split="train")
    assert dataset.column_names == COLUMNS
    assert dataset.features["audio"] == Audio(16_000)
    kinds = {name: feature.dtype for name, feature in dataset.features.items() if name != "audio"}
    assert kinds == dict.fromkeys(set(COLUMNS) - {"audio"}, "string") | {"duration": "float32"}


def test_audio_is_the_corpus_bytes_and_text_is_what_the_llm_read(built, corpus):
    dataset = load_dataset(str(built), "all", split="train").cast_column("audio", Audio(16_000, decode=False))
    utterances = {row["id"]: row for row in corpus}
    for row in dataset:
        utterance = utterances[row["id"].partition("/")[0]]
        assert row["audio"]["bytes"] == utterance["audio"]["bytes"]
        assert row["duration"] == utterance["duration"]
        assert row["source"] == utterance["source"] == "noise/train"
        said = utterance["transcript"]
        assert row["transcript"] == said
        assert row["response"] == (said if row["task"] == TRANSCRIPTION else " ".join(said.split()[::-1]))


def test_a_row_and_the_card_say_who_answered(built, lsm):
    (provenance,) = load_dataset(str(built), "all", split="train").unique("responder")
    decoding = {"do_sample": False, "max_new_tokens": 225}
    assert json.loads(provenance) == {**lsm.config.responder, "decoding": decoding}
    card = (built / "README.md").read_text()
    assert lsm.config.responder["revision"] in card
    assert "| transcription | 8 |" in card
    assert "- none" in card


def test_the_same_call_gives_the_same_rows(built, chatty, lsm_dir, corpus_dir, tmp_path):
    again = build(lsm_dir, corpus_dir, "train", tmp_path / "again")
    for file in built.rglob("*.parquet"):
        assert (again / file.relative_to(built)).read_bytes() == file.read_bytes()


def test_files_that_the_corpus_only_names_come_along(chatty, lsm_dir, corpus, tmp_path):
    """A manifest of paths becomes a set that can be moved and published."""
    manifest = tmp_path / "manifest"
    manifest.mkdir()
    lines = []
    for row in corpus.select(range(2)):
        (tmp_path / f"{row['id']}.wav").write_bytes(row["audio"]["bytes"])
        lines.append(json.dumps({**row, "audio": str(tmp_path / f"{row['id']}.wav")}))
    (manifest / "train.jsonl").write_text("\n".join(lines))
    output = build(lsm_dir, manifest, "train", tmp_path / "set")
    dataset = load_dataset(str(output), TRANSCRIPTION, split="train")
    for row, utterance in zip(dataset.cast_column("audio", Audio(decode=False)), corpus, strict=False):
        assert row["audio"] == {"bytes": utterance["audio"]["bytes"], "path": f"{utterance['id']}.wav"}


@pytest.mark.parametrize("step", ["write_card", "write", "answer"])
def test_a_crash_leaves_no_output_and_the_next_call_completes(step, chatty, lsm_dir, corpus_dir, tmp_path, monkeypatch):
    original = getattr(self_powered, step)

    def crash(*args):
        original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(self_powered, step, crash)
        with pytest.raises(KeyboardInterrupt):
            build(lsm_dir, corpus_dir, "train", tmp_path / "set", limit=2)
    assert not (tmp_path / "set").exists()
    build(lsm_dir, corpus_dir, "train", tmp_path / "set", limit=2)
    assert [file.name for file in tmp_path.iterdir()] == ["set"]
    assert len(load_dataset(str(tmp_path / "set"), "all", split="train")) == 4


def test_an_output_that_exists_is_refused_before_anything_is_asked(tmp_path):
    with pytest.raises(ValueError, match=r"exists; delete it or name another"):
        build("no-model", "no-corpus", "train", tmp_path)


def test_the_llm_inside_answers(lsm_dir, corpus_dir, tmp_path, caplog):
    """No stub: a random LLM never ends its answers, so the transcriptions alone are kept."""
    output = build(lsm_dir, corpus_dir, "train", tmp_path / "set", max_new_tokens=2, limit=2)
    dataset = load_dataset(str(output), "all", split="train")
    assert dataset["task"][:] == [TRANSCRIPTION] * 2
    assert "× truncated" in (output / "README.md").read_text()


def test_the_command_line(chatty, lsm_dir, corpus_dir, tmp_path, monkeypatch):
    options = ["--tasks", "intent", "keyword", "--limit", "4", "--seed", "3"]
    paths = ["--model", str(lsm_dir), "--corpus", str(corpus_dir), "--output", str(tmp_path / "set")]
    monkeypatch.setattr("sys.argv", ["self_powered", *paths, *options])
    self_powered.main()
    dataset = load_dataset(str(tmp_path / "set"), "all", split="train")
    assert len(dataset) == 8
    assert set(dataset["task"]) <= {"intent", "keyword", TRANSCRIPTION}
