"""Speech synthesis: the same words in the same voice give the same samples, in any order and any process."""

import re
import sys

import numpy as np
import pytest

from dataset_builders.nano.espeak import speak

SPOKEN = "the farmer sold the lamp yesterday"
FLUTTER, BREATH, RANDOM_BREATH = "en-us+f1", "en-us+f3", "en-us+caleb"  # espeak-ng varies these silently


def test_speech_is_16_khz_mono_float_in_range():
    audio = speak(SPOKEN)
    assert audio.dtype == np.float32 and audio.ndim == 1
    assert 1.0 < len(audio) / 16_000 < 4.0
    assert 0.1 < np.abs(audio).max() <= 1.0


@pytest.mark.parametrize("voice", ["en-us", FLUTTER, BREATH, RANDOM_BREATH])
def test_samples_do_not_depend_on_earlier_utterances(voice):
    first = speak(SPOKEN, voice)
    speak("hello", "en-gb-x-rp+f1", words_per_minute=300, pitch=90)
    speak("hello there", RANDOM_BREATH)
    np.testing.assert_array_equal(speak(SPOKEN, voice), first)


def test_voice_speed_and_pitch_change_the_samples():
    plain = speak(SPOKEN)
    assert len(speak(SPOKEN, words_per_minute=300)) < 0.8 * len(plain)
    for other in (speak(SPOKEN, "en-us+f2"), speak(SPOKEN, pitch=90), speak("the farmer sold the key yesterday")):
        assert len(other) != len(plain) or np.abs(other - plain).max() > 0.1


@pytest.mark.parametrize("voice", ["", "xx", "en-us+nobody"])
def test_an_unknown_voice_is_refused_by_name(voice):
    with pytest.raises(ValueError, match=re.escape(f"no voice {voice!r}")):
        speak(SPOKEN, voice)


@pytest.mark.parametrize(
    "setting", [{"words_per_minute": 79}, {"words_per_minute": 451}, {"pitch": -1}, {"pitch": 100}]
)
def test_a_setting_out_of_range_is_refused(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value} "):
        speak(SPOKEN, **setting)


@pytest.mark.parametrize("text", ["", "  \n", "..."])
def test_text_without_words_is_refused(text):
    with pytest.raises(ValueError, match="said nothing"):
        speak(text)


def test_a_missing_library_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"espeakng-loader.*pip install 'self-powered-lsm\[nano\]'"):
        speak(SPOKEN)


def test_a_library_for_another_platform_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "libespeak-ng.so"
    broken.write_bytes(b"not for this machine")
    monkeypatch.setattr("espeakng_loader.get_library_path", lambda: broken)
    with pytest.raises(ImportError, match=r"libespeak-ng.so cannot be loaded.*reinstall"):
        speak(SPOKEN)


def test_missing_data_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("espeakng_loader.get_data_path", lambda: tmp_path)
    with pytest.raises(ImportError, match="no data"):
        speak(SPOKEN)
    monkeypatch.undo()
    np.testing.assert_array_equal(speak(SPOKEN, FLUTTER), speak(SPOKEN, FLUTTER))
