"""Ask a model about clips, with streamed answers.

    python -m recipes.chat --audio clip.wav --instruction "Translate the speech into Spanish."
    python -m recipes.chat --model runs/quickstart/checkpoint --audio first.wav --audio second.wav --turns

Without `--instruction`, instructions are read from the terminal or, line by line, from stdin; `/help` lists the
commands that may stand between them. Each clip is encoded only once. Without `--audio`, this is a text chat. With
`--json`, stdout has one JSON object per answer or error, for scripts; the exit status is 1 if there was an error.
"""

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import TextStreamer

from language_models.command_line import parser_of
from language_models.generation import GREEDY, read_answers
from processing_lsm import load_audio
from recipes.listening.speech_llm import Lsm, load

Clips = str | Path | Sequence[str | Path]
NANO = Path(__file__).resolve().parents[1] / "assets" / "nano" / "lsm"  # only in a checkout
LONGEST = 600  # seconds of a recording
COMMANDS = {
    "/load": "/load FILE [FILE...]  replace the clips, and forget earlier turns",
    "/record": "/record [SECONDS]     replace the clips by what the microphone hears (5 s), and forget earlier turns",
    "/reset": "/reset                forget earlier turns",
    "/help": "/help                 show this; an instruction that begins with / is typed with //",
    "/quit": "/quit                 leave",
}


class Answer(NamedTuple):
    """An answer, the time it took, its number of tokens (with that of the end), and whether it was cut ("length")."""

    text: str
    seconds: float
    tokens: int
    finish: str  # "stop" or "length"


class Conversation:
    """Answers instructions about clips (or without any).

    Args:
        model: Hub id or folder of an LSM, or of a text LLM.
        audio: path or URL of a clip, or several, or None for text only.
        max_new_tokens: longest answer, in tokens.
        turns: whether earlier instructions and their answers stay in the prompt; otherwise, each instruction is
            answered independently of the others.

    Raises:
        ValueError: a clip cannot be read, a clip is given to a text LLM, or the model is another speech LLM.
    """

    def __init__(self, model: str, audio: Clips | None = None, max_new_tokens: int = 256, turns: bool = False):
        llm = load(model)
        if not isinstance(llm, Lsm):
            raise ValueError(f"{model} is a {type(llm.model).__name__}; expected an LSM or a text LLM.")
        self.name, self.hears, self.model, self.processor = model, llm.hears, llm.model, llm.processor
        self.max_new_tokens, self.turns = max_new_tokens, turns
        self.listen([audio] if isinstance(audio, str | Path) else audio or [])

    @torch.inference_mode()
    def listen(self, clips: Sequence[str | Path | np.ndarray]) -> None:
        """Replace the clips, which may be what the microphone recorded at 16 kHz, and forget earlier turns. If a clip
        is refused, nothing changes.

        Raises:
            ValueError: a clip cannot be read, or the model is a text LLM.
        """
        if clips and not self.hears:
            raise ValueError(f"{self.name} is a text LLM and cannot hear; leave out --audio, or name an LSM.")
        features = (self.processor(audio=clip, return_tensors="pt").to(self.model.device) for clip in clips)
        self.heard = [self.model.get_audio_features(**feature) for feature in features]
        self.audio = ["microphone" if isinstance(clip, np.ndarray) else str(clip) for clip in clips]
        self.reset()

    def reset(self) -> None:
        """Forget earlier turns."""
        self.earlier: list[dict] = []

    def ask(self, instruction: str, streamer: TextStreamer | None = None) -> str:
        """Return the greedy answer. `streamer` gets it token by token, including any thought before it."""
        return self.answer(instruction, streamer).text

    @torch.inference_mode()
    def answer(self, instruction: str, streamer: TextStreamer | None = None) -> Answer:
        """Return the greedy answer with its length and how it ended; otherwise as `ask`."""
        start = time.perf_counter()
        messages = [*self.earlier, self._question(instruction)]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        output = self.model.generate(**inputs, **GREEDY, max_new_tokens=self.max_new_tokens, streamer=streamer)
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        [text] = read_answers(self.processor.tokenizer, [tokens])
        if self.turns:
            self.earlier = [*messages, {"role": "assistant", "content": text}]
        ends = self.model.generation_config.eos_token_id or self.processor.tokenizer.eos_token_id
        ended = set(tokens[-1:]) & set(ends if isinstance(ends, list) else [ends])
        return Answer(text, time.perf_counter() - start, len(tokens), "stop" if ended else "length")

    def _question(self, instruction: str) -> dict:
        """Return the user's message: `LsmProcessor.conversation` with all clips in the first one."""
        clips = [] if self.earlier else [{"type": "audio", "audio": heard} for heard in self.heard]
        text = [{"type": "text", "text": instruction}] if instruction or not clips else []
        return {"role": "user", "content": text + clips if self.processor.instruction_first else clips + text}


def record(seconds: str) -> np.ndarray:
    """Return what the microphone hears, at 16 kHz, in the seconds that were typed, or in 5.

    Raises:
        ValueError: the length is not valid, sounddevice is not installed, or there is no microphone.
    """
    try:
        length = float(seconds or 5)
    except ValueError:
        length = 0.0
    if not 0.1 <= length <= LONGEST:
        raise ValueError(f"/record {seconds}: expected seconds from 0.1 to {LONGEST}, as in: /record 5")
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError if PortAudio is not there
        reason = f"/record needs sounddevice ({error}): pip install sounddevice, and on Linux also libportaudio2."
        raise ValueError(reason) from error
    try:
        rate = int(sounddevice.query_devices(kind="input")["default_samplerate"])
        print(f"Recording for {length:g} s ...", file=sys.stderr)
        samples = sounddevice.rec(round(length * rate), samplerate=rate, channels=1, dtype="float32", blocking=True)
    except (sounddevice.PortAudioError, ValueError) as error:
        raise ValueError(f"The microphone cannot be used: {error}. Is one connected, and allowed?") from error
    return load_audio(samples[:, 0], rate)


def main() -> None:
    parser = parser_of(__doc__)
    shipped = {"default": str(NANO)} if NANO.is_dir() else {"required": True}
    parser.add_argument("--model", **shipped, help="folder or Hub id of an LSM or a text LLM (assets/nano/lsm)")
    parser.add_argument("--audio", action="append", help="audio file or URL (any rate); may be given several times")
    parser.add_argument("--instruction", action="append", help="instruction to answer; may be given several times")
    parser.add_argument("--turns", action="store_true", help="keep earlier instructions and answers in the prompt")
    parser.add_argument("--json", action="store_true", help="write one JSON object per answer, and nothing else")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    args = parser.parse_args()
    try:
        chat = Conversation(args.model, args.audio, args.max_new_tokens, args.turns)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    failed = 0
    for line in args.instruction or _typed("" if args.json else "> "):
        command = not args.instruction and line.startswith("/")
        if command and line.startswith("//"):
            command, line = False, line[1:]
        try:
            _obey(chat, line) if command else _answer(chat, line, args)
        except (ValueError, RuntimeError, TemplateError, KeyboardInterrupt) as error:  # the next may work
            failed += 1
            reason = str(error) or type(error).__name__
            print(json.dumps({"instruction": line, "error": reason}) if args.json else f"! {reason}", flush=True)
    sys.exit(int(bool(failed and (args.instruction or args.json))))


def _answer(chat: Conversation, instruction: str, args: argparse.Namespace) -> None:
    """Print an answer: token by token, or as JSON."""
    if not args.json:
        if args.instruction:
            print(f"> {instruction}")
        # A new one each time, because one that was interrupted would print the next prompt.
        chat.ask(instruction, TextStreamer(chat.processor.tokenizer, skip_prompt=True, skip_special_tokens=True))
        return
    text, seconds, tokens, finish = chat.answer(instruction)
    answer = {"answer": text, "seconds": round(seconds, 3), "tokens": tokens, "finish": finish}
    print(json.dumps({"audio": chat.audio, "instruction": instruction, **answer}), flush=True)


def _obey(chat: Conversation, line: str) -> None:
    """Do what a command says, or raise a ValueError. Notices go to stderr, because stdout has the answers."""
    name, rest = (*line.split(maxsplit=1), "")[:2]
    if name not in COMMANDS:
        raise ValueError(f"{name} is unknown; expected one of {', '.join(COMMANDS)}, or // for an instruction with /.")
    if name == "/help":
        print("\n".join(COMMANDS.values()), file=sys.stderr)
    elif name == "/reset":
        chat.reset()
    else:
        chat.listen(_files(rest) if name == "/load" else [record(rest.strip())])
        print(f"Clips: {', '.join(chat.audio)}", file=sys.stderr)


def _files(names: str) -> list[str]:
    try:
        files = [os.path.expanduser(name) for name in shlex.split(names)]
    except ValueError as error:
        raise ValueError(f"/load {names}: {error}; put a name with spaces or quotes into quotes.") from error
    if not files:
        raise ValueError("/load needs a file, as in: /load clip.wav")
    return files


def _typed(prompt: str) -> Iterator[str]:
    """Yield the lines that are typed, until `/quit`, or until the input ends or is interrupted."""
    with contextlib.suppress(AttributeError):  # one undecodable byte would cost all lines that were read with it
        sys.stdin.reconfigure(errors="replace")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (line := input(prompt)).split()[:1] != ["/quit"]:
            if line.strip():
                yield line


if __name__ == "__main__":
    main()
