"""A self-powered set to train on."""

import math

import pytest

from dataset_builders.asr_corpora import open_corpus
from dataset_builders.building import build
from dataset_builders.exchange import Reply
from dataset_builders.instructions import SELF_POWERED_TASKS, TRANSCRIPTION, Draw, load_pool
from dataset_builders.responders import LocalResponder


@pytest.fixture(scope="session")
def set_dir(lsm_dir, corpus_dir, tmp_path_factory):
    """Eight answers and eight transcriptions; the random LLM's own words would be none, so it says something short."""
    responder, weights = LocalResponder(lsm_dir), {**dict.fromkeys(SELF_POWERED_TASKS, 1.0), TRANSCRIPTION: math.inf}
    responder.respond = lambda requests: [Reply(f"So {request.transcript[:12].strip()}.") for request in requests]
    output = tmp_path_factory.mktemp("sets") / "self_powered"
    return build(open_corpus(corpus_dir, "train"), responder, output, Draw(load_pool(), weights, 2))


@pytest.fixture
def rows(set_dir):
    """The set's rows with their audio undecoded, as the recipes read them."""
    from datasets import Audio, load_dataset

    dataset = load_dataset(str(set_dir), "all", split="train")
    return dataset.cast_column("audio", Audio(16_000, decode=False)).to_list()
