"""Ask a model about a clip, with streamed answers.

    python -m recipes.chat --model runs/quickstart/checkpoint --audio runs/quickstart/example.wav \
        --instruction "Translate the speech into Spanish."

Without `--instruction`, instructions are read from the terminal; the clip is encoded only once. Without `--audio`, this
is a text chat.
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from jinja2 import TemplateError
from transformers import TextStreamer

from language_models.generation import GREEDY, read_answers
from recipes.listening.speech_llm import Lsm, load


class Conversation:
    """Answers instructions about a clip (or without one), each independently of the others.

    Args:
        model: Hub id or folder of an LSM, or of a text LLM.
        audio: path or URL of a clip, or None for text only.
        max_new_tokens: longest answer, in tokens.

    Raises:
        ValueError: the clip cannot be read, a clip is given to a text LLM, or the model is another speech LLM.
    """

    def __init__(self, model: str, audio: str | None = None, max_new_tokens: int = 256):
        llm = load(model)
        if not isinstance(llm, Lsm):
            raise ValueError(f"{model} is a {type(llm.model).__name__}; expected an LSM or a text LLM.")
        if audio is not None and not llm.hears:
            raise ValueError(f"{model} is a text LLM and cannot hear; leave out --audio, or name an LSM.")
        self.model, self.processor = llm.model, llm.processor
        self.max_new_tokens = max_new_tokens
        self.heard = None if audio is None else self._listen(audio)

    @torch.inference_mode()
    def _listen(self, audio: str):
        features = self.processor(audio=audio, return_tensors="pt").to(self.model.device)
        return self.model.get_audio_features(**features)

    @torch.inference_mode()
    def ask(self, instruction: str, streamer: TextStreamer | None = None) -> str:
        """Return the greedy answer. `streamer` gets it token by token, including any thought before it."""
        inputs = self.processor.apply_chat_template(
            self.processor.conversation(instruction, audio=self.heard),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        output = self.model.generate(**inputs, **GREEDY, max_new_tokens=self.max_new_tokens, streamer=streamer)
        return read_answers(self.processor.tokenizer, output[:, inputs["input_ids"].shape[1] :].tolist())[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of an LSM or a text LLM")
    parser.add_argument("--audio", help="audio file or URL (any sampling rate, mono or stereo)")
    parser.add_argument("--instruction", action="append", help="instruction to answer; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    args = parser.parse_args()
    try:
        chat = Conversation(args.model, args.audio, args.max_new_tokens)
    except ValueError as error:
        parser.error(str(error))
    streamer = TextStreamer(chat.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed = 0
    for instruction in args.instruction or _typed():
        if args.instruction:
            print(f"> {instruction}")
        try:
            chat.ask(instruction, streamer)
        except (ValueError, RuntimeError, TemplateError, KeyboardInterrupt) as error:  # the next may work
            failed += 1
            print(f"! {str(error) or type(error).__name__}")
    sys.exit(int(bool(failed and args.instruction)))


def _typed() -> Iterator[str]:
    """Yield the lines that are typed, until the input ends or is interrupted."""
    while True:
        try:
            instruction = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            print(f"! {error}")
            continue
        if instruction.strip():
            yield instruction


if __name__ == "__main__":
    main()
