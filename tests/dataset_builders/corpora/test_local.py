"""Manifests and audio folders in all common formats."""

import pytest
from corpus_files import clip, json_lines, places, read, spoken, write

from dataset_builders.corpora.local import AudioFolder
from dataset_builders.corpora.opening import open_corpus

# Manifests


def test_a_manifest_of_json_lines(tmp_path):
    """As in the original project, with `audio` and `text`. Without an id, the path of the file is the id."""
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


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_manifest_in_utf_16_is_read(tmp_path, encoding):
    """This is the format of "Unicode text" in spreadsheets."""
    text = "\ufeffaudio\ttext\r\na.wav\tsüß 日本\r\n".encode(encoding)
    (write(tmp_path, {"a.wav": clip(1)}) / "asr.tsv").write_bytes(text)
    assert spoken(open_corpus(tmp_path / "asr.tsv")) == {"a": ("süß 日本", clip(1))}


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
    assert "duration is 0.5 s, but the file has 2.00 s; cut the audio into utterances first" in str(refused[0])
    assert "offset is 12.5; cut the audio" in str(refused[1])


@pytest.mark.parametrize("offset", ["0", "0.0", ""])
def test_an_empty_offset_is_ignored(tmp_path, offset):
    write(tmp_path, {"asr.csv": f"audio,text,offset\na.wav,one,{offset}\n", "a.wav": clip(1)})
    assert len(spoken(open_corpus(tmp_path / "asr.csv"))) == 1


def test_columns_with_uncommon_names_can_be_named(tmp_path):
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


@pytest.mark.parametrize("edited", ["metadata.csv", "1.trans.txt", "a.txt", "a.wav", "manifest.jsonl"])
def test_the_revision_of_a_corpus_depends_on_the_content_of_its_files_and_not_on_their_path(tmp_path, edited):
    """This holds for each format, also if an audio file is replaced by another one of the same size."""
    texts = {"metadata.csv": "file_name,text\na.flac,one\n", "1.trans.txt": "a one\n", "a.txt": "one"}
    texts["manifest.jsonl"] = json_lines({"audio": "a.flac", "text": "one"})
    custom = "a.txt" if edited == "a.wav" else edited
    audio = "a.wav" if edited == "a.wav" else "a.flac"
    path = tmp_path / custom if custom == "manifest.jsonl" else tmp_path

    def revision(files):
        write(tmp_path, files)
        return open_corpus(path).describe()["revision"]

    first = revision({audio: clip(1), custom: texts[custom]})
    assert revision({audio: clip(1), custom: texts[custom]}) == first
    assert revision({audio: clip(2)} if edited == audio else {edited: texts[edited].replace("one", "two")}) != first


def test_a_file_without_a_text_is_refused_by_its_name(tmp_path):
    folder = write(tmp_path, {"a.wav": clip(1), "a.txt": "one", "b.wav": clip(2), "c.wav": clip(3), "c.txt": " \n"})
    rows, refused = read(open_corpus(folder))
    assert [row["id"] for row in rows] == ["a"]
    assert places(refused) == [("b.wav", "no transcript"), ("c.wav", "no transcript")]
    assert "there is no b.txt beside it" in str(refused[0])


def test_every_file_of_a_folder_is_used_or_refused(tmp_path):
    """Audio formats that are not supported, and texts without a clip, are refused."""
    files = {"a.wav": clip(1), "a.txt": "one", "b.aiff": clip(2, "AIFF"), "b.txt": "two", "README.txt": "Hello."}
    lost = {"m.m4a": b"ftyp", "m.txt": "three", "n.WMA": b"", "gone.txt": "four", ".hidden": b""}
    rows, refused = read(open_corpus(write(tmp_path, {**files, **lost})))
    assert {row["id"]: row["transcript"] for row in rows} == {"a": "one", "b": "two"}
    assert sorted(places(refused)) == [
        ("gone.txt", "no audio"),
        ("m.m4a", "unreadable audio"),
        ("n.WMA", "unreadable audio"),
    ]
    assert ".m4a is not supported; convert it to one of .flac, .wav" in str(refused[0])


def test_a_folder_of_unsupported_audio_files_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"no readable utterance \(m.m4a: unreadable audio: .m4a is not supported"):
        open_corpus(write(tmp_path, {"m.m4a": b"ftyp", "m.txt": "one"}))


@pytest.mark.parametrize(
    "tables",
    [
        {"metadata.csv": "file_name,text\na.flac,one\n"},
        {"metadata.jsonl": json_lines({"file_name": "./a.flac", "text": "one"})},
        {"84-1.trans.txt": "a one\n"},
    ],
)
def test_clips_that_no_line_names_are_counted_and_stop_no_reader(tmp_path, tables, caplog):
    audio = {"a.flac": clip(1, "FLAC"), "b.flac": clip(2, "FLAC"), "c/d.m4a": b"", "SPEAKERS.TXT": "84 | F"}
    corpus = open_corpus(write(tmp_path, {**tables, **audio}))
    rows, refused = read(corpus)
    assert [row["id"] for row in rows] == ["a"]
    assert places(refused) == [("b.flac", "not listed"), ("c/d.m4a", "not listed")]
    assert [row["id"] for row in corpus] == ["a"]  # as evaluation reads it
    assert "not used: b.flac: not listed: no line of " in caplog.text


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
