"""What the page does, apart from its widgets: check what visitors send, ask the models, and trace an answer."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from transformers import TextIteratorStreamer

from language_models.generation import GREEDY, read_answers, without_thought
from language_models.tokenizers import text_processor
from recipes.bias.analysis import analyze
from recipes.listening.speech_llm import Lsm, SpeechLLM, TextLLM, load
from recipes.reporting.figures import plot_layers
from recipes.serving.clips import Limits, read_clip

HERE = Path(__file__).resolve().parent
ROOT = HERE if (HERE / "assets").is_dir() else HERE.parent  # a Space has the checkpoints beside the page
EXAMPLE = ROOT / "assets" / "nano" / "example.wav"
LIMITS = Limits(seconds=60.0)
TRANSCRIBE = "Please transcribe the speech."
TEXT_LLM = "text LLM"


def shipped() -> tuple[dict[str, str], str]:
    """Return the models that are here, by name, and the text LLM: the nano LSM of the repository, and what
    `make quickstart` trained as the paper did, if it was run."""
    folders = {name: ROOT / "runs" / "quickstart" / "training" / name for name in ("vanilla", "paper")}
    trained = {name: str(folder) for name, folder in folders.items() if folder.is_dir()}
    return {"ours": str(ROOT / "assets" / "nano" / "lsm")} | trained, str(ROOT / "assets" / "nano" / "llm")


def parse_models(entries: Sequence[str]) -> dict[str, str]:
    """Return folders or Hub ids by name, from entries of the form NAME=FOLDER_OR_ID.

    Raises:
        ValueError: an entry has another form, or a name is used twice.
    """
    models: dict[str, str] = {}
    for entry in entries:
        name, _, source = map(str.strip, entry.partition("="))
        if not name or not source:
            raise ValueError(f"{entry!r} is no model; expected NAME=FOLDER_OR_ID.")
        if name in models or name == TEXT_LLM:
            raise ValueError(f"The name {name!r} is taken; name each model differently.")
        models[name] = source
    return models


@dataclass
class Asked:
    """What was asked about a clip, and what was answered so far."""

    row: dict  # `audio` (a waveform), `instruction` and `transcript`, which is empty until it is known
    answers: dict[str, str] = field(default_factory=dict)  # by name; that of the text LLM is under `TEXT_LLM`
    heard: str = ""  # the transcript, if it is what the first model heard and not what the visitor typed
    done: bool = False  # whether all have answered


@dataclass
class Panel:
    """Models that listen, of which the first one also transcribes, and a text LLM that reads what was said. Answers
    have at most `most_tokens` tokens."""

    models: dict[str, SpeechLLM]
    text_llm: SpeechLLM
    most_tokens: int = 256

    @classmethod
    def open(cls, models: Mapping[str, str], text_llm: str) -> "Panel":
        """Load the checkpoints, whose folders or Hub ids are given.

        Raises:
            ValueError: a model cannot hear.
            OSError: a checkpoint is not there.
        """
        loaded = {name: load(source) for name, source in models.items()}
        if deaf := [name for name, llm in loaded.items() if not llm.hears]:
            raise ValueError(f"{deaf[0]} cannot hear; name an LSM, and the text LLM with --text-llm.")
        first, reader = next(iter(loaded.values())), load(text_llm)
        if isinstance(reader, TextLLM) and isinstance(first, Lsm):  # both get the same prompts
            reader.processor = text_processor(text_llm, first.processor.template_settings)
        return cls(loaded, reader)

    def ask(self, clip: str | None, instruction: str, transcript: str = "") -> Iterator[Asked]:
        """Ask one model after the other, and yield what is known after every word. If the transcript is empty, the
        first model transcribes the clip.

        Raises:
            ValueError: the clip or the instruction is missing or cannot be used. Says so in words for visitors.
        """
        asked = Asked(read_row(clip, instruction, transcript))
        for name, llm in self.models.items():
            for answer in stream(llm, asked.row, "audio", self.most_tokens):
                asked.answers[name] = answer
                yield asked
        if not asked.row["transcript"]:
            first, row = next(iter(self.models.values())), asked.row | {"instruction": TRANSCRIBE}
            for heard in stream(first, row, "audio", self.most_tokens):
                asked.row["transcript"] = asked.heard = heard
                yield asked
        if asked.row["transcript"]:
            for answer in stream(self.text_llm, asked.row, "transcript", self.most_tokens):
                asked.answers[TEXT_LLM] = answer
                yield asked
        asked.done = True
        yield asked

    def picture(self, asked: Asked, name: str) -> Image.Image:
        """Draw the layer-wise shares of instruction and speech in a model's answer, beside those in the text LLM's.

        Raises:
            ValueError: the model answered nothing.
        """
        if not asked.answers.get(name):
            raise ValueError(f"There is no answer of {name}, so there is nothing to draw.")
        llms = {TEXT_LLM: (self.text_llm, "transcript"), name: (self.models[name], "audio")}
        biases = {}
        for label, (llm, slot) in llms.items():
            if answer := asked.answers.get(label):
                biases[label] = analyze(llm, [asked.row | {"response": answer, "id": label}], slot)
        with tempfile.TemporaryDirectory() as folder:
            png, _ = plot_layers(biases, Path(folder) / "layers")
            return Image.open(png).convert("RGB")


def read_row(clip: str | None, instruction: str, transcript: str = "") -> dict:
    """Return the row to ask about. The clip is decoded only if its header promises no more than the limits.

    Raises:
        ValueError: something is missing or cannot be used. Says so in words for visitors.
    """
    if not clip:
        raise ValueError("There is no clip yet. Record or upload one, or take the example.")
    if not (instruction or "").strip():
        raise ValueError("There is no instruction yet. Type one, or choose a suggestion.")
    if Path(clip).stat().st_size > LIMITS.body:
        raise ValueError(f"The file is too large; {LIMITS.body // 2**20} MB are the limit.")
    audio = read_clip(Path(clip).read_bytes(), LIMITS)
    return {"audio": audio, "instruction": instruction.strip(), "transcript": (transcript or "").strip()}


def stream(llm: SpeechLLM, row: dict, slot: str, most_tokens: int) -> Iterator[str]:
    """Yield the greedy answer as it grows, without any thought before it. The last text is the whole answer. `row` and
    `slot` are as in `SpeechLLM.inputs`."""
    inputs = llm.inputs([row], slot).to(llm.model.device)
    streamer = TextIteratorStreamer(llm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = {**GREEDY, "max_new_tokens": most_tokens, "pad_token_id": llm.tokenizer.pad_token_id}
    with ThreadPoolExecutor(1) as worker:
        job = worker.submit(llm.model.generate, **inputs, **settings, streamer=streamer)
        job.add_done_callback(lambda _: streamer.end())  # also after an error
        text = ""
        for piece in streamer:
            text += piece
            yield without_thought(text)
        yield read_answers(llm.tokenizer, job.result()[:, inputs["input_ids"].shape[1] :].tolist())[0]
