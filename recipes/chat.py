"""Talk to a checkpoint: a clip, an instruction, a streamed answer.

    python -m recipes.chat --model runs/quickstart/checkpoint --audio runs/quickstart/example.wav \
        --instruction "Translate the speech into Spanish."

Without `--instruction` it asks for one after another; the clip is encoded once for all of them. Without `--audio` it
is a text chat.
"""

import argparse

import torch
from transformers import TextStreamer

from dataset_builders.text_llm import GREEDY
from recipes.speech_llm import load


class Conversation:
    """One clip (or none) and any number of instructions about it, each answered on its own.

    Args:
        model: Hub id or folder of an LSM.
        audio: path or URL of a clip, or None for text alone.

    Raises:
        ValueError: the clip cannot be read.
    """

    def __init__(self, model: str, audio: str | None = None, max_new_tokens: int = 256):
        llm = load(model)
        self.model, self.processor = llm.model, llm.processor
        self.max_new_tokens = max_new_tokens
        self.heard = None if audio is None else self._listen(audio)

    @torch.inference_mode()
    def _listen(self, audio: str):
        features = self.processor(audio=audio, return_tensors="pt").to(self.model.device)
        return self.model.get_audio_features(**features)

    @torch.inference_mode()
    def ask(self, instruction: str, streamer: TextStreamer | None = None) -> str:
        """The greedy answer; `streamer` receives it as it is written."""
        inputs = self.processor.apply_chat_template(
            self.processor.conversation(instruction, audio=self.heard),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        output = self.model.generate(**inputs, **GREEDY, max_new_tokens=self.max_new_tokens, streamer=streamer)
        return self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--audio", help="audio file: any rate, mono or stereo, any length")
    parser.add_argument("--instruction", action="append", help="ask this and stop; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()
    chat = Conversation(args.model, args.audio, args.max_new_tokens)
    streamer = TextStreamer(chat.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for instruction in args.instruction or []:
        print(f"> {instruction}")
        chat.ask(instruction, streamer)
    while not args.instruction:
        try:
            instruction = input("> ")
        except EOFError:
            break
        if instruction.strip():
            chat.ask(instruction, streamer)


if __name__ == "__main__":
    main()
