"""Any ASR corpus that `load_dataset` opens becomes rows of one schema, its audio files untouched."""

import io
import json
import re

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset, Features, Value

from dataset_builders.asr_corpora import duration_of, load_corpus
from processing_lsm import load_audio

SCHEMA = {
    "id": Value("string"),
    "audio": Audio(16_000, decode=False),
    "transcript": Value("string"),
    "duration": Value("float32"),
    "source": Value("string"),
}


def wav(seconds=0.5, rate=16_000, channels=1, kind="WAV"):
    noise = np.random.default_rng(0).normal(0, 0.1, (int(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, noise, rate, format=kind)
    return file.getvalue()


@pytest.fixture
def make_corpus(tmp_path):
    """`make_corpus(rows)` writes a folder whose `train` split has these rows; audio is given as bytes."""

    def make(rows):
        rows = [{**row, "audio": {"bytes": row["audio"], "path": None}} if "audio" in row else row for row in rows]
        Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
        return tmp_path

    return make


def test_one_schema_and_the_files_bytes(make_corpus):
    files = [wav(0.5), wav(0.25, kind="FLAC")]
    corpus = make_corpus([{"id": f"u{i}", "audio": file, "transcript": f" said {i}\n"} for i, file in enumerate(files)])
    dataset = load_corpus(corpus, "train")
    assert dataset.features == Features(SCHEMA)
    assert [row["audio"]["bytes"] for row in dataset] == files
    assert dataset["transcript"][:] == ["said 0", "said 1"]
    assert dataset["duration"][:] == [0.5, 0.25]
    assert dataset["source"][0] == f"{corpus.name}/train"


def test_columns_may_have_other_names_and_ids_may_be_numbers(make_corpus):
    rows = [{"number": 7, "speech": {"bytes": wav(), "path": None}, "text": "hello", "speaker": "x", "duration": 0.5}]
    names = {"audio_column": "speech", "transcript_column": "text", "id_column": "number"}
    dataset = load_corpus(make_corpus(rows), "train", **names)
    assert dataset.features == Features(SCHEMA)
    assert (dataset[0]["id"], dataset[0]["transcript"]) == ("7", "hello")


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_stereo_are_fine(make_corpus, rate, channels):
    corpus = make_corpus([{"id": "u", "audio": wav(0.5, rate, channels), "transcript": "hello"}])
    row = load_corpus(corpus, "train")[0]
    assert row["duration"] == pytest.approx(0.5)
    assert load_audio(row["audio"]).shape == (8_000,)


def test_a_manifest_of_paths(tmp_path):
    (tmp_path / "clip.wav").write_bytes(wav(0.75, 8_000))
    (tmp_path / "manifest").mkdir()
    line = {"id": "u", "audio": str(tmp_path / "clip.wav"), "transcript": "hello"}
    (tmp_path / "manifest" / "train.jsonl").write_text(json.dumps(line) + "\n")
    dataset = load_corpus(tmp_path / "manifest", "train")
    assert dataset.features == Features(SCHEMA)
    assert dataset[0]["duration"] == 0.75


def test_a_limit_takes_the_first_rows(corpus_dir):
    assert load_corpus(corpus_dir, "train", limit=3)["id"][:] == ["utt-0", "utt-1", "utt-2"]
    assert len(load_corpus(corpus_dir, "train", limit=100)) == 8


@pytest.mark.parametrize("missing", ["id", "audio", "transcript"])
def test_a_missing_column_is_named_with_those_there_are(make_corpus, missing):
    row = {"id": "u", "audio": wav(), "transcript": "hello"}
    corpus = make_corpus([{("other" if key == missing else key): value for key, value in row.items()}])
    with pytest.raises(ValueError, match=rf"no column '{missing}'; it has .*other.*_column"):
        load_corpus(corpus, "train")


@pytest.mark.parametrize("transcript", ["", "  \n", None])
def test_a_row_without_a_transcript_is_refused_by_its_id(make_corpus, transcript):
    rows = [{"id": f"u{i}", "audio": wav(), "transcript": text} for i, text in enumerate(["hello", transcript])]
    with pytest.raises(ValueError, match=r"row 'u1' of .*/train has no transcript"):
        load_corpus(make_corpus(rows), "train")


@pytest.mark.parametrize(
    ("content", "trouble"),
    [
        (b"not audio at all", "cannot read"),
        (wav()[:20], "cannot read"),
        (b"", "cannot read"),
        (wav(0), "no samples"),
    ],
)
def test_audio_that_holds_no_speech_is_refused(make_corpus, content, trouble):
    corpus = make_corpus([{"id": "u", "audio": content, "transcript": "hello"}])
    with pytest.raises(ValueError, match=trouble):
        load_corpus(corpus, "train")


def test_a_file_that_is_not_there_is_refused_by_its_path(tmp_path):
    path = str(tmp_path / "gone.wav")
    with pytest.raises(ValueError, match=re.escape(path)):
        duration_of({"bytes": None, "path": path})
