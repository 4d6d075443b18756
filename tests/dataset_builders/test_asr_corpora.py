"""Every kind of corpus, in its own format, becomes rows of one schema with its audio files untouched; and what cannot
be used is refused with the place where it stands and the reason."""

import functools
import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_builders.asr_corpora import PRESETS, HubCorpus, load_corpus, open_corpus
from dataset_builders.corpus import RefusedRowError, choose_columns, duration_of
from dataset_builders.file_corpora import AudioFolder, ManifestCorpus
from processing_lsm import load_audio

SCHEMA = {
    "id": Value("string"),
    "audio": Audio(16_000, decode=False),
    "transcript": Value("string"),
    "duration": Value("float32"),
    "source": Value("string"),
}


@functools.cache
def clip(seed=0, kind="WAV", seconds=0.5, rate=16_000, channels=1) -> bytes:
    """An audio file of noise."""
    noise = np.random.default_rng(seed).normal(0, 0.1, (int(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, noise, rate, format=kind)
    return file.getvalue()


def write(folder, files):
    """Write files by their paths, from bytes or text; returns the folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def json_lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(folder, *rows, name="train.parquet"):
    """Write a Parquet file as the Hub has them; audio as bytes, or as `{"bytes", "path"}`."""
    rows = [row | {"audio": {"bytes": row["audio"], "path": None}} if is_bytes(row) else row for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder


def is_bytes(row):
    return isinstance(row.get("audio"), bytes)


def read(corpus):
    """The rows of a corpus, and the errors of those that are refused."""
    rows, refused = [], []
    for file in range(corpus.num_files):
        for where, line in corpus.lines(file):
            try:
                rows.append(corpus.utterance(where, line))
            except RefusedRowError as error:
                refused.append(error)
    return rows, refused


def spoken(corpus):
    """`{id: (transcript, bytes of the audio file)}` of a corpus where nothing is refused."""
    rows, refused = read(corpus)
    assert not refused
    found = {row["id"]: (row["transcript"], row["audio"]["bytes"]) for row in rows}
    assert len(found) == len(rows)
    return found


def places(refused):
    return [(error.where, error.reason) for error in refused]


# One schema


def test_whatever_the_corpus_there_is_one_schema(tmp_path):
    files = [clip(0), clip(1, "FLAC", 0.25)]
    rows = [{"id": f"u{i}", "audio": file, "transcript": f" said\t{i}\n"} for i, file in enumerate(files)]
    dataset = load_corpus(parquet(tmp_path / "noise", *rows), "train")
    assert dataset.features == Features(SCHEMA)
    assert [row["audio"]["bytes"] for row in dataset] == files
    assert dataset["transcript"][:] == ["said 0", "said 1"]
    assert dataset["duration"][:] == [0.5, 0.25]
    assert dataset["source"][:] == ["noise/train"] * 2


@pytest.mark.parametrize(
    ("kind", "rate", "channels"),
    [("WAV", 8_000, 2), ("WAV", 22_050, 1), ("FLAC", 48_000, 2), ("MP3", 32_000, 1), ("OGG", 16_000, 1)],
)
def test_any_rate_stereo_and_format_are_passed_on_as_they_are(tmp_path, kind, rate, channels):
    audio = clip(0, kind, 0.5, rate, channels)
    row = load_corpus(parquet(tmp_path, {"id": "u", "audio": audio, "text": "hello"}), "train")[0]
    assert row["audio"]["bytes"] == audio
    assert row["duration"] == pytest.approx(0.5)
    assert load_audio(row["audio"]).shape == (8_000,)


def test_a_limit_takes_the_first_rows(corpus_dir):
    assert load_corpus(corpus_dir, "train", limit=3)["id"][:] == ["utt-0", "utt-1", "utt-2"]
    assert len(load_corpus(corpus_dir, "train", limit=100)) == 8
    with pytest.raises(ValueError, match="limit=0 must be 1 or more"):
        load_corpus(corpus_dir, "train", limit=0)


def test_a_corpus_says_what_it_is_as_json_takes_it(tmp_path):
    release = write(tmp_path / "en", {"train.tsv": "path\tsentence\na.mp3\thello\n", "clips/a.mp3": clip(0, "MP3")})
    described = open_corpus(release / "train.tsv", "train", preset="common_voice").describe()
    assert json.loads(json.dumps(described)) == described
    assert described.pop("revision").startswith("sha256:")  # of the manifest
    assert described == {
        "kind": "ManifestCorpus",
        "origin": "train",
        "name": "train",
        "split": "train",
        "config": None,
        "columns": {"audio": "path", "transcript": "sentence", "id": "path"},
        "normalizer": "common_voice",
        "license": "cc0-1.0",
        "language": None,
    }


# LibriSpeech

CHAPTER = "103-1240-0000 CHAPTER ONE I AM\n103-1240-0001 IT WAS MARILLA'S\n"


@pytest.fixture
def librispeech(tmp_path):
    """Its release: speaker, chapter, FLACs and the chapter's transcripts; `dev-clean` is another split."""
    return write(
        tmp_path / "LibriSpeech",
        {
            "SPEAKERS.TXT": "84 | F | dev-clean | 8.02 | Christie Nowak\n",
            "train-clean-100/103/1240/103-1240-0000.flac": clip(0, "FLAC"),
            "train-clean-100/103/1240/103-1240-0001.flac": clip(1, "FLAC"),
            "train-clean-100/103/1240/103-1240.trans.txt": CHAPTER,
            "train-clean-100/103/1241/103-1241-0000.flac": clip(2, "FLAC"),
            "train-clean-100/103/1241/103-1241.trans.txt": "103-1241-0000 MATTHEW CUTHBERT\n",
            "dev-clean/84/121123/84-121123-0000.flac": clip(3, "FLAC"),
            "dev-clean/84/121123/84-121123.trans.txt": "84-121123-0000 GO DO YOU HEAR\n",
        },
    )


def test_librispeech_as_it_is_released(librispeech):
    corpus = open_corpus(librispeech, "train-clean-100", preset="librispeech")
    assert isinstance(corpus, AudioFolder) and corpus.license == "cc-by-4.0"
    assert spoken(corpus) == {
        "103-1240-0000": ("Chapter one I am", clip(0, "FLAC")),
        "103-1240-0001": ("It was marilla's", clip(1, "FLAC")),
        "103-1241-0000": ("Matthew cuthbert", clip(2, "FLAC")),
    }
    assert read(corpus)[0][0]["source"] == "LibriSpeech/train-clean-100"


def test_a_folder_of_the_splits_name_is_the_split_and_all_of_them_are_if_there_is_none(librispeech):
    assert list(spoken(open_corpus(librispeech, "dev-clean"))) == ["84-121123-0000"]
    assert spoken(open_corpus(librispeech / "dev-clean", "test"))["84-121123-0000"][0] == "GO DO YOU HEAR"  # no preset
    assert len(spoken(open_corpus(librispeech, "everything"))) == 4


def test_librispeech_refuses_by_chapter_and_line(librispeech):
    chapter = librispeech / "dev-clean/84/121123/84-121123.trans.txt"
    chapter.write_text("84-121123-0000 GO DO YOU HEAR\n\n84-121123-0001 GONE\n84-121123-0000\n")
    rows, refused = read(open_corpus(librispeech, "dev-clean", preset="librispeech"))
    assert [row["id"] for row in rows] == ["84-121123-0000"]
    assert places(refused) == [
        ("84-121123.trans.txt line 3", "unreadable audio"),
        ("84-121123.trans.txt line 4", "no transcript"),
    ]


def test_librispeech_as_the_hub_has_it(tmp_path):
    rows = [
        {
            "file": f"374-180298-000{n}.flac",
            "audio": {"bytes": clip(n, "FLAC"), "path": f"374-180298-000{n}.flac"},
            "text": text,
            "speaker_id": 374,
            "chapter_id": 180298,
            "id": f"374-180298-000{n}",
        }
        for n, text in enumerate(["CHAPTER SIXTEEN I MIGHT HAVE TOLD YOU", "MARGUERITE"])
    ]
    folder = parquet(tmp_path / "librispeech_asr", *rows, name="train.clean.100-00000-of-00001.parquet")
    corpus = open_corpus(folder, "train", preset="librispeech")
    assert isinstance(corpus, HubCorpus)
    assert spoken(corpus) == {
        "374-180298-0000": ("Chapter sixteen I might have told you", clip(0, "FLAC")),
        "374-180298-0001": ("Marguerite", clip(1, "FLAC")),
    }


# Common Voice

COMMON_VOICE = [
    "client_id\tpath\tsentence_id\tsentence\tup_votes\tdown_votes\tage\tlocale",
    'b1\tcommon_voice_en_1.mp3\ts1\t"""Hello."""\t2\t0\t\ten',
    'b2\tcommon_voice_en_2.mp3\ts2\tHe said "no".\t2\t1\ttwenties\ten',
    "b3\tcommon_voice_en_3.mp3\ts3\tIt’s 5 o’clock, says \u201cTim\u201d.\t2\t0\t\ten",
]


def test_common_voice_as_it_is_released(tmp_path):
    release = {f"clips/common_voice_en_{n}.mp3": clip(n, "MP3", 0.5, 32_000) for n in (1, 2, 3)}
    release |= {f"{split}.tsv": "\n".join(COMMON_VOICE) + "\n" for split in ("train", "dev", "test")}
    corpus = open_corpus(write(tmp_path / "en", release) / "train.tsv", "train", preset="common_voice")
    assert isinstance(corpus, ManifestCorpus)
    assert spoken(corpus) == {
        "common_voice_en_1": ("Hello.", clip(1, "MP3", 0.5, 32_000)),
        "common_voice_en_2": ('He said "no".', clip(2, "MP3", 0.5, 32_000)),
        "common_voice_en_3": ("It’s 5 o’clock, says “Tim”.", clip(3, "MP3", 0.5, 32_000)),
    }
    assert corpus.license == "cc0-1.0"


def test_common_voice_as_mirrors_have_it(tmp_path):
    audio = {"bytes": clip(1, "MP3"), "path": "common_voice_eo_1.mp3"}
    row = {"client_id": "b1", "path": "common_voice_eo_1.mp3", "audio": audio, "sentence": '"Saluton."', "locale": "eo"}
    corpus = open_corpus(parquet(tmp_path, row), "train", preset="common_voice")
    assert spoken(corpus) == {"common_voice_eo_1.mp3": ("Saluton.", clip(1, "MP3"))}


def test_common_voice_has_no_home_on_the_hub():
    with pytest.raises(ValueError, match=r"common_voice is not on the Hub: name its TSV file, .* --preset common"):
        open_corpus("common_voice")


def test_a_release_given_as_a_folder_says_what_to_name(tmp_path):
    folder = write(tmp_path / "en", {"clips/a.mp3": clip(1, "MP3"), "train.tsv": "path\tsentence\na.mp3\thello\n"})
    with pytest.raises(ValueError, match=r"en has no utterance .*no a.txt beside it.* manifest of another name, name"):
        open_corpus(folder, "train", preset="common_voice")


# GigaSpeech


def test_gigaspeech_as_the_hub_has_it(tmp_path):
    texts = ["AS THEY'RE LEAVING <COMMA> CAN I GO <QUESTIONMARK>", "<MUSIC>", "YES <PERIOD>"]
    rows = [
        {
            "segment_id": f"YOU100000029{n}_S0000042",
            "speaker": "N/A",
            "text": text,
            "audio": {"bytes": clip(n), "path": f"YOU100000029{n}_S0000042.wav"},
            "begin_time": 12.5 * n,
            "end_time": 12.5 * n + 0.5,
            "audio_id": "YOU1000000290",
            "title": "A title",
            "category": 24,
        }
        for n, text in enumerate(texts)
    ]
    rows, refused = read(open_corpus(parquet(tmp_path, *rows), "train", preset="gigaspeech"))
    assert {row["id"]: row["transcript"] for row in rows} == {
        "YOU1000000290_S0000042": "As they're leaving, can I go?",
        "YOU1000000292_S0000042": "Yes.",
    }
    assert places(refused) == [("row 1", "no transcript")]
    assert "'text' is '<MUSIC>'; expected what is said" in str(refused[0])


# Manifests


def test_a_manifest_of_json_lines(tmp_path):
    """Such as the original project's, of `audio` and `text`. Without an id, the file's path is one."""
    lines = json_lines({"audio": "a/1.wav", "text": "one"}, {"audio": "b/1.flac", "text": "two"})
    write(tmp_path, {"asr.jsonl": lines + "\n", "a/1.wav": clip(1), "b/1.flac": clip(2, "FLAC")})
    corpus = open_corpus(tmp_path / "asr.jsonl")
    assert spoken(corpus) == {"a/1": ("one", clip(1)), "b/1": ("two", clip(2, "FLAC"))}
    assert read(corpus)[0][0]["source"] == "asr/train"


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_manifest_of_cells(tmp_path, suffix):
    table = [["utterance_id", "file", "speaker", "transcription"], ["u1", "a.wav", "x", "one, so to say"]]
    if suffix == ".csv":
        table[1][3] = '"one, so to say"'
    text = "\ufeff" + "".join({".csv": ",", ".tsv": "\t"}[suffix].join(row) + "\r\n" for row in table)
    corpus = open_corpus(write(tmp_path, {f"asr{suffix}": text, "a.wav": clip(1)}) / f"asr{suffix}")
    assert spoken(corpus) == {"u1": ("one, so to say", clip(1))}


def test_quotes_are_kept_in_tsv_and_read_in_csv(tmp_path):
    row = '"""No."""'
    for suffix, cell in {".csv": ",", ".tsv": "\t"}.items():
        write(tmp_path, {f"asr{suffix}": f"audio{cell}text\na.wav{cell}{row}\n", "a.wav": clip(1)})
    assert spoken(open_corpus(tmp_path / "asr.csv"))["a"][0] == '"No."'
    assert spoken(open_corpus(tmp_path / "asr.tsv"))["a"][0] == row


def test_a_manifest_of_nemo(tmp_path):
    lines = json_lines(
        {"audio_filepath": str(tmp_path / "wavs/1.wav"), "duration": 0.5, "text": "one"},
        {"audio_filepath": "wavs/2.wav", "duration": 0.5, "offset": 0.0, "text": "two"},
        {"audio_filepath": "wavs/long.wav", "duration": 0.5, "offset": 0.0, "text": "three"},
        {"audio_filepath": "wavs/long.wav", "duration": 0.5, "offset": 12.5, "text": "four"},
        {"audio_filepath": "wavs/long.wav", "duration": 0.5, "offset": "later", "text": "five"},
    )
    wavs = {"wavs/1.wav": clip(1), "wavs/2.wav": clip(2), "wavs/long.wav": clip(3, seconds=2.0)}
    rows, refused = read(open_corpus(write(tmp_path, {"train_manifest.json": lines, **wavs}) / "train_manifest.json"))
    assert [(row["id"], row["transcript"]) for row in rows] == [("wavs/1", "one"), ("wavs/2", "two")]
    assert places(refused) == [(f"train_manifest.json line {n}", "part of a file") for n in (3, 4, 5)]
    assert "duration is 0.5 of 2.00 seconds; cut the audio into utterances first" in str(refused[0])
    assert "offset is 12.5; cut the audio" in str(refused[1])


@pytest.mark.parametrize("offset", ["0", "0.0", ""])
def test_an_offset_of_nothing_is_none(tmp_path, offset):
    write(tmp_path, {"asr.csv": f"audio,text,offset\na.wav,one,{offset}\n", "a.wav": clip(1)})
    assert len(spoken(open_corpus(tmp_path / "asr.csv"))) == 1


def test_columns_are_named_where_their_names_are_not_customary(tmp_path):
    line = json_lines({"number": 7, "sound": "a.wav", "text": "written", "heard": "spoken"})
    path = write(tmp_path, {"asr.jsonl": line, "a.wav": clip(1)}) / "asr.jsonl"
    columns = {"audio": "sound", "transcript": "heard", "id": "number"}
    assert spoken(open_corpus(path, columns=columns)) == {"7": ("spoken", clip(1))}
    assert spoken(open_corpus(path, columns=columns | {"transcript": "text"}))["7"][0] == "written"


def test_columns_are_looked_for_in_more_than_the_first_line(tmp_path):
    lines = json_lines({"audio": "a.wav"}, {"audio": "a.wav", "text": "one"})
    rows, refused = read(open_corpus(write(tmp_path, {"asr.jsonl": lines, "a.wav": clip(1)}) / "asr.jsonl"))
    assert len(rows) == 1 and places(refused) == [("asr.jsonl line 1", "no column")]


def test_a_normalizer_can_be_chosen(tmp_path):
    path = write(tmp_path, {"asr.csv": "audio,text\na.wav,YES <COMMA> SIR\n", "a.wav": clip(1)}) / "asr.csv"
    assert spoken(open_corpus(path))["a"][0] == "YES <COMMA> SIR"
    assert spoken(open_corpus(path, normalizer="gigaspeech"))["a"][0] == "Yes, sir"


# Audio folders


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_with_metadata(tmp_path, kind):
    rows = [{"file_name": "a.wav", "text": "one"}, {"file_name": "deep/b.mp3", "text": "two"}]
    tables = {"csv": "file_name,text\na.wav,one\ndeep/b.mp3,two\n", "jsonl": json_lines(*rows)}
    folder = write(tmp_path, {f"metadata.{kind}": tables[kind], "a.wav": clip(1), "deep/b.mp3": clip(2, "MP3")})
    corpus = open_corpus(folder)
    assert isinstance(corpus, AudioFolder)
    assert spoken(corpus) == {"a": ("one", clip(1)), "deep/b": ("two", clip(2, "MP3"))}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_with_metadata_in_a_folder_for_each_split(tmp_path, kind):
    files = {}
    for seed, split in enumerate(["train", "test"]):
        row = {"csv": f"file_name,text\n1.wav,{split}\n", "jsonl": json_lines({"file_name": "1.wav", "text": split})}
        files |= {f"{split}/metadata.{kind}": row[kind], f"{split}/1.wav": clip(seed)}
    folder = write(tmp_path, files)
    assert spoken(open_corpus(folder, "train")) == {"train/1": ("train", clip(0))}
    assert spoken(open_corpus(folder, "test")) == {"test/1": ("test", clip(1))}


def test_a_folder_with_a_text_beside_each_file(tmp_path):
    texts = {"a.txt": "one\n", "deep/a.txt": "\ufefftwo", "deep/README.txt": "no speech"}
    folder = write(tmp_path, {"a.wav": clip(1), "deep/a.FLAC": clip(2, "FLAC"), **texts})
    assert spoken(open_corpus(folder)) == {"a": ("one", clip(1)), "deep/a": ("two", clip(2, "FLAC"))}


def test_a_file_without_a_text_is_refused_by_its_name(tmp_path):
    folder = write(tmp_path, {"a.wav": clip(1), "a.txt": "one", "b.wav": clip(2), "c.wav": clip(3), "c.txt": " \n"})
    rows, refused = read(open_corpus(folder))
    assert [row["id"] for row in rows] == ["a"]
    assert places(refused) == [("b.wav", "no transcript"), ("c.wav", "no transcript")]
    assert "there is no b.txt beside it" in str(refused[0])


def test_metadata_refuses_by_file_and_line(tmp_path):
    table = "file_name,text\na.wav,one\ngone.wav,two\n,three\na.wav\n../../secret.wav,four\n"
    folder = write(tmp_path / "set", {"train/metadata.csv": table, "train/a.wav": clip(1), "../secret.wav": clip(2)})
    rows, refused = read(open_corpus(folder))
    assert [row["id"] for row in rows] == ["train/a"]
    assert places(refused) == [
        ("train/metadata.csv line 3", "unreadable audio"),
        ("train/metadata.csv line 4", "no audio"),
        ("train/metadata.csv line 5", "not a table row"),
        ("train/metadata.csv line 6", "outside the data root"),
    ]


# What load_dataset opens


def test_parquet_files_can_be_read_apart(tmp_path):
    for file in range(3):
        rows = [{"audio": clip(10 * file + n), "text": f"said {file} {n}"} for n in range(2)]
        parquet(tmp_path, *rows, name=f"train-{file:05d}-of-00003.parquet")
    corpus = open_corpus(tmp_path)
    assert corpus.num_files == 3
    for file in range(3):
        lines = [corpus.utterance(where, line) for where, line in corpus.lines(file)]
        assert [row["transcript"] for row in lines] == [f"said {file} 0", f"said {file} 1"]
    assert [row["id"] for row in corpus] == [f"row {n} of file {file}" for file in range(3) for n in range(2)]


def test_ids_are_the_same_at_every_reading(tmp_path, corpus_dir):
    assert list(spoken(open_corpus(corpus_dir))) == [f"utt-{n}" for n in range(8)]
    lines = json_lines({"id": 0, "audio": "a.wav", "text": "a"}, {"id": "", "audio": "a.wav", "text": "b"})
    path = write(tmp_path, {"asr.jsonl": lines, "a.wav": clip(1)}) / "asr.jsonl"
    assert list(spoken(open_corpus(path))) == ["0", "a"]  # the corpus's own, or the file's where that is empty
    assert list(spoken(open_corpus(path))) == list(spoken(open_corpus(path)))


def test_audio_may_be_bytes_alone(tmp_path):
    pq.write_table(pa.table({"audio": [clip(1)], "text": ["one"]}), tmp_path / "train.parquet")
    assert spoken(open_corpus(tmp_path)) == {"row 0": ("one", clip(1))}


def test_a_folder_of_json_lines_and_their_audio_elsewhere(tmp_path):
    lines = json_lines({"audio": "clips/a.wav", "text": "one"}, {"audio": str(tmp_path / "clips/b.wav"), "text": "two"})
    write(tmp_path, {"lists/train.jsonl": lines, "clips/a.wav": clip(1), "clips/b.wav": clip(2)})
    corpus = open_corpus(tmp_path / "lists", data_root=tmp_path)
    assert isinstance(corpus, HubCorpus)
    assert spoken(corpus) == {"row 0": ("one", clip(1)), "row 1": ("two", clip(2))}
    assert places(read(open_corpus(tmp_path / "lists"))[1]) == [
        ("row 0", "unreadable audio"),
        ("row 1", "outside the data root"),
    ]


def test_a_row_of_the_hub_reads_no_file_but_the_corpuss_own(tmp_path):
    paths = ["mine.wav", "../secret.wav", "/etc/passwd", "file:///etc/passwd::mine.wav", "https://host/x::mine.wav"]
    write(tmp_path, {"secret.wav": clip(1), "set/mine.wav": clip(2), "set/a.txt": ""})
    rows = [{"audio": {"bytes": None, "path": path}, "text": "hi"} for path in paths]
    corpus = open_corpus(parquet(tmp_path / "set" / "data", *rows), data_root=tmp_path / "set")
    rows, refused = read(corpus)
    assert [row["audio"] for row in rows] == [{"bytes": clip(2), "path": "mine.wav"}]
    assert places(refused) == [(f"row {n}", "outside the data root") for n in (1, 2, 3, 4)]
    assert "/etc/passwd is not under" in str(refused[1]) and "see --data-root" in str(refused[1])


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "secret.wav",
        "https://example.org/a.wav",
        "hf://datasets/other/set@main/a.wav",
        "hf://datasets/our/set2@main/a.wav",
        "hf://datasets/our/set@main/../../other/a.wav",
        "file:///etc/passwd::hf://datasets/our/set@main/a.wav",
        "zip://a.wav::/tmp/a.zip",
    ],
)
def test_a_data_set_of_the_hub_names_no_other(corpus_dir, path):
    corpus = open_corpus(corpus_dir)
    corpus.folder, corpus.name = None, "our/set"  # as if it had come from there
    with pytest.raises(RefusedRowError, match="outside the data root: .* is not a file of our/set"):
        corpus.utterance("row 0", {"id": "u", "transcript": "hi", "audio": {"bytes": None, "path": path}})


def test_a_row_is_not_refused_for_the_networks_faults(corpus_dir, monkeypatch):
    """A build that ends can go on later; a row that is refused is lost."""
    corpus = open_corpus(corpus_dir)
    corpus.folder, corpus.name = None, "our/set"
    line = {"transcript": "hi", "audio": {"bytes": None, "path": "hf://datasets/our/set@main/a.wav"}}
    faults = {FileNotFoundError("no such file"): RefusedRowError, ConnectionError("server gone"): ConnectionError}
    for fault, raised in faults.items():

        def fail(*_, fault=fault):
            raise fault

        monkeypatch.setattr("dataset_builders.asr_corpora.xopen", fail)
        with pytest.raises(raised, match=str(fault)):
            corpus.utterance("row 0", line)


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (None, "no audio"),
        ({"bytes": None, "path": None}, "no audio"),
        ({"bytes": None, "path": ""}, "no audio"),
        ({"bytes": b"", "path": "a.wav"}, "unreadable audio"),
        ({"bytes": b"no audio at all", "path": "a.wav"}, "unreadable audio"),
        ({"bytes": clip(0)[:20], "path": "a.wav"}, "unreadable audio"),
        ({"bytes": clip(0, seconds=0), "path": "a.wav"}, "unreadable audio"),
        ({"bytes": None, "path": "gone.wav"}, "unreadable audio"),
        ({"bytes": None, "path": "zip://gone.wav::train.parquet"}, "unreadable audio"),
    ],
)
def test_rows_of_parquet_are_refused_by_their_number(tmp_path, audio, reason):
    good = {"audio": {"bytes": clip(1), "path": "b.wav"}, "text": "hi"}
    rows, refused = read(open_corpus(parquet(tmp_path, good, {"audio": audio, "text": "hi"}, good)))
    assert len(rows) == 2 and places(refused) == [("row 1", reason)]


# The nano corpus


def test_nano_is_spoken_as_it_is_read():
    dataset = load_corpus("nano", "test", limit=2)
    assert dataset.features == Features(SCHEMA)
    assert dataset["id"][:] == ["nano-test-0-000000", "nano-test-0-000001"]
    assert dataset["source"][0] == "nano/test"
    assert dataset[0]["duration"] == pytest.approx(duration_of(dataset[0]["audio"]))
    assert [row["audio"] for row in load_corpus("nano", "test", limit=2)] == [row["audio"] for row in dataset]


def test_nano_has_no_end_but_a_default_limit():
    corpus = open_corpus("nano")
    assert (corpus.num_files, corpus.default_limit, corpus.license) == (1, 6000, "apache-2.0")
    with pytest.raises(ValueError, match=r"the nano corpus has no split 'dev'; expected one of .*'train'"):
        open_corpus("nano", "dev")


# Bad input: lines

GOOD = {"audio": "good.wav", "text": "hi"}
BAD_LINES = {
    "no file": ({"audio": "gone.wav", "text": "hi"}, "unreadable audio", "No such file or directory: .*gone.wav"),
    "a folder": ({"audio": ".", "text": "hi"}, "unreadable audio", "Is a directory"),
    "a null byte": ({"audio": "a\0b", "text": "hi"}, "unreadable audio", "null byte"),
    "a long name": ({"audio": "a" * 5000, "text": "hi"}, "unreadable audio", "too long"),
    "no audio file": ({"audio": "junk.wav", "text": "hi"}, "unreadable audio", "cannot read junk.wav as audio: Format"),
    "an empty file": ({"audio": "empty.wav", "text": "hi"}, "unreadable audio", "cannot read empty.wav as audio"),
    "no samples": ({"audio": "still.wav", "text": "hi"}, "unreadable audio", "still.wav has no samples; expected spee"),
    "no length": ({"audio": "piped.flac", "text": "hi"}, "unreadable audio", "piped.flac does not say how long it is"),
    "no path": ({"audio": "", "text": "hi"}, "no audio", "'audio' is ''; expected the path of an audio file"),
    "null path": ({"audio": None, "text": "hi"}, "no audio", "'audio' is None"),
    "number for path": ({"audio": 5, "text": "hi"}, "no audio", "'audio' is 5"),
    "list for path": ({"audio": ["a.wav"], "text": "hi"}, "no audio", "'audio' is .'a.wav'."),
    "no audio column": ({"text": "hi"}, "no audio", "'audio' is None"),
    "no text column": ({"audio": "good.wav"}, "no column", r"'text' is missing, there are \['audio'\]"),
    "no text": ({"audio": "good.wav", "text": ""}, "no transcript", "'text' is ''; expected what is said"),
    "blank text": ({"audio": "good.wav", "text": " \n"}, "no transcript", "expected what is said"),
    "null text": ({"audio": "good.wav", "text": None}, "no transcript", "'text' is None"),
    "number for text": ({"audio": "good.wav", "text": 5}, "no transcript", "'text' is 5"),
    "object for text": ({"audio": "good.wav", "text": {"a": 1}}, "no transcript", "'text' is {'a': 1}"),
    "half a character": ({"audio": "good.wav", "text": "\ud800"}, "not UTF-8", r"\\ud800"),
    "half an id": ({"audio": "good.wav", "text": "hi", "id": "\ud800"}, "not UTF-8", r"\\ud800"),
    "Latin-1": (b'{"audio": "good.wav", "text": "\xe9t\xe9"}', "not UTF-8", r"\\udce9t\\udce9"),
    "half a line": (b'{"audio": "good.wav", "te', "not JSON", "Unterminated string starting at, column 23"),
    "no JSON": (b"good.wav hi", "not JSON", "Expecting value"),
    "no object": (b'["good.wav", "hi"]', "not JSON", "expected an object in braces"),
    "null": (b"null", "not JSON", "expected an object in braces"),
    "an abyss": (b"[" * 100_000, "not JSON", "recursion"),
    "up and out": ({"audio": "../secret.wav", "text": "hi"}, "outside the data root", "not under .*see --data-root"),
    "out and absolute": ({"audio": "/etc/passwd", "text": "hi"}, "outside the data root", "/etc/passwd is not under"),
    "a neighbour": ({"audio": "../asr2/a.wav", "text": "hi"}, "outside the data root", "not under"),
}


@pytest.fixture
def files(tmp_path):
    """A folder `asr` of audio that is good, and bad in several ways; and a secret beside it."""
    piped = bytearray(clip(0, "FLAC"))
    piped[8 + 13] &= 0xF0  # the 36 bits of the header that count the samples
    piped[8 + 14 : 8 + 18] = bytes(4)
    audio = {"good.wav": clip(0), "junk.wav": b"no audio at all", "empty.wav": b"", "still.wav": clip(0, seconds=0)}
    outside = {"../secret.wav": clip(1), "../asr2/a.wav": clip(0)}
    return write(tmp_path / "asr", {**audio, "piped.flac": bytes(piped), **outside})


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_refused_by_its_number_and_the_others_are_read(files, bad):
    line, reason, message = BAD_LINES[bad]
    lines = [json.dumps(GOOD).encode(), line if isinstance(line, bytes) else json.dumps(line).encode()]
    write(files, {"speech.jsonl": b"\n".join([*lines, b"", lines[0]])})
    rows, refused = read(open_corpus(files / "speech.jsonl"))
    assert [row["transcript"] for row in rows] == ["hi", "hi"]
    assert places(refused) == [("speech.jsonl line 2", reason)]
    with pytest.raises(RefusedRowError, match=rf"^speech.jsonl line 2: {reason}: .*{message}"):
        raise refused[0]
    str(refused[0]).encode()  # a log can take it


@pytest.mark.parametrize(
    ("suffix", "line", "reason"),
    [
        (".csv", "good.wav", "not a table row"),
        (".csv", "good.wav,hi,ho", "not a table row"),
        (".csv", "good.wav,", "no transcript"),
        (".csv", "gone.wav,hi", "unreadable audio"),
        (".csv", '"good.wav,' + "hi" * 100_000, "not a table row"),  # a quote that is never closed
        (".tsv", "good.wav", "not a table row"),
        (".tsv", "good.wav\thi\tho", "not a table row"),
        (".tsv", "good.wav\t ", "no transcript"),
        (".tsv", "../secret.wav\thi", "outside the data root"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(files, suffix, line, reason):
    cell = {".csv": ",", ".tsv": "\t"}[suffix]
    write(files, {f"asr{suffix}": f"audio{cell}text\ngood.wav{cell}hi\n{line}\n"})
    rows, refused = read(open_corpus(files / f"asr{suffix}"))
    assert [row["transcript"] for row in rows] == ["hi"]
    assert places(refused) == [(f"asr{suffix} line 3", reason)]


def test_a_ragged_row_says_how_many_cells_were_expected(files):
    write(files, {"asr.csv": "audio,text\ngood.wav,hi\ngood.wav,hi, there\n"})
    assert str(read(open_corpus(files / "asr.csv"))[1][0]) == (
        "asr.csv line 3: not a table row: too few or too many cells; expected 2"
    )


def test_reading_all_of_a_corpus_ends_at_the_first_bad_line(files):
    write(files, {"asr.jsonl": json_lines(GOOD, {"audio": "gone.wav", "text": "hi"})})
    assert len(load_corpus(files / "asr.jsonl", "test", limit=1)) == 1
    with pytest.raises(ValueError, match="asr.jsonl line 2: unreadable audio: .*gone.wav"):
        load_corpus(files / "asr.jsonl", "test")


def test_audio_elsewhere_is_allowed_by_the_data_root(files):
    paths = [str(files.parent / "secret.wav"), "asr/good.wav"]
    write(files, {"asr.jsonl": json_lines(*({"audio": path, "text": "hi"} for path in paths))})
    corpus = open_corpus(files / "asr.jsonl", data_root=files.parent)
    assert spoken(corpus) == {"secret": ("hi", clip(1)), "asr/good": ("hi", clip(0))}


def test_a_link_in_the_folder_is_followed(files):
    os.symlink(files.parent / "secret.wav", files / "linked.wav")
    write(files, {"asr.jsonl": json_lines({"audio": "linked.wav", "text": "hi"})})
    assert spoken(open_corpus(files / "asr.jsonl")) == {"linked": ("hi", clip(1))}


# Bad input: settings


@pytest.mark.parametrize("kind", ["manifest", "parquet"])
@pytest.mark.parametrize("role", ["audio", "transcript", "id"])
def test_a_column_that_is_not_there_is_named_with_those_there_are(tmp_path, kind, role):
    row = {"audio": "a.wav" if kind == "manifest" else clip(1), "text": "hi"}
    if kind == "manifest":
        corpus = write(tmp_path, {"asr.jsonl": json_lines(row), "a.wav": clip(1)}) / "asr.jsonl"
    else:
        corpus = parquet(tmp_path, row)
    with pytest.raises(
        ValueError, match=rf"no column 'mine' for the {role}; it has \['audio', 'text'\]. Name .*--{role}-column"
    ):
        open_corpus(corpus, columns={role: "mine"})


def test_where_no_column_could_be_meant_all_that_were_looked_for_are_named():
    with pytest.raises(ValueError, match=r"asr has no column 'transcript' or 'text' .* for the transcript; it has"):
        choose_columns(["audio", "words"], {}, "asr")
    assert choose_columns(["audio", "text", "sentence"], {}, "asr") == {"audio": "audio", "transcript": "text"}


@pytest.mark.parametrize("column", [[7], [{"array": [0.1], "sampling_rate": 16_000}], [[0.1, 0.2]]])
def test_a_column_that_holds_no_files_is_no_audio(tmp_path, column):
    pq.write_table(pa.table({"audio": column, "text": ["hi"]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="column 'audio' holds .*; expected audio files, or their paths"):
        open_corpus(tmp_path)


def test_unknown_presets_and_normalizers_are_refused_with_those_there_are(tmp_path):
    path = write(tmp_path, {"asr.jsonl": json_lines(GOOD)}) / "asr.jsonl"
    with pytest.raises(ValueError, match=r"unknown preset 'libri'; there are \['librispeech', 'common_voice', 'giga"):
        open_corpus(path, preset="libri")
    with pytest.raises(ValueError, match=r"unknown normalizer 'libri'; there are \['plain', 'librispeech'"):
        open_corpus(path, normalizer="libri")


def test_an_unknown_split_is_refused_with_those_there_are(corpus_dir):
    with pytest.raises(ValueError, match=r"test.*\['train'\]"):
        open_corpus(corpus_dir, "test")


@pytest.mark.parametrize("name", ["/nowhere/asr", "./asr", "../asr.jsonl", "asr.tsv"])
def test_a_path_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} does not exist; expected a manifest, a folder or the id of a"):
        open_corpus(name)


@pytest.mark.parametrize("name", ["data/asr", "asr", "data/my/asr"])
def test_what_may_be_an_id_and_is_none_is_refused_as_both(name):
    with pytest.raises(ValueError, match=f"{name} does not exist here, and cannot be opened on the Hub"):
        open_corpus(name)


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.corpus])
def test_a_presets_name_stands_for_its_id(preset):
    with pytest.raises(ValueError, match=f"{PRESETS[preset].corpus} does not exist here"):  # for tests are offline
        open_corpus(preset)


def test_a_local_folder_of_a_presets_name_is_read(tmp_path, monkeypatch):
    parquet(tmp_path / "librispeech", {"id": "u", "audio": clip(1), "text": "HI"})
    monkeypatch.chdir(tmp_path)
    assert spoken(open_corpus("librispeech")) == {"u": ("Hi", clip(1))}


@pytest.mark.parametrize("name", ["asr.txt", "train.parquet", "asr"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, name):
    write(tmp_path, {name: "audio text"})
    with pytest.raises(ValueError, match=rf"{name} is no manifest; expected one of .jsonl, .json, .csv, .tsv, or a"):
        open_corpus(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("asr.jsonl", "", "it is empty"),
        ("asr.jsonl", "\n\n", "it is empty"),
        ("asr.csv", "audio,text\n", "it is empty"),
        ("asr.json", '[{"audio": "a.wav", "text": "hi"}]', "asr.json line 1: not JSON: expected an object in braces"),
    ],
)
def test_a_manifest_without_a_line_that_can_be_read_is_refused_at_once(tmp_path, name, content, message):
    write(tmp_path, {name: content})
    with pytest.raises(ValueError, match=rf"{name} has no utterance that can be read \({message}.*expected a line for"):
        open_corpus(tmp_path / name)


def test_json_lines_that_load_dataset_cannot_read_are_refused_at_once(tmp_path):
    write(tmp_path, {"train.jsonl": "no JSON\n"})
    with pytest.raises(ValueError, match="its first rows cannot be read; expected Parquet, JSON Lines, CSV or audio"):
        open_corpus(tmp_path)


def test_a_data_root_is_for_corpora_that_are_here():
    with pytest.raises(ValueError, match="openslr/x is on the Hub, where audio is not under a data_root='/data'"):
        open_corpus("openslr/x", data_root="/data")


@pytest.mark.parametrize("audio", [{"bytes": None, "path": "gone.wav"}, {"bytes": None, "path": None}])
def test_the_duration_of_nothing_is_refused(audio):
    with pytest.raises(ValueError, match="cannot read (gone.wav|the given bytes) as audio"):
        duration_of(audio)


# Junk

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
AUDIO = (
    VALUES
    | st.sampled_from(["good.wav", "10" * 200, "../..", "\0", "\ud800.wav"])
    | st.fixed_dictionaries({}, optional={"bytes": VALUES | st.just(clip(0)), "path": VALUES})
)
LINES = st.fixed_dictionaries(
    {},
    optional={
        "audio": AUDIO,
        "text": VALUES | st.just("hi"),
        "id": VALUES,
        "offset": VALUES | st.just(0) | st.just(10**400),
        "duration": VALUES | st.just(10**400),
    },
)


@pytest.fixture(scope="module")
def three_kinds(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("kinds"), {"asr.jsonl": json_lines(GOOD | {"id": "u"}), "good.wav": clip(0)})
    rows = parquet(folder / "rows", GOOD | {"id": "u", "audio": clip(0)})
    write(folder / "folder", {"metadata.csv": "audio,text,id\na.wav,hi,u\n"})
    return [open_corpus(folder / name) for name in ("asr.jsonl", "folder", rows)]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(line=LINES)
def test_no_value_in_any_column_raises_anything_but_a_refusal(three_kinds, line):
    for corpus in three_kinds:
        try:
            row = corpus.utterance("line 1", line)
        except RefusedRowError as error:
            assert error.where == "line 1" and error.reason
        else:
            assert row["audio"]["bytes"] == clip(0) and isinstance(row["id"], str) and row["transcript"]
            json.dumps([row["id"], row["transcript"]], ensure_ascii=False).encode()


CONTENT = st.lists(
    st.binary(max_size=12)
    | st.sampled_from([b'{"audio": "good.wav", "text": "hi"}', b'good.wav,"hi"', b"good.wav\thi", b'"', b"\xff,\xff"]),
    max_size=5,
).map(b"\n".join)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(content=CONTENT)
def test_no_bytes_in_a_manifest_raise_anything_but_refusals(three_kinds, content):
    folder = three_kinds[0].data_root
    heads = {".jsonl": json_lines(GOOD), ".csv": "audio,text\ngood.wav,hi\n", ".tsv": "audio\ttext\ngood.wav\thi\n"}
    for suffix, head in heads.items():
        write(folder, {f"junk{suffix}": head.encode() + content})
        rows, refused = read(open_corpus(folder / f"junk{suffix}"))
        assert rows[0]["transcript"] == "hi"
        assert all(error.where.startswith(f"junk{suffix} line ") for error in refused)


def test_a_corpus_may_be_called_otherwise(tmp_path):
    """Two files of one name would otherwise give rows that cannot be told apart."""
    folder = write(tmp_path / "en", {"train.jsonl": '{"audio": "a.wav", "text": "hello"}', "a.wav": clip(0)})
    corpus = open_corpus(folder / "train.jsonl", corpus_name="cv-en")
    assert next(iter(corpus))["source"] == "cv-en/train"
    assert corpus.describe()["origin"] == "train"
