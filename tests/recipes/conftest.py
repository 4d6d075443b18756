"""A self-powered set to train on."""

import pytest

from dataset_builders.responders import LocalResponder
from dataset_builders.self_powered import build


@pytest.fixture(scope="session")
def set_dir(lsm_dir, corpus_dir, tmp_path_factory):
    """Eight answers and eight transcriptions; the random LLM's own words would be none, so it says something short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LocalResponder, "respond", lambda self, requests: [f"so {said[:12]}".strip() for _, said in requests]
        )
        return build(lsm_dir, corpus_dir, "train", tmp_path_factory.mktemp("sets") / "self_powered")


@pytest.fixture
def rows(set_dir):
    """The set's rows with their audio undecoded, as the recipes read them."""
    from datasets import Audio, load_dataset

    dataset = load_dataset(str(set_dir), "all", split="train")
    return dataset.cast_column("audio", Audio(16_000, decode=False)).to_list()
