"""The commands, and the `datasets` builder."""

import json
import re
import sys

import pytest
from datasets import Audio, load_dataset
from misbehaving_server import MisbehavingServer

from dataset_builders import self_powered
from dataset_builders.inspection import COLUMNS
from dataset_builders.instructions import TRANSCRIPTION
from dataset_builders.nano.tasks import POOL_PATH
from dataset_builders.self_powered import BuildArguments, SelfPoweredBuilder, main


@pytest.fixture
def command(monkeypatch):
    """Return `command("build", "--corpus", ...)`, which runs `python -m dataset_builders.self_powered build --corpus
    ...`."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["self_powered", *map(str, arguments)])
        main()

    return run


@pytest.fixture
def answering(monkeypatch, backwards):
    monkeypatch.setattr(BuildArguments, "load_responder", lambda self: backwards)


def undecoded(folder, config="all"):
    return load_dataset(str(folder), config, split="train").cast_column("audio", Audio(decode=False))


def test_build_inspect_export_import(command, answering, corpus_dir, tmp_path, capsys):
    folder = tmp_path / "story"
    command(
        "build", "--corpus", corpus_dir, "--llm", "any", "--output", folder, "--seed", 3, "--tasks-per-utterance", 2
    )
    rows = undecoded(folder).to_list()
    assert len(rows) == 16

    command("inspect", folder, "--samples", 1)
    assert "16" in capsys.readouterr().out
    assert (folder / "inspect.html").read_text().count("<audio") == len({row["task"] for row in rows})

    command("export", folder, "--output", tmp_path / "original")
    lines = [json.loads(line) for line in (tmp_path / "original/train.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [row["response"] for row in rows]

    command("import", tmp_path / "original/train.jsonl", "--output", tmp_path / "back")
    back = undecoded(tmp_path / "back").to_list()
    assert [row["audio"]["bytes"] for row in back] == [row["audio"]["bytes"] for row in rows]


def test_the_nano_corpus_and_the_nano_llm(command, tmp_path):
    """Nothing is stubbed here: speech, requests, answers, files and loading are real."""
    options = ["--tasks", "intent=2", "keyword", f"{TRANSCRIPTION}=inf", "--tasks-per-utterance", "2", "--limit", "12"]
    options += ["--pool", POOL_PATH]
    command("build", "--corpus", "nano", "--llm", "assets/nano/llm", "--output", tmp_path / "nano", *options)
    rows = undecoded(tmp_path / "nano")
    assert len(rows) == 12
    assert set(rows["task"]) <= {"intent", "keyword", TRANSCRIPTION}
    assert rows["task"][:].count(TRANSCRIPTION) == 6
    for row in rows:
        if row["task"] == "intent":
            assert re.fullmatch(r"The intent is \w+\.", row["response"])


def test_an_llm_behind_a_server_answers(command, corpus_dir, llm_dir, tmp_path):
    with MisbehavingServer(["429 with Retry-After", "disconnect"], answer=lambda prompt: "So be it.") as server:
        options = ["--server", server.url, "--served-model", "llm", "--tasks", "continuation", "--concurrency", "3"]
        command("build", "--corpus", corpus_dir, "--llm", llm_dir, "--output", tmp_path / "served", *options)
    rows = undecoded(tmp_path / "served")
    assert rows["response"][:] == ["So be it."] * 8
    written = json.loads(rows[0]["responder"])
    assert (written["model"], written["decoding"]["engine"]) == (llm_dir.name, "openai-compatible server")
    assert len(server.bodies) == 10
    assert server.most_at_once <= 3


def test_a_task_of_ones_own_needs_no_code(command, answering, corpus_dir, tmp_path):
    (tmp_path / "pool.yaml").write_text(
        "tasks:\n  rhyme:\n    description: Rhyme on it.\n    slots:\n      style: [limerick, haiku]\n"
        "    seen: ['Make a {style} of the speech.']\n    held_out: ['A {style}, please, of what is said.']\n"
    )
    options = ["--pool", tmp_path / "pool.yaml", "--tasks", "rhyme"]
    command("build", "--corpus", corpus_dir, "--llm", "any", "--output", tmp_path / "rhymes", *options)
    asked = set(undecoded(tmp_path / "rhymes", "rhyme")["instruction"])
    assert asked == {"Make a limerick of the speech.", "Make a haiku of the speech."}
    assert "--pool POOL --output OUTPUT" in (tmp_path / "rhymes/README.md").read_text()


def test_languages_to_translate_into(command, answering, corpus_dir, tmp_path):
    options = ["--tasks", "translation", "--languages", "German", "French"]
    command("build", "--corpus", corpus_dir, "--llm", "any", "--output", tmp_path / "languages", *options)
    asked = undecoded(tmp_path / "languages")["instruction"][:]
    assert all(("German" in line) != ("French" in line) for line in asked)


def test_the_command_in_the_card_builds_the_same(command, answering, corpus_dir, tmp_path, monkeypatch):
    options = ["--tasks", "intent", "translation=2.5", "--seed", "7", "--limit", "5", "--filters-off", "copy"]
    command("build", "--corpus", corpus_dir, "--llm", "any", "--output", tmp_path / "one", *options)
    card = (tmp_path / "one/README.md").read_text()
    (line,) = re.findall(r"^python -m dataset_builders.self_powered (build .*) --output OUTPUT$", card, re.MULTILINE)
    monkeypatch.chdir(corpus_dir.parent)  # the card has the names of folders without their paths
    command(*line.split(), "--output", tmp_path / "two")
    assert undecoded(tmp_path / "one").to_list() == undecoded(tmp_path / "two").to_list()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "singing"], r"unknown task 'singing'; the pool has .* add a block"),
        (["--tasks", "intent", "intent"], "named twice"),
        (["--tasks", "intent=much"], "cannot read the weight in 'intent=much'"),
        (["--tasks-per-utterance", "8"], "cannot draw 8 tasks"),
        (["--transcript-column", "words"], "no column 'words' for the transcript; it has"),
        (["--normalizer", "shout"], "unknown normalizer 'shout'"),
        (["--preset", "ted"], "unknown preset 'ted'"),
    ],
)
def test_invalid_options_are_refused_before_an_llm_is_loaded(command, options, message, corpus_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        command("build", "--corpus", corpus_dir, "--llm", "no-such-llm", "--output", tmp_path / "set", *options)


def test_a_builder_for_datasets(answering, corpus_dir, tmp_path):
    settings = {"corpus": str(corpus_dir), "llm": "any", "tasks": ["intent", "keyword"], "cache_dir": str(tmp_path)}
    builder = SelfPoweredBuilder(**settings)
    builder.download_and_prepare()
    rows = builder.as_dataset("train")
    assert rows.column_names == list(COLUMNS)
    assert rows.features["audio"] == Audio(16_000, decode=False)
    assert list(builder.as_streaming_dataset("train")) == list(rows)
    assert len(rows) == 8


def test_builders_with_different_settings_do_not_share_a_cache(answering, corpus_dir, tmp_path):
    settings = {"corpus": str(corpus_dir), "llm": "any", "cache_dir": str(tmp_path)}
    folders = {SelfPoweredBuilder(**settings, seed=seed).cache_dir for seed in (0, 1)}
    assert len(folders) == 2


def test_a_builder_writes_the_set_to_a_given_folder(answering, corpus_dir, tmp_path):
    output = tmp_path / "kept"
    settings = {"corpus": str(corpus_dir), "llm": "any", "output": str(output), "cache_dir": str(tmp_path / "cache")}
    SelfPoweredBuilder(**settings).download_and_prepare()
    assert len(undecoded(output)) == 8


def test_a_builder_needs_a_corpus_and_an_llm():
    with pytest.raises(TypeError, match="corpus"):
        SelfPoweredBuilder(llm="any")


def test_the_columns_are_the_same_everywhere():
    assert tuple(self_powered.FEATURES) == COLUMNS
