"""Talking to a checkpoint: the same answers as evaluation gives, the clip encoded once."""

import pytest
import soundfile

from recipes.chat import Conversation
from recipes.speech_llm import Lsm


@pytest.fixture
def wav(clip, tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, clip(1.3), 16_000, subtype="FLOAT")
    return str(path)


def test_many_questions_about_one_clip_encode_it_once(lsm_dir, wav, monkeypatch):
    chat = Conversation(str(lsm_dir), wav, max_new_tokens=5)
    monkeypatch.setattr(chat.model.model.audio_tower, "forward", lambda *_, **__: pytest.fail("encoded again"))
    assert chat.ask("what is said") == chat.ask("what is said")
    chat.ask("what is asked")


def test_chat_answers_as_evaluation_does(lsm_dir, wav):
    chat = Conversation(str(lsm_dir), wav, max_new_tokens=8)
    row = {"instruction": "what is said", "audio": {"bytes": None, "path": wav}}
    [expected] = Lsm(chat.model, chat.processor).respond([row], max_new_tokens=8, progress=False)
    assert chat.ask("what is said") == expected.text


def test_without_audio_it_is_a_text_chat(lsm_dir):
    chat = Conversation(str(lsm_dir), max_new_tokens=3)
    assert isinstance(chat.ask("what is asked"), str)


def test_a_file_that_is_no_audio_is_refused(lsm_dir, tmp_path):
    path = tmp_path / "notes.wav"
    path.write_text("not audio")
    with pytest.raises(ValueError, match="notes.wav"):
        Conversation(str(lsm_dir), str(path))
