"""The frozen tower's output on disk: the same model behind it, whole or absent."""

import io

import numpy as np
import pytest
import soundfile
import torch

from dataset_builders.asr_corpora import load_corpus
from recipes import audio_features
from recipes.audio_features import AudioFeatureStore, audio_key
from recipes.collator import SpeechResponseCollator
from recipes.speech_llm import Lsm


def wav(waveform, rate=16_000):
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format="WAV")
    return {"bytes": file.getvalue(), "path": "clip.wav"}


def with_keys(rows):
    return [{**row, "audio_key": audio_key(row["audio"])} for row in rows]


@pytest.fixture
def store(lsm, processor, rows, tmp_path):
    return AudioFeatureStore.build(tmp_path / "features", lsm, processor, (row["audio"] for row in rows), batch_size=3)


def test_a_store_gives_the_speech_and_the_loss_of_the_audio(store, lsm, processor, rows):
    """Up to float16: clips of odd lengths, in batches other than those they were encoded in."""
    some = rows[1::3]
    decoded = SpeechResponseCollator(processor)(some)
    stored = SpeechResponseCollator(processor, store)(with_keys(some))
    with torch.no_grad():
        expected = lsm.get_audio_features(decoded["input_features"], decoded["input_features_mask"]).pooler_output
        speech = lsm.get_audio_features(
            audio_hidden_states=stored["audio_hidden_states"], input_features_mask=stored["input_features_mask"]
        ).pooler_output
        torch.testing.assert_close(lsm(**stored).loss, lsm(**decoded).loss, atol=1e-4, rtol=0)
    assert (speech - expected).abs().max() < 0.02 * expected.std(dim=0).mean()


def test_a_store_gives_the_tokens_of_the_audio(store, processor, rows):
    decoded = SpeechResponseCollator(processor)(rows[:5])
    stored = SpeechResponseCollator(processor, store)(with_keys(rows[:5]))
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(stored[name], decoded[name])
    assert "input_features" not in stored


def test_a_store_gives_the_answers_of_the_audio(store, lsm, processor, rows):
    asked = rows[::5]
    llm, settings = Lsm(lsm, processor), {"max_new_tokens": 4, "progress": False}
    assert llm.respond(asked, store=store, **settings) == llm.respond(asked, **settings)


def test_a_clip_is_stored_once_and_known_by_its_bytes(store, rows, tmp_path):
    assert len(store.clips) == 8  # of 16 rows
    assert all(audio_key(row["audio"]) in store for row in rows)
    path = tmp_path / "same.wav"
    path.write_bytes(rows[0]["audio"]["bytes"])
    assert audio_key({"bytes": None, "path": str(path)}) == audio_key(rows[0]["audio"])
    assert store.num_samples(audio_key(rows[0]["audio"])) == round(rows[0]["duration"] * 16_000)
    assert "another clip" not in store


def test_any_rate_is_stored_as_16_khz(lsm, processor, tmp_path, clip):
    audio = wav(np.stack([clip(0.5)[::2], clip(0.5)[::2]], axis=1), 8_000)
    store = AudioFeatureStore.build(tmp_path / "features", lsm, processor, [audio])
    assert store.num_samples(audio_key(audio)) == 8_000


def test_clips_are_encoded_in_spans_that_memory_does_not_grow_with(store, lsm, processor, rows, tmp_path, monkeypatch):
    sizes, encode = [], audio_features._encode
    monkeypatch.setattr(audio_features, "SPAN_BATCHES", 1)
    monkeypatch.setattr(audio_features, "_encode", lambda *args: sizes.append(len(args[2])) or encode(*args))
    spans = AudioFeatureStore.build(tmp_path / "spans", lsm, processor, (row["audio"] for row in rows), batch_size=3)
    assert sizes == [3, 3, 2]
    for key in store.clips:
        expected, found = store.batch([key])["audio_hidden_states"], spans.batch([key])["audio_hidden_states"]
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)  # float16


def test_a_whole_store_is_opened_not_made_again(store, tmp_path, monkeypatch):
    monkeypatch.setattr(audio_features, "_write", None)
    again = AudioFeatureStore.build(tmp_path / "features", None, None, [])
    assert again.clips == store.clips


def test_a_clip_of_several_chunks_is_refused_by_its_length(lsm, processor, tmp_path):
    with pytest.raises(ValueError, match=r"clip.wav is 30.5 s long.*without --audio_feature_store"):
        AudioFeatureStore.build(tmp_path / "features", lsm, processor, [wav(np.zeros(488_000))])
    assert not (tmp_path / "features").exists()


def test_a_clip_that_cannot_be_read_is_refused(lsm, processor, tmp_path):
    with pytest.raises(ValueError, match="Cannot read"):
        AudioFeatureStore.build(tmp_path / "features", lsm, processor, [{"bytes": b"noise", "path": None}])


def test_a_killed_build_leaves_nothing_that_passes_for_a_store(lsm, processor, rows, tmp_path, monkeypatch):
    audio = [row["audio"] for row in rows]

    def half(file, *args):
        file.write(b"half an array")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(audio_features, "_encode", half)
        with pytest.raises(KeyboardInterrupt):
            AudioFeatureStore.build(tmp_path / "features", lsm, processor, audio)
    assert not (tmp_path / "features").exists()
    store = AudioFeatureStore.build(tmp_path / "features", lsm, processor, audio)
    assert len(store.clips) == 8
    assert sorted(file.name for file in tmp_path.iterdir()) == ["features"]


def test_a_corpus_is_stored_by_one_command(lsm_dir, corpus_dir, store, tmp_path, monkeypatch):
    output = tmp_path / "stored"
    arguments = ["--model", lsm_dir, "--corpus", corpus_dir, "--splits", "train", "--output", output]
    monkeypatch.setattr("sys.argv", ["audio_features", *map(str, arguments)])
    audio_features.main()
    keys = [audio_key(row["audio"]) for row in load_corpus(corpus_dir, "train")]
    assert sorted(AudioFeatureStore(output).clips) == sorted(keys)
    expected = store.batch(keys)["audio_hidden_states"]
    torch.testing.assert_close(
        AudioFeatureStore(output).batch(keys)["audio_hidden_states"], expected, atol=1e-2, rtol=0
    )
