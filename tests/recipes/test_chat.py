"""Talking to a checkpoint: the same answers as evaluation gives, each clip encoded once."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from language_models.generation import GREEDY, read_answers
from recipes import chat as command
from recipes.chat import Conversation, main
from recipes.listening.speech_llm import Lsm


@pytest.fixture
def write_wav(clip, tmp_path):
    def write(name: str, seed: int) -> str:
        soundfile.write(tmp_path / name, clip(1.3 + 0.2 * seed, seed), 16_000, subtype="FLOAT")
        return str(tmp_path / name)

    return write


@pytest.fixture
def wav(write_wav):
    return write_wav("clip.wav", 0)


@pytest.fixture
def other_wav(write_wav):
    return write_wav("the other clip.wav", 1)


@pytest.fixture
def run(lsm_dir, monkeypatch, capsys):
    """`run(options, typed)` chats with the tiny LSM; it returns the exit status, stdout and stderr."""

    def start(*options: str, typed: tuple[str, ...] = ()) -> tuple[int, str, str]:
        lines = iter(typed)

        def type_in(prompt):
            if (line := next(lines, None)) is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", type_in)
        monkeypatch.setattr(command, "NANO", lsm_dir)
        monkeypatch.setattr(sys, "argv", ["chat", "--max-new-tokens", "3", *options])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, *capsys.readouterr()

    return start


@pytest.fixture
def asked(monkeypatch):
    """What is asked, with the names of the clips."""
    asked = []
    monkeypatch.setattr(Conversation, "ask", lambda self, text, streamer: asked.append((text, list(self.audio))))
    return asked


@pytest.fixture
def microphone(monkeypatch):
    """A `sounddevice` that hears noise, and remembers what it was asked for."""
    calls = []

    def rec(frames, **settings):
        calls.append({"frames": frames, **settings})
        return np.random.default_rng(0).normal(0, 0.1, (frames, 1)).astype(np.float32)

    class PortAudioError(Exception):
        pass

    query = {"default_samplerate": 44_100.0}
    fake = SimpleNamespace(rec=rec, query_devices=lambda kind: query, PortAudioError=PortAudioError, calls=calls)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    return fake


def said(*content) -> dict:
    return {"role": "user", "content": [part if isinstance(part, dict) else text(part) for part in content]}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def heard(path: str) -> dict:
    return {"type": "audio", "audio": path}


def answer_to(chat: Conversation, *messages: dict) -> str:
    """The answer to messages with the clips themselves."""
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = chat.processor.apply_chat_template(list(messages), **settings)
    output = chat.model.generate(**inputs, **GREEDY, max_new_tokens=chat.max_new_tokens)
    return read_answers(chat.processor.tokenizer, output[:, inputs["input_ids"].shape[1] :].tolist())[0]


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


@pytest.mark.parametrize("instruction_first", [True, False])
def test_several_clips_are_encoded_once_and_asked_about_in_their_order(
    lsm_dir, wav, other_wav, monkeypatch, instruction_first
):
    chat = Conversation(str(lsm_dir), [wav, other_wav], max_new_tokens=8)
    monkeypatch.setattr(chat.processor, "instruction_first", instruction_first)
    clips, words = [heard(wav), heard(other_wav)], [text("what is said")]
    expected = answer_to(chat, said(*(words + clips if instruction_first else clips + words)))
    assert expected != answer_to(chat, said(*words, *reversed(clips)))
    monkeypatch.setattr(chat.model.model.audio_tower, "forward", lambda *_, **__: pytest.fail("encoded again"))
    assert chat.ask("what is said") == chat.ask("what is said") == expected


def test_with_turns_an_answer_depends_on_the_earlier_ones(lsm_dir, wav):
    chat = Conversation(str(lsm_dir), wav, max_new_tokens=8, turns=True)
    opening = said("what is said", heard(wav))
    first = chat.ask("what is said")
    assert first == answer_to(chat, opening)
    with pytest.raises(ValueError):  # a question that fails leaves nothing behind
        chat.ask("what " * 3000)
    then = [opening, {"role": "assistant", "content": first}, said("what is asked")]
    assert chat.ask("what is asked") == answer_to(chat, *then)
    chat.reset()
    assert chat.ask("what is said") == first
    chat.listen([wav])  # what was said about other clips is forgotten
    assert chat.ask("what is said") == first


def test_an_answer_says_whether_it_ended_and_how_long_it_is(lsm_dir, wav):
    chat = Conversation(str(lsm_dir), wav, max_new_tokens=4)
    cut = chat.answer("what is said")
    assert (cut.finish, cut.tokens) == ("length", 4) and cut.seconds > 0 and cut.text == chat.ask("what is said")
    chat.model.generation_config.eos_token_id = list(range(len(chat.processor.tokenizer)))
    assert (ended := chat.answer("what is said")).finish == "stop" and ended.tokens == 1


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


def test_the_shipped_checkpoint_is_the_default(run, asked):
    assert Path(__file__).parents[2] / "assets" / "nano" / "lsm" == command.NANO and command.NANO.is_dir()
    assert run("--instruction", "what")[0] == 0 and asked == [("what", [])]


def test_a_wheel_has_no_default(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "NANO", tmp_path / "nothing")
    monkeypatch.setattr(sys, "argv", ["chat", "--instruction", "what"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "the following arguments are required: --model" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_an_error_of_usage(run):
    status, out, err = run("--model", "/no/such/folder", "--instruction", "what")
    assert status == 2 and out == "" and "/no/such/folder" in err


def test_clips_are_loaded_while_chatting(run, asked, wav, other_wav):
    lines = (
        "what",
        f"/load '{other_wav}' {wav}",
        "what",
        "/load missing.wav",
        "what",
        "/load",
        "/load it's.wav",
        "what",
    )
    _, out, err = run("--audio", wav, "--audio", wav, typed=lines)
    assert [clips for _, clips in asked] == [[wav, wav], *[[other_wav, wav]] * 3]
    assert "! Cannot read missing.wav as audio" in out and "! /load needs a file" in out
    assert "! /load it's.wav: No closing quotation" in out
    assert f"Clips: {other_wav}, {wav}" in err


def test_turns_are_kept_where_that_is_asked_for_and_reset(run, monkeypatch):
    lengths = []
    forget = Conversation.reset

    def reset(self):
        lengths.append(len(getattr(self, "earlier", [])))
        forget(self)

    monkeypatch.setattr(Conversation, "reset", reset)
    run(typed=("what", "is", "/reset"))
    assert lengths.pop() == 0
    run("--turns", typed=("what", "is", "/reset"))
    assert lengths.pop() == 4


def test_commands_begin_with_a_slash_and_instructions_with_two(run, asked):
    status, out, err = run(typed=("//etc is what?", "/play it", "/help", "/quit now", "never asked"))
    assert status == 0 and asked == [("/etc is what?", [])]
    assert "! /play is unknown; expected one of /load, /record, /reset, /help, /quit" in out
    assert "/record [SECONDS]" in err
    run("--instruction", "/help")  # options are never commands
    assert asked.pop() == ("/help", [])


def test_an_interrupted_answer_leaves_nothing_for_the_next_to_print(run, monkeypatch):
    answer = Conversation.answer

    def interrupted(self, instruction, streamer):
        if instruction == "stop":
            streamer.next_tokens_are_prompt = False
            raise KeyboardInterrupt
        return answer(self, instruction, streamer)

    monkeypatch.setattr(Conversation, "answer", interrupted)
    _, expected, _ = run(typed=("what",))
    assert run(typed=("stop", "what"))[1] == f"! KeyboardInterrupt\n{expected}"


def test_the_microphone_is_recorded_at_its_own_rate(run, asked, microphone, monkeypatch):
    loaded, listen = [], Conversation.listen
    monkeypatch.setattr(Conversation, "listen", lambda self, clips: (loaded.append(clips), listen(self, clips)))
    assert "Recording for 0.5 s" in run(typed=("/record 0.5", "what", "/record"))[2]
    assert asked == [("what", ["microphone"])]
    assert [call["frames"] for call in microphone.calls] == [22_050, 5 * 44_100]
    assert microphone.calls[0]["samplerate"] == 44_100 and microphone.calls[0]["channels"] == 1
    assert loaded[1][0].shape == (8_000,)


@pytest.mark.parametrize("seconds", ["0", "nan", "1e9", "long"])
def test_a_recording_has_a_length(run, microphone, seconds):
    out = run(typed=(f"/record {seconds}",))[1]
    assert f"! /record {seconds}: expected seconds from 0.1 to 600, as in: /record 5" in out
    assert not microphone.calls


def test_without_a_microphone_it_says_what_is_missing(run, microphone, monkeypatch):
    def no_device(kind):
        raise microphone.PortAudioError("Error querying device -1")

    microphone.query_devices = no_device
    assert "! The microphone cannot be used: Error querying device -1" in run(typed=("/record",))[1]
    monkeypatch.setitem(sys.modules, "sounddevice", None)  # as if not installed
    assert "pip install sounddevice" in run(typed=("/record",))[1]


def test_scripts_get_json_and_nothing_else(run, wav, other_wav, lsm_dir):
    options = ("--json", "--audio", wav, "--audio", other_wav)
    status, out, _ = run(*options, "--instruction", "what is said", "--instruction", "what " * 3000)
    answered, failed = map(json.loads, out.splitlines())
    assert status == 1 and set(failed) == {"instruction", "error"} and "positions" in failed["error"]
    assert list(answered) == ["audio", "instruction", "answer", "seconds", "tokens", "finish"]
    assert answered["audio"] == [wav, other_wav] and answered["instruction"] == "what is said"
    assert answered["answer"] == Conversation(str(lsm_dir), [wav, other_wav], max_new_tokens=3).ask("what is said")
    assert (answered["tokens"], answered["finish"]) == (3, "length")


def test_scripts_may_give_commands_too(run, wav):
    status, out, _ = run("--json", typed=(f"/load {wav}", "what", "/help", "/play", "//what"))
    first, failed, last = map(json.loads, out.splitlines())
    assert status == 1 and first["audio"] == last["audio"] == [wav]
    assert failed["instruction"] == "/play" and "is unknown" in failed["error"] and last["instruction"] == "/what"
