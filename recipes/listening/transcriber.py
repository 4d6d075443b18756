"""A speech recogniser (Whisper or a CTC model) with the interface of a speech LLM; it ignores the instruction."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

from dataset_builders.responders.exchange import Reply
from language_models.checkpoints import leave_slow_dtype, load_config
from recipes.listening.features import load_clip
from recipes.listening.speech_llm import SpeechLLM, load

CHUNK = 30  # seconds: the length of Whisper's input, and short enough for the memory that CTC models need


class Transcriber:
    """The `automatic-speech-recognition` pipeline of transformers, for clips of any length. The dtype `"auto"` is that
    of the checkpoint."""

    def __init__(self, source: str | Path, dtype: str = "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipe = pipeline("automatic-speech-recognition", model=str(source), dtype=dtype, device=device)
        if dtype == "auto":
            leave_slow_dtype(self.pipe.model)
        if self.pipe.tokenizer.pad_token is None:  # otherwise the pipeline refuses batches
            self.pipe.tokenizer.pad_token = self.pipe.tokenizer.eos_token
        self.name = Path(source).name if Path(source).exists() else str(source)

    def respond(self, rows: Sequence[dict], slot: str = "audio", store=None, batch_size: int = 16, **_) -> list[Reply]:
        """Return the transcripts of the rows' `audio`, in order, by greedy decoding.

        A multilingual Whisper is told the rows' `language`, if they have one and the same.

        Raises:
            ValueError: `slot` is not `audio`.
        """
        if slot != "audio":
            raise ValueError(f"{self.name} recognises speech; it needs audio, but got {slot!r}.")
        rate = self.pipe.feature_extractor.sampling_rate
        clips = [{"raw": load_clip(row, rate=rate), "sampling_rate": rate} for row in rows]
        settings = {"generate_kwargs": self._decoding(rows)} if self.pipe.model.can_generate() else {}
        outputs = self.pipe(clips, batch_size=batch_size, chunk_length_s=CHUNK, **settings)
        return [Reply(output["text"].strip()) for output in outputs]

    def _decoding(self, rows: Sequence[dict]) -> dict:
        """Return arguments of `generate`. The pipeline's own, five beams and a guessed language, made Whisper base
        repeat single words, in forty times the time."""
        settings: dict = {"num_beams": 1}
        languages = {row.get("language") for row in rows}
        if getattr(self.pipe.model.generation_config, "is_multilingual", False):
            settings["task"] = "transcribe"
            if len(languages) == 1 and (language := languages.pop()):
                settings["language"] = language
        return settings


def load_recogniser(source: str | Path, dtype: str = "auto") -> Transcriber | SpeechLLM:
    """Load the first model of a cascade: a recogniser, or a speech LLM that is asked to transcribe."""
    kind = load_config(source, trust_remote_code=True).model_type
    recognises = kind in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES or kind in MODEL_FOR_CTC_MAPPING_NAMES
    return Transcriber(source, dtype) if recognises else load(source, dtype)
