"""A self-powered set to train on, and checkpoints of every kind that can be asked about speech."""

import io
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
from peers import write_audio_flamingo, write_qwen2_audio

from dataset_builders.building import build
from dataset_builders.corpora.opening import open_corpus
from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, Draw, load_pool
from dataset_builders.nano.tasks import POOL_PATH
from dataset_builders.responders.exchange import Reply
from dataset_builders.responders.local import LocalResponder
from recipes.listening.speech_llm import load


@pytest.fixture(scope="session")
def set_dir(lsm_dir, corpus_dir, tmp_path_factory):
    """Eight answers and eight transcriptions; the random LLM's own words would be none, so it says something short."""
    responder, weights = LocalResponder(lsm_dir), {**dict.fromkeys(SELF_POWERED_TASKS, 1.0), TRANSCRIPTION: math.inf}
    responder.respond = lambda requests: [Reply(f"So {request.transcript[:12].strip()}.") for request in requests]
    output = tmp_path_factory.mktemp("sets") / "self_powered"
    return build(open_corpus(corpus_dir, "train"), responder, output, Draw(load_pool(POOL_PATH), weights, 2))


@pytest.fixture
def rows(set_dir):
    """The set's rows with their audio undecoded, as the recipes read them."""
    from datasets import Audio, load_dataset

    dataset = load_dataset(str(set_dir), "all", split="train")
    return dataset.cast_column("audio", Audio(16_000, decode=False)).to_list()


@pytest.fixture(scope="session")
def checkpoints(lsm_dir, llm_dir, tmp_path_factory) -> dict[str, Path]:
    """Folders of an LSM, of the text LLM in it and of two other speech LLMs."""
    folder = tmp_path_factory.mktemp("peers")
    peers = {"qwen2_audio": write_qwen2_audio, "audioflamingo3": write_audio_flamingo}
    return {"lsm": lsm_dir, "text": llm_dir} | {name: write(folder / name) for name, write in peers.items()}


@pytest.fixture(scope="session")
def open_llm(checkpoints):
    """`open_llm(name)` is one of `checkpoints`, opened once: do not change it for good."""
    return cache(lambda name: load(checkpoints[name]))


@pytest.fixture
def spoken() -> list[dict]:
    """Four rows, the longest first, that differ in all they have."""

    def wav(seconds: float, seed: int) -> dict:
        file = io.BytesIO()
        soundfile.write(file, np.random.default_rng(seed).normal(0, 0.1, int(16_000 * seconds)), 16_000, format="WAV")
        return {"bytes": file.getvalue(), "path": f"{seed}.wav"}

    return [
        {"id": "0", "audio": wav(2.9, 0), "instruction": "Repeat it.", "transcript": "what is said and asked and more"},
        {"id": "1", "audio": wav(0.4, 1), "instruction": "Which words are heard?", "transcript": "no"},
        {"id": "2", "audio": wav(1.7, 2), "instruction": "Go on", "transcript": "the speech says"},
        {"id": "3", "audio": wav(1.1, 3), "instruction": "Is it so?", "transcript": "so it is"},
    ]


@pytest.fixture
def answered(spoken) -> list[dict]:
    """The same rows with responses of different lengths."""
    responses = ["It is asked.", "Nobody says what is said, or so it is said.", "what", "Yes and no."]
    return [row | {"response": response} for row, response in zip(spoken, responses, strict=True)]
