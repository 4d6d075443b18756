"""Talking to a checkpoint: the same answers as evaluation gives, the clip encoded once."""

import sys

import pytest
import soundfile

from recipes.chat import Conversation, main
from recipes.listening.speech_llm import Lsm


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


def test_a_session_survives_whatever_is_typed(lsm_dir, wav, monkeypatch, capsys):
    typed = iter(["What is <|audio|>?", "</s><s>", "a long one", "stop that", "what is said"])
    failures = {"a long one": RuntimeError("out of memory"), "stop that": KeyboardInterrupt()}
    answered, ask = [], Conversation.ask

    def type_in(prompt):
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    def answer(self, instruction, streamer):
        if instruction in failures:
            raise failures[instruction]
        answered.append(ask(self, instruction, streamer))

    monkeypatch.setattr("builtins.input", type_in)
    monkeypatch.setattr(Conversation, "ask", answer)
    monkeypatch.setattr(sys, "argv", ["chat", "--model", str(lsm_dir), "--audio", wav, "--max-new-tokens", "2"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0 and len(answered) == 3
    printed = capsys.readouterr().out
    assert "! out of memory" in printed and "! KeyboardInterrupt" in printed


def test_a_text_llm_hears_nothing(llm_dir, wav, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chat", "--model", str(llm_dir), "--audio", wav])
    with pytest.raises(SystemExit):
        main()
    assert "is a text LLM and cannot hear; leave out --audio, or name an LSM." in capsys.readouterr().err
