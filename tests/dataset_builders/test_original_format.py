"""Import and export of the original project's JSONL."""

import json

import pytest
from datasets import Audio, load_dataset

from dataset_builders.building import build
from dataset_builders.corpora.opening import open_corpus
from dataset_builders.data_card import Summary
from dataset_builders.original_format import OriginalRows, export_original, import_original
from dataset_builders.responders.local import foreign
from dataset_builders.shards import BuildFolder


def rows_of(folder):
    return load_dataset(str(folder), "all", split="train").cast_column("audio", Audio(decode=False)).to_list()


@pytest.fixture
def exported(backwards, both, corpus_dir, tmp_path):
    folder = build(open_corpus(corpus_dir), backwards, tmp_path / "mine", both)
    return folder, export_original(folder, tmp_path / "theirs")


def test_an_exported_set_can_be_imported(exported, tmp_path):
    folder, jsonl = exported
    original = OriginalRows(jsonl, transcripts=jsonl.with_name("train_transcripts.jsonl"))
    mine, back = rows_of(folder), rows_of(import_original(original, tmp_path / "back"))
    same = ("transcript", "instruction", "response", "duration")
    assert [[row[key] for key in same] for row in back] == [[row[key] for key in same] for row in mine]
    assert [row["audio"]["bytes"] for row in back] == [row["audio"]["bytes"] for row in mine]
    assert len({row["id"] for row in back}) == 16


def test_a_line_is_what_the_original_code_reads(exported):
    _, jsonl = exported
    lines = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert all(set(line) == {"instruction", "audio", "text"} for line in lines)
    clips = {line["audio"] for line in lines}
    assert len(clips) == 8  # two rows of an utterance share its clip
    assert all((jsonl.parent / clip).read_bytes()[:4] == b"RIFF" for clip in clips)


def test_its_transcripts_are_a_corpus_like_any_other(exported, corpus_dir):
    _, jsonl = exported
    corpus = open_corpus(jsonl.with_name("train_transcripts.jsonl"))
    said = {row["transcript"] for row in corpus}
    assert said == {row["transcript"] for row in open_corpus(corpus_dir)}


def test_rows_that_do_not_say_who_answered_are_foreign_to_any_lsm(exported, lsm, tmp_path):
    _, jsonl = exported
    row = rows_of(import_original(OriginalRows(jsonl, task="intent"), tmp_path / "back"))[0]
    assert (row["task"], row["transcript"]) == ("intent", "")
    assert len(foreign(row["responder"], lsm.config.responder)) == 3


def test_lines_that_cannot_be_used_are_told_and_counted(exported, tmp_path, caplog):
    _, jsonl = exported
    first = json.loads(jsonl.read_text().splitlines()[0])
    lines = ["no JSON", json.dumps({**first, "instruction": None}), json.dumps({**first, "audio": "/etc/passwd"})]
    with open(jsonl, "a") as file:
        file.write("\n".join([*lines, json.dumps({**first, "audio": "gone.wav"})]))
    transcripts = jsonl.with_name("train_transcripts.jsonl")
    with open(transcripts, "a") as file:
        file.write('{"audio": "x.wav"}\n')
    folder = import_original(OriginalRows(jsonl, transcripts=transcripts), tmp_path / "back")
    assert len(rows_of(folder)) == 16
    assert "line 17 is not a transcript" in caplog.text
    assert Summary.of(BuildFolder(folder, "train").reports()).refused == {
        "not JSON": 1,
        "no instruction": 1,
        "outside the data root": 1,
        "unreadable audio": 1,
    }


def test_an_import_goes_on_where_it_stopped(exported, tmp_path):
    _, jsonl = exported
    whole = import_original(OriginalRows(jsonl), tmp_path / "whole", shard_size=5)
    again = import_original(OriginalRows(jsonl), tmp_path / "whole", shard_size=5)
    assert whole == again
    assert len(rows_of(whole)) == 16


def test_an_existing_output_is_refused(exported, tmp_path):
    folder, _ = exported
    with pytest.raises(ValueError, match=r"theirs exists; delete it"):
        export_original(folder, tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"no data/\*/test-\*\.parquet"):
        export_original(folder, tmp_path / "other", split="test")
