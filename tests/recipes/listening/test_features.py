"""The frozen tower's output on disk: the same model behind it, whole or absent."""

import copy
import io

import numpy as np
import pytest
import soundfile
import torch
from corpus_files import write

from configuration_lsm import LsmConfig
from dataset_builders.corpora.opening import load_corpus
from recipes import store_features
from recipes.listening import features as audio_features
from recipes.listening.collator import SpeechResponseCollator
from recipes.listening.features import AudioFeatureStore, audio_key, warn_of_language
from recipes.listening.speech_llm import Lsm


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


def test_a_whole_store_is_opened_not_made_again(store, lsm, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(audio_features, "_write", None)
    again = AudioFeatureStore.build(tmp_path / "features", lsm, processor, [])
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


@pytest.mark.parametrize("torn", [b"", b'["half a li', b'["clip whose frames are lost", 9, 9000]\n'])
def test_a_killed_build_goes_on_from_what_it_had_encoded(lsm, processor, rows, store, tmp_path, monkeypatch, torn):
    """Also from a kill in the middle of a write, and a power cut that lost what was written last."""
    audio, encode, encoded = [row["audio"] for row in rows], audio_features._encode, []

    def until(stop):
        def counted(file, clips, span, *args):
            if len(encoded) == stop:
                file.write(b"half an array")
                raise KeyboardInterrupt
            encoded.append(set(span))
            encode(file, clips, span, *args)

        return counted

    monkeypatch.setattr(audio_features, "SPAN_BATCHES", 1)
    monkeypatch.setattr(audio_features, "_encode", until(2))
    with pytest.raises(KeyboardInterrupt):
        AudioFeatureStore.build(tmp_path / "killed", lsm, processor, audio, batch_size=3)
    with (tmp_path / "killed.partial" / audio_features.CLIPS).open("ab") as known:
        known.write(torn)
    monkeypatch.setattr(audio_features, "_encode", until(None))
    killed = AudioFeatureStore.build(tmp_path / "killed", lsm, processor, audio, batch_size=3)
    assert [len(span) for span in encoded] == [3, 3, 2] and len(set.union(*encoded)) == 8  # none again
    for key in store.clips:
        expected, found = store.batch([key])["audio_hidden_states"], killed.batch([key])["audio_hidden_states"]
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)  # float16
    assert not (tmp_path / "killed.partial").exists()


@pytest.fixture
def other_lsm(lsm):
    """The same model with another encoder."""
    other = copy.deepcopy(lsm)
    other.model.audio_tower.layers[0].fc1.weight.data[0, 0] += 1
    return other


def test_a_store_of_another_encoder_is_refused(store, lsm, other_lsm, processor):
    with pytest.raises(
        ValueError, match=r"features was built with another model \(encoder sha256:\w+, not sha256:\w+\); delete it"
    ):
        AudioFeatureStore.build(store.folder, other_lsm, processor, [])
    other = copy.deepcopy(lsm)
    other.config.audio_padding = "max_length"
    with pytest.raises(ValueError, match=r"another model \(padding longest, not max_length\)"):
        store.check(other)


def test_models_with_one_encoder_share_a_store_whatever_type_they_are_loaded_in(store, lsm):
    other = copy.deepcopy(lsm)
    torch.nn.init.normal_(other.model.projector.queries)
    assert store.check(other.to(torch.bfloat16)) is store


def test_a_part_of_what_another_encoder_hears_is_not_gone_on_with(
    lsm, other_lsm, processor, rows, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(audio_features, "SPAN_BATCHES", 1)
    audio, unreadable = [row["audio"] for row in rows], {"bytes": b"", "path": None}
    with pytest.raises(ValueError, match="Cannot read"):
        AudioFeatureStore.build(tmp_path / "some", other_lsm, processor, [*audio[:4], unreadable], batch_size=1)
    store = AudioFeatureStore.build(tmp_path / "some", lsm, processor, audio)
    assert "some.partial was begun with another encoder; building it again" in caplog.text
    assert store.check(lsm).clips.keys() == {audio_key(clip) for clip in audio}
    assert len(store.frames) == sum(frames for _, frames, _ in store.clips.values())


def test_a_store_that_does_not_say_whose_it_is_is_refused(tmp_path):
    (tmp_path / "index.json").write_text('{"width": 4, "clips": {}}')  # of an older version
    with pytest.raises(ValueError, match="does not name its encoder; delete it, so that it is built again"):
        AudioFeatureStore(tmp_path)


def test_clips_of_many_lengths_have_few_shapes_and_give_what_they_give_alone(lsm, processor, clip, tmp_path):
    """Every new shape costs memory for good (oneDNN's kernels)."""
    shapes, clips = set(), [wav(clip(0.3 + 0.013 * index, index)) for index in range(100)]
    hook = lsm.model.audio_tower.register_forward_pre_hook(lambda module, args: shapes.add(args[0].shape[1:]))
    store = AudioFeatureStore.build(tmp_path / "features", lsm, processor, clips, batch_size=1)
    hook.remove()
    assert shapes == {(80, 100), (80, 200)}
    for audio in clips[::33]:
        features = processor.audio_features([audio_features.load_audio(audio)])
        alone = lsm.model.audio_tower(*map(torch.from_numpy, features.values())).last_hidden_state
        found = store.batch([audio_key(audio)])["audio_hidden_states"]
        torch.testing.assert_close(found, alone, atol=1e-2, rtol=1e-2)  # float16


def test_a_corpus_is_stored_by_one_command(lsm_dir, corpus_dir, store, tmp_path, monkeypatch):
    output = tmp_path / "stored"
    arguments = ["--model", lsm_dir, "--corpus", corpus_dir, "--splits", "train", "--output", output]
    monkeypatch.setattr("sys.argv", ["store_features", *map(str, arguments)])
    store_features.main()
    keys = [audio_key(row["audio"]) for row in load_corpus(corpus_dir, "train")]
    assert sorted(AudioFeatureStore(output).clips) == sorted(keys)
    expected = store.batch(keys)["audio_hidden_states"]
    torch.testing.assert_close(
        AudioFeatureStore(output).batch(keys)["audio_hidden_states"], expected, atol=1e-2, rtol=0
    )
    store_features.main()  # it is whole
    assert sorted(AudioFeatureStore(output).clips) == sorted(keys)
    write(tmp_path / "other", {"a.wav": wav(np.ones(8000))["bytes"], "a.txt": "other words"})
    monkeypatch.setattr("sys.argv", ["store_features", *map(str, [*arguments, "--corpus", tmp_path / "other"])])
    store_features.main()
    assert len(AudioFeatureStore(output).clips) == len(keys) + 1  # another corpus is added


def test_a_store_grows_while_others_read_it(lsm, processor, rows, store, tmp_path, monkeypatch):
    audio, encode = [row["audio"] for row in rows], audio_features._encode
    growing = AudioFeatureStore.build(tmp_path / "growing", lsm, processor, audio[:3])
    kept = growing.batch(growing.clips)["audio_hidden_states"].clone()

    def killed(file, *args):
        file.write(b"half an array")
        file.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(audio_features, "_encode", killed)
        with pytest.raises(KeyboardInterrupt):
            AudioFeatureStore.build(tmp_path / "growing", lsm, processor, audio)
    assert AudioFeatureStore(tmp_path / "growing").clips == growing.clips

    encoded = []
    monkeypatch.setattr(audio_features, "_encode", lambda *args: (encoded.extend(args[2]), encode(*args)))
    grown = AudioFeatureStore.build(tmp_path / "growing", lsm, processor, audio)
    assert encoded == [key for key in dict.fromkeys(map(audio_key, audio)) if key not in growing]  # none again
    assert grown.clips.keys() == store.clips.keys()
    assert torch.equal(growing.batch(growing.clips)["audio_hidden_states"], kept)
    for key in store.clips:
        expected, found = store.batch([key])["audio_hidden_states"], grown.batch([key])["audio_hidden_states"]
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)  # float16


def test_a_store_that_has_all_clips_is_only_read(lsm, processor, rows, store, monkeypatch):
    monkeypatch.setattr(audio_features, "_write", None)
    again = AudioFeatureStore.build(store.folder, lsm, processor, [row["audio"] for row in rows])
    assert again.clips == store.clips


def test_a_store_that_another_process_has_built_meanwhile_gets_what_it_lacks(
    lsm, processor, rows, tmp_path, monkeypatch
):
    audio, lock = [row["audio"] for row in rows], audio_features.fcntl.flock

    def wait(index, how):
        monkeypatch.setattr(audio_features.fcntl, "flock", lock)
        AudioFeatureStore.build(tmp_path / "features", lsm, processor, audio[:5])

    monkeypatch.setattr(audio_features.fcntl, "flock", wait)
    store = AudioFeatureStore.build(tmp_path / "features", lsm, processor, audio)
    assert store.clips.keys() == {audio_key(clip) for clip in audio}


@pytest.mark.parametrize(
    "encoder, language, known",
    [
        ("openai/whisper-base", "de", True),
        ("openai/whisper-base", "got", False),
        ("openai/whisper-tiny.en", "en", True),
        ("openai/whisper-tiny.en", "de", False),
        ("openai/whisper-tiny.en", None, True),
    ],
)
def test_a_language_that_the_encoder_does_not_know(encoder, language, known, caplog):
    source = {"model": encoder, "revision": "main", "content": "sha256:0"}
    warn_of_language(LsmConfig(sources={"audio": source, "text": source}), "my corpus", language)
    assert [record.args[:3] for record in caplog.records] == ([] if known else [("my corpus", language, encoder)])
