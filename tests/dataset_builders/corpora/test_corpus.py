"""An utterance that cannot be used is refused with its place and the reason, and all others are read."""

import json
import os

import pytest
from corpus_files import clip, json_lines, parquet, places, read, spoken, write
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_builders.corpora.audio import decode
from dataset_builders.corpora.corpus import RefusedRowError
from dataset_builders.corpora.opening import load_corpus, open_corpus

# Bad input: lines

GOOD = {"audio": "good.wav", "text": "hi"}
BAD_LINES = {
    "no file": ({"audio": "gone.wav", "text": "hi"}, "unreadable audio", "No such file or directory: .*gone.wav"),
    "a folder": ({"audio": ".", "text": "hi"}, "unreadable audio", "Is a directory"),
    "a null byte": ({"audio": "a\0b", "text": "hi"}, "unreadable audio", "null byte"),
    "a long name": ({"audio": "a" * 5000, "text": "hi"}, "unreadable audio", "too long"),
    "no audio file": ({"audio": "junk.wav", "text": "hi"}, "unreadable audio", "cannot read junk.wav as audio: Format"),
    "an empty file": ({"audio": "empty.wav", "text": "hi"}, "unreadable audio", "cannot read empty.wav as audio"),
    "no samples": ({"audio": "still.wav", "text": "hi"}, "unreadable audio", "still.wav has no samples; expected a"),
    "no length": ({"audio": "piped.flac", "text": "hi"}, "unreadable audio", "piped.flac has no length in its header"),
    "no path": ({"audio": "", "text": "hi"}, "no audio", "'audio' is ''; expected the path of an audio file"),
    "null path": ({"audio": None, "text": "hi"}, "no audio", "'audio' is None"),
    "number for path": ({"audio": 5, "text": "hi"}, "no audio", "'audio' is 5"),
    "list for path": ({"audio": ["a.wav"], "text": "hi"}, "no audio", "'audio' is .'a.wav'."),
    "no audio column": ({"text": "hi"}, "no audio", "'audio' is None"),
    "no text column": ({"audio": "good.wav"}, "no column", r"'text' is missing; the columns are \['audio'\]"),
    "no text": ({"audio": "good.wav", "text": ""}, "no transcript", "'text' is ''; expected the spoken text"),
    "blank text": ({"audio": "good.wav", "text": " \n"}, "no transcript", "expected the spoken text"),
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
    "up and out": (
        {"audio": "../secret.wav", "text": "hi"},
        "outside the data root",
        "not under .*another --data-root",
    ),
    "out and absolute": ({"audio": "/etc/passwd", "text": "hi"}, "outside the data root", "/etc/passwd is not under"),
    "a neighbour": ({"audio": "../asr2/a.wav", "text": "hi"}, "outside the data root", "not under"),
}


@pytest.fixture
def files(tmp_path):
    """Make a folder `asr` with one good audio file and several bad ones, and a secret file beside the folder."""
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
    str(refused[0]).encode()  # a log can print it


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


# Cut off

KINDS = ("WAV", "FLAC", "MP3", "AIFF", "AU")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off_is_not_decoded_as_a_shorter_one(kind):
    whole = clip(0, kind, seconds=3.0)
    assert len(decode({"bytes": whole, "path": None})) == 48_000
    for part in (3, 1.2):
        with pytest.raises(ValueError, match=r"a\.b is cut off: it has .* that its header states|Cannot read"):
            decode({"bytes": whole[: int(len(whole) / part)], "path": "a.b"})


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF024])
def test_a_wav_written_to_a_pipe_promises_nothing(size):
    streamed, place = bytearray(clip(0)), clip(0).index(b"data") + 4
    streamed[place : place + 4] = size.to_bytes(4, "little")
    assert len(decode({"bytes": bytes(streamed), "path": None})) == 8_000


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
