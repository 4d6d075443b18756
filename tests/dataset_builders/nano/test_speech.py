"""The nano corpus: rows are reproducible, splits have different voices and sentences, and files are written
atomically."""

import io
import random
import shutil

import numpy as np
import pytest
import soundfile
from datasets import Dataset, load_dataset

from dataset_builders.nano import speech as nano_speech
from dataset_builders.nano.grammar import Sentence, split_of
from dataset_builders.nano.speech import TEST_VOICES, TRAIN_VOICES, build, row, sample_utterance


def read(folder, split):
    return Dataset.from_parquet(str(folder / f"{split}.parquet")).with_format(None).to_list()


def test_voices_of_the_test_split_are_never_heard_in_training():
    assert len(set(TRAIN_VOICES)) >= 12
    assert len(set(TEST_VOICES)) >= 3
    variants = {voice.partition("+")[2] for voice in TRAIN_VOICES}
    assert not {voice.partition("+")[2] for voice in TEST_VOICES} & variants


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_row_is_a_sentence_of_its_split_in_a_voice_of_its_split(split):
    utterance = row(0, split, 5)
    assert utterance["id"] == f"nano-{split}-0-000005"
    assert Sentence.parse(utterance["transcript"])
    assert split_of(utterance["transcript"]) == split
    assert utterance["voice"] in (TEST_VOICES if split == "test" else TRAIN_VOICES)
    audio, rate = soundfile.read(io.BytesIO(utterance["audio"]["bytes"]))
    assert rate == 16_000
    assert audio.ndim == 1
    assert utterance["duration"] == pytest.approx(len(audio) / 16_000)


def test_seed_split_and_index_each_matter_and_nothing_else():
    rows = [(0, "train", 0), (0, "train", 1), (1, "train", 0), (0, "validation", 0)]
    first = [row(*key) for key in rows]
    assert len({utterance["audio"]["bytes"] for utterance in first}) == len(rows)
    order = random.Random(0).sample(range(len(rows)), len(rows))
    assert [row(*rows[index]) for index in order] == [first[index] for index in order]


def test_training_may_ask_for_fragments_of_the_same_sentences():
    for index in range(8):
        whole, part = (sample_utterance(0, "train", index, most_words=most)["transcript"] for most in (None, 3))
        assert len(part.split()) <= 3
        assert f" {part} " in f" {whole} "


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"'dev'.*'validation'"):
        sample_utterance(0, "dev", 0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build(tmp_path_factory.mktemp("nano") / "corpus", {"train": 5, "validation": 2, "test": 3})


def test_load_dataset_reads_it_and_only_parquet_is_left(corpus):
    assert sorted(file.name for file in corpus.iterdir()) == ["test.parquet", "train.parquet", "validation.parquet"]
    dataset = load_dataset(str(corpus))
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 5, "validation": 2, "test": 3}
    assert dataset["train"].column_names == ["id", "audio", "transcript", "duration", "voice"]
    assert dataset["train"].with_format(None)["transcript"] == [row(0, "train", i)["transcript"] for i in range(5)]


def test_a_stored_row_is_the_row(corpus):
    assert read(corpus, "test") == [row(0, "test", index) for index in range(3)]


def test_splits_share_no_sentence(corpus):
    texts = {split: {line["transcript"] for line in read(corpus, split)} for split in ("train", "validation", "test")}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]


def test_rows_do_not_depend_on_the_number_of_workers(corpus, tmp_path):
    build(tmp_path, {"train": 5}, num_proc=2)
    assert read(tmp_path, "train") == read(corpus, "train")


def test_a_whole_split_is_kept_and_one_of_other_rows_is_not(tmp_path, monkeypatch):
    built = []
    original = nano_speech._build_split
    monkeypatch.setattr(nano_speech, "_build_split", lambda *args: (built.append(args[1:4]), original(*args)))
    build(tmp_path, {"train": 2, "test": 1})
    build(tmp_path, {"train": 2, "test": 2})
    build(tmp_path, {"train": 2, "test": 2}, seed=1)
    assert built == [("train", 2, 0), ("test", 1, 0), ("test", 2, 0), ("train", 2, 1), ("test", 2, 1)]
    assert [line["id"] for line in read(tmp_path, "test")] == ["nano-test-1-000000", "nano-test-1-000001"]


def samples_of(line):
    return soundfile.read(io.BytesIO(line["audio"]["bytes"]))[0]


@pytest.mark.parametrize("snr", [20, 0, -5])
def test_noise_has_the_power_that_is_asked_for_and_is_the_same_each_time(snr):
    clean, noisy = samples_of(row(0, "test", 3)), samples_of(row(0, "test", 3, snr))
    assert row(0, "test", 3, snr) == row(0, "test", 3, snr)
    loudness = (noisy @ clean) / (clean @ clean)  # less than 1 if the sum would exceed [-1, 1]
    noise = noisy / loudness - clean
    assert 10 * np.log10((clean**2).mean() / (noise**2).mean()) == pytest.approx(snr, abs=0.2)
    assert np.abs(noisy).max() <= 1


def test_noise_differs_from_clip_to_clip_and_is_white():
    silence = np.full(16_000, 1e-3, np.float32)
    first, second = (nano_speech.in_noise(silence, -40, 0, "test", index) for index in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    spectrum = np.abs(np.fft.rfft(first)) ** 2
    assert spectrum[:4000].mean() == pytest.approx(spectrum[4000:].mean(), rel=0.1)


def test_a_noisy_corpus_is_not_taken_for_a_clean_one(tmp_path):
    build(tmp_path, {"test": 2})
    build(tmp_path, {"test": 2}, snr=10)
    assert read(tmp_path, "test") == [row(0, "test", index, 10) for index in range(2)]
    assert [line["id"] for line in read(tmp_path, "test")] == ["nano-test-0-000000-10dB", "nano-test-0-000001-10dB"]


@pytest.mark.parametrize("snr", [float("nan"), float("inf")])
def test_a_ratio_that_is_no_number_is_refused(tmp_path, snr):
    with pytest.raises(ValueError, match="signal-to-noise ratio is (nan|inf) dB"):
        build(tmp_path / "corpus", {"test": 1}, snr=snr)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("sizes", [{"dev": 3}, {"train": 0}, {"train": 2, "test": -1}])
def test_invalid_sizes_are_refused_before_anything_is_written(tmp_path, sizes):
    with pytest.raises(ValueError, match=r"cannot build -?\d+ rows of split '(dev|train|test)'"):
        build(tmp_path / "corpus", sizes)
    assert not (tmp_path / "corpus").exists()


def test_a_full_disk_is_an_error_before_anything_is_synthesised(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"3 MiB free, but the corpus needs about 191 MiB"):
        build(tmp_path, {"train": 1000})
    assert list(tmp_path.iterdir()) == []


def crash(*args, **kwargs):
    raise KeyboardInterrupt


def half_written(self, path, *args, **kwargs):
    with open(path, "wb") as file:
        file.write(b"PAR1 and no more")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "name", "failure"), [(nano_speech, "speak", crash), (Dataset, "to_parquet", half_written)]
)
def test_an_interrupted_build_leaves_no_corpus_and_a_second_one_completes(tmp_path, monkeypatch, owner, name, failure):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failure)
        with pytest.raises(BaseException):  # noqa: B017  the kind of error depends on where the interrupt happens
            build(tmp_path, {"test": 2})
    assert not list(tmp_path.glob("*.parquet"))
    build(tmp_path, {"test": 2})
    assert read(tmp_path, "test") == [row(0, "test", index) for index in range(2)]
    assert [file.name for file in tmp_path.iterdir()] == ["test.parquet"]


def test_clips_are_speech_not_silence(corpus):
    for line in read(corpus, "train"):
        audio, _ = soundfile.read(io.BytesIO(line["audio"]["bytes"]))
        assert np.sqrt((audio**2).mean()) > 0.01
        assert 1.0 < line["duration"] < 6.0


def test_a_speaker_says_the_same_in_any_process(monkeypatch):
    monkeypatch.setattr(nano_speech, "LOADS", 2)  # then a second process takes over, and a third one
    speaker = nano_speech.Speaker(0, "train")
    rows = [speaker.row(index) for index in (3, 1, 3, 1, 7)]
    assert speaker.process is not None
    assert rows == [nano_speech.row(0, "train", index) for index in (3, 1, 3, 1, 7)]
    speaker.close()


def test_an_error_says_that_the_speech_synthesis_was_killed(monkeypatch):
    monkeypatch.setattr(nano_speech, "LOADS", 1)
    speaker = nano_speech.Speaker(0, "train")
    speaker.row(0)
    speaker.row(1)
    speaker.process.kill()
    monkeypatch.setattr(nano_speech, "LOADS", 9)
    with pytest.raises(ChildProcessError, match="ended with exit code -9"):
        speaker.row(2)
