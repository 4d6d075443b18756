"""Corpora of all kinds become rows of one schema, with unchanged audio files."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import clip, json_lines, parquet, places, read, spoken, write
from datasets import Audio, Features, Value

from dataset_builders.corpora.audio import duration_of
from dataset_builders.corpora.corpus import RefusedRowError, choose_columns
from dataset_builders.corpora.local import AudioFolder, ManifestCorpus
from dataset_builders.corpora.opening import PRESETS, HubCorpus, load_corpus, open_corpus
from processing_lsm import load_audio

SCHEMA = {
    "id": Value("string"),
    "audio": Audio(16_000, decode=False),
    "transcript": Value("string"),
    "duration": Value("float32"),
    "source": Value("string"),
}


# One schema


def test_all_corpora_have_the_same_schema(tmp_path):
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


def test_the_description_of_a_corpus_is_json(tmp_path):
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


@pytest.mark.parametrize(
    "languages, expected", [(("de", "de"), "de"), (("de", "fr"), None), (("German",) * 2, None), ((["de"],) * 2, None)]
)
def test_a_manifest_may_name_its_language(tmp_path, languages, expected):
    lines = json_lines(*({"audio": "a.wav", "text": "hallo", "language": language} for language in languages))
    corpus = open_corpus(write(tmp_path, {"asr.jsonl": lines, "a.wav": clip(0)}) / "asr.jsonl")
    assert corpus.describe()["language"] == expected


def test_a_corpus_can_get_another_name(tmp_path):
    """Otherwise, the rows of two files with the same name would look the same."""
    folder = write(tmp_path / "en", {"train.jsonl": '{"audio": "a.wav", "text": "hello"}', "a.wav": clip(0)})
    corpus = open_corpus(folder / "train.jsonl", corpus_name="cv-en")
    assert next(iter(corpus))["source"] == "cv-en/train"
    assert corpus.describe()["origin"] == "train"


# LibriSpeech

CHAPTER = "103-1240-0000 CHAPTER ONE I AM\n103-1240-0001 IT WAS MARILLA'S\n"


@pytest.fixture
def librispeech(tmp_path):
    """Make a release of LibriSpeech: speakers, chapters, FLACs and transcripts by chapter; `dev-clean` is another
    split."""
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
    with pytest.raises(ValueError, match=r"common_voice is not on the Hub; pass its TSV file, .* --preset common"):
        open_corpus("common_voice")


def test_a_release_can_be_given_as_a_folder(tmp_path):
    folder = write(tmp_path / "en", {"clips/a.mp3": clip(1, "MP3"), "train.tsv": "path\tsentence\na.mp3\thello\n"})
    corpus = open_corpus(folder, "train", preset="common_voice")
    assert spoken(corpus) == {"a": ("hello", clip(1, "MP3"))}
    assert corpus.source == "en/train"
    with pytest.raises(ValueError, match=r"en has no readable utterance .*no a.txt beside it.*the name of the split"):
        open_corpus(folder, "dev", preset="common_voice")


def test_a_folder_has_a_manifest_for_each_split_beside_its_audio(tmp_path):
    lines = {split: json_lines({"audio": f"{split}/a.wav", "text": split}) for split in ("train", "dev")}
    files = {f"{split}.jsonl": line for split, line in lines.items()} | {f"{split}/a.wav": clip(1) for split in lines}
    write(tmp_path / "mine", files)
    for split in lines:
        corpus = open_corpus(tmp_path / "mine", split)
        assert spoken(corpus) == {f"{split}/a": (split, clip(1))}
        assert corpus.source == f"mine/{split}"


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
    assert "'text' is '<MUSIC>'; expected the spoken text" in str(refused[0])


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
    write(tmp_path, {"lists/rows.jsonl": lines, "clips/a.wav": clip(1), "clips/b.wav": clip(2)})
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
    assert "/etc/passwd is not under" in str(refused[1]) and "another --data-root" in str(refused[1])


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
    """A build that stops can be continued, but a refused row is lost."""
    corpus = open_corpus(corpus_dir)
    corpus.folder, corpus.name = None, "our/set"
    line = {"transcript": "hi", "audio": {"bytes": None, "path": "hf://datasets/our/set@main/a.wav"}}
    faults = {FileNotFoundError("no such file"): RefusedRowError, ConnectionError("server gone"): ConnectionError}
    for fault, raised in faults.items():

        def fail(*_, fault=fault):
            raise fault

        monkeypatch.setattr("dataset_builders.corpora.opening.xopen", fail)
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


def test_nano_is_synthesised_while_it_is_read():
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


def test_an_error_about_a_missing_column_lists_all_common_names():
    with pytest.raises(ValueError, match=r"asr has no column 'transcript' or 'text' .* for the transcript; it has"):
        choose_columns(["audio", "words"], {}, "asr")
    assert choose_columns(["audio", "text", "sentence"], {}, "asr") == {"audio": "audio", "transcript": "text"}


@pytest.mark.parametrize("column", [[7], [{"array": [0.1], "sampling_rate": 16_000}], [[0.1, 0.2]]])
def test_an_audio_column_without_files_is_refused(tmp_path, column):
    pq.write_table(pa.table({"audio": column, "text": ["hi"]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="column 'audio' holds .*; expected audio files, or their paths"):
        open_corpus(tmp_path)


def test_unknown_presets_and_normalizers_are_refused_with_those_there_are(tmp_path):
    path = write(tmp_path, {"asr.jsonl": json_lines({"audio": "good.wav", "text": "hi"})}) / "asr.jsonl"
    with pytest.raises(
        ValueError, match=r"unknown preset 'libri'; expected one of \['librispeech', 'common_voice', 'giga"
    ):
        open_corpus(path, preset="libri")
    with pytest.raises(ValueError, match=r"unknown normalizer 'libri'; expected one of \['plain', 'librispeech'"):
        open_corpus(path, normalizer="libri")


def test_an_unknown_split_is_refused_with_those_there_are(corpus_dir):
    with pytest.raises(ValueError, match=r"test.*\['train'\]"):
        open_corpus(corpus_dir, "test")


@pytest.mark.parametrize("name", ["/nowhere/asr", "./asr", "../asr.jsonl", "asr.tsv"])
def test_a_path_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} does not exist; expected a manifest, a folder or the id of a"):
        open_corpus(name)


@pytest.mark.parametrize("name", ["data/asr", "asr", "data/my/asr"])
def test_a_name_that_is_neither_a_path_nor_a_hub_id_is_refused_as_both(name):
    with pytest.raises(ValueError, match=f"{name} is not a local path, and cannot be opened on the Hub"):
        open_corpus(name)


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.corpus])
def test_a_presets_name_stands_for_its_id(preset):
    with pytest.raises(ValueError, match=f"{PRESETS[preset].corpus} is not a local path"):  # for tests are offline
        open_corpus(preset)


def test_a_local_folder_of_a_presets_name_is_read(tmp_path, monkeypatch):
    parquet(tmp_path / "librispeech", {"id": "u", "audio": clip(1), "text": "HI"})
    monkeypatch.chdir(tmp_path)
    assert spoken(open_corpus("librispeech")) == {"u": ("Hi", clip(1))}


@pytest.mark.parametrize("name", ["asr.txt", "train.parquet", "asr"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, name):
    write(tmp_path, {name: "audio text"})
    with pytest.raises(ValueError, match=rf"{name} is not a manifest; expected .jsonl, .json, .csv, .tsv, or a"):
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
    with pytest.raises(ValueError, match=rf"{name} has no readable utterance \({message}.*expected a line of JSON"):
        open_corpus(tmp_path / name)


def test_json_lines_that_load_dataset_cannot_read_are_refused_at_once(tmp_path):
    write(tmp_path, {"rows.jsonl": "no JSON\n"})
    with pytest.raises(ValueError, match="the first rows cannot be read; expected Parquet, JSON Lines, CSV or audio"):
        open_corpus(tmp_path)


def test_a_data_root_is_refused_for_a_corpus_on_the_hub():
    with pytest.raises(ValueError, match="openslr/x is on the Hub, so data_root='/data' has no effect"):
        open_corpus("openslr/x", data_root="/data")


@pytest.mark.parametrize("audio", [{"bytes": None, "path": "gone.wav"}, {"bytes": None, "path": None}])
def test_a_file_without_samples_is_refused(audio):
    with pytest.raises(ValueError, match="cannot read (gone.wav|the given bytes) as audio"):
        duration_of(audio)
