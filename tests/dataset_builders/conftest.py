"""Responders for tests in which the words of the answers do not matter."""

import json

import pytest

from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, Draw, load_pool
from dataset_builders.responders.exchange import Reply
from dataset_builders.responders.local import Responder


class Backwards(Responder):
    """Answers with the words of the transcript in reverse order, as a sentence."""

    engine = "none"

    def __init__(self):
        self.identity = {"model": "backwards", "revision": "1", "template": "none"}
        self.settings, self.max_new_tokens, self.asked = {}, 225, []

    def respond(self, requests):
        self.asked.extend(requests)
        return [Reply(" ".join(request.transcript.split()[::-1]) + ".") for request in requests]


class Scripted(Backwards):
    """Answers with the replies of a list, one after the other, and then with reversed transcripts."""

    def __init__(self, replies):
        super().__init__()
        self.replies = list(replies)

    def respond(self, requests):
        usual = super().respond(requests)
        return [self.replies.pop(0) if self.replies else reply for reply in usual]


@pytest.fixture
def backwards():
    return Backwards()


@pytest.fixture
def scripted():
    """Return a function that makes responders which answer with the replies of a list."""
    return Scripted


@pytest.fixture
def both():
    """Return a draw that gives each utterance one self-powered task and its transcription."""
    return Draw(load_pool(), {**dict.fromkeys(SELF_POWERED_TASKS, 1.0), TRANSCRIPTION: float("inf")}, 2)


@pytest.fixture
def manifest(tmp_path, corpus_dir):
    """Return `manifest(texts)`, which writes a JSONL manifest with a clip for each text, or with the given lines."""
    from datasets import Audio, load_dataset

    clips = load_dataset("parquet", data_files=str(corpus_dir / "train.parquet"), split="train")
    clip = clips.cast_column("audio", Audio(decode=False))[0]["audio"]["bytes"]

    def write(texts, name="speech.jsonl"):
        lines = []
        for index, text in enumerate(texts):
            (tmp_path / f"{index}.wav").write_bytes(clip)
            whole = isinstance(text, bytes)
            lines.append(text.decode() if whole else json.dumps({"audio": f"{index}.wav", "text": text}))
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    return write
