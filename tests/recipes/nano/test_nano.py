"""The trainings of the nano models, and, marked `nano`, the quality of the models in `assets/nano`."""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperModel

from dataset_builders.instructions import load_pool
from dataset_builders.nano.grammar import lexicon, sample_sentence, split_of
from dataset_builders.nano.tasks import POOL_PATH, is_correct
from modeling_lsm import LsmAudioTower
from recipes.nano import train_encoder, train_llm
from recipes.nano.train_encoder import labels_of, read_words, spec_augment, trainable_tower
from recipes.nano.train_llm import decisive_words, filler_words, sample_example, train_tokenizer, user_turn, vary

ASSETS = Path(__file__).parents[3] / "assets" / "nano"
POOL = load_pool(POOL_PATH)


# The LLM


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(POOL, seed=0)


def test_every_spoken_word_is_one_token_and_all_text_comes_back(tokenizer):
    """Copying a word is then one step, which a model of 2 M parameters can learn."""
    assert len(tokenizer) < 2048  # one embedding is left for the placeholder
    assert {len(tokenizer(f" {word}").input_ids) for word in lexicon().words} == {1}
    for text in ("El bailarín pintó la lámpara.", "unheard-of words, 你好", "Keywords: farmer, clock, attic."):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_an_example_is_right_and_of_its_split_and_wording():
    rng = random.Random(0)
    examples = [sample_example(rng, POOL, "test", "held_out") for _ in range(200)]
    assert {example["task"] for example in examples} == set(POOL)
    for example in examples:
        assert split_of(example["transcript"]) == "test"
        assert example["instruction"] in POOL[example["task"]].held_out
        assert is_correct(example["task"], example["transcript"], example["response"])


def test_labels_are_the_response_and_its_end_alone(tokenizer):
    rng = random.Random(0)
    examples = [sample_example(rng, POOL, "train", "seen") for _ in range(4)]
    batch = train_llm.collate(examples, tokenizer)
    for example, ids, labels in zip(examples, batch["input_ids"], batch["labels"], strict=True):
        learned = labels != -100
        assert tokenizer.decode(labels[learned]) == example["response"] + "<|end|>"
        prompt = tokenizer.apply_chat_template(user_turn(example), tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids[: int(learned.nonzero()[0])]) == prompt
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_another_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="knows the roles user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be kind."}], tokenize=False)


def test_a_prompt_is_laid_out_as_an_lsm_lays_it_out():
    example = {"instruction": "Say it.", "transcript": "the king slept", "instruction_first": True}
    assert user_turn(example)[0]["content"] == "Say it.\nthe king slept"
    assert user_turn(example | {"instruction_first": False})[0]["content"] == "the king slept\nSay it."
    assert user_turn(example | {"instruction": ""})[0]["content"] == "the king slept"


def test_every_line_has_a_word_that_distinguishes_its_task():
    decisive = decisive_words(POOL)
    assert "spanish" in decisive["translation"] & decisive["spanish_who"] and "sentiment" in decisive["sentiment"]
    for name, task in POOL.items():
        for line in filter(None, task.seen + task.held_out):
            assert decisive[name] & set(train_llm.bare_words(line).split()), line


def test_a_varied_wording_keeps_what_decides_its_task_and_gets_nothing_of_another():
    rng, decisive, fillers = random.Random(0), decisive_words(POOL), filler_words(POOL)
    assert not set(fillers) & set().union(*decisive.values())
    for task in POOL:
        for line in filter(None, POOL[task].seen):
            spoken = set(train_llm.bare_words(line).split())
            variants = [vary(line, decisive[task], fillers, rng) for _ in range(20)]
            varied = [set(train_llm.bare_words(text).split()) for text in variants]
            assert all(words and spoken & decisive[task] <= words <= spoken | set(fillers) for words in varied)
            assert any(words < spoken for words in varied)
    assert vary("", set(), fillers, rng) == ""


# The encoder


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return trainable_tower(argparse.Namespace(hidden_size=16, layers=1, heads=2))


@pytest.fixture
def clips():
    """Return random features in the format of `featurize`."""
    rng, words = np.random.default_rng(0), random.Random(0)
    lengths = (81, 40, 120)
    return [
        (rng.normal(size=(length, 80)).astype(np.float16), str(sample_sentence(words, "train"))) for length in lengths
    ]


def load_recognizer(folder):
    """Load a saved encoder and its CTC head, which only these tests read."""
    model, weights = WhisperModel.from_pretrained(folder), load_file(folder / train_encoder.HEAD_FILE)
    encoder, head = LsmAudioTower(model.config), torch.nn.Linear(*reversed(weights["weight"].shape))
    encoder.load_state_dict(model.encoder.state_dict())
    head.load_state_dict(weights)
    return encoder.eval(), head


def logits_of(labels, size):
    return torch.nn.functional.one_hot(torch.tensor([labels]), size).float()


def test_greedy_decoding_merges_repeats_drops_blanks_and_stops_at_the_clips_end():
    words = lexicon().words
    the, lamp, sold = (words.index(word) + 1 for word in ("the", "lamp", "sold"))
    frames = [0, the, the, 0, the, sold, 0, lamp, lamp, 0, sold]
    logits = logits_of(frames, len(words) + 1)
    assert read_words(logits, torch.tensor([10])) == ["the the sold lamp"]
    assert read_words(logits, torch.tensor([1])) == [""]


def test_labels_are_one_based_words_that_decoding_gives_back():
    words = lexicon().words
    texts = ["the farmer sold the lamp yesterday", "the king slept"]
    with pytest.raises(KeyError, match="slept"):
        labels_of(texts, words, str.split)
    texts[1] = "the king"
    labels, lengths = labels_of(texts, words, str.split)
    assert lengths.tolist() == [6, 2]
    assert min(labels) >= 1
    spelled = [unit for label in labels[:6].tolist() for unit in (label, 0)]
    assert read_words(logits_of(spelled, len(words) + 1), torch.tensor([12])) == texts[:1]


def test_the_loss_is_that_of_the_right_words():
    words, mask = lexicon().words, torch.ones(1, 24, dtype=torch.long)
    labels, lengths = labels_of(["the king lost the key today"], words, str.split)
    frames = [unit for label in labels.tolist() for unit in (label, 0)]
    logits = 20 * logits_of(frames, len(words) + 1)
    assert train_encoder.ctc_loss(logits, mask, labels, lengths) < 1e-3
    assert train_encoder.ctc_loss(logits.roll(1, dims=-1), mask, labels, lengths) > 1


def test_a_batch_is_padded_with_zeros_under_its_mask(clips):
    features, mask = train_encoder.collate(clips)
    assert features.shape == (3, 80, 120)
    assert mask.sum(-1).tolist() == [81, 40, 120]
    assert train_encoder.encoded_lengths(mask).tolist() == [41, 20, 60]
    for (clip, _), padded, real in zip(clips, features, mask.bool(), strict=True):
        np.testing.assert_array_equal(padded[:, real].T, clip)
        assert not padded[:, ~real].any()


def test_spec_augment_blanks_little_and_as_its_generator_says():
    def augment(seed):
        return spec_augment(torch.ones(20, 80, 200), torch.Generator().manual_seed(seed))

    kept = augment(0)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    bands, stretches = (~kept.any(dim=2)).sum(dim=1), (~kept.any(dim=1)).sum(dim=1)
    assert bands.max() <= 2 * 15 and stretches.max() <= 2 * 20
    assert bands.any() and stretches.any()
    assert torch.equal(augment(0), kept)
    assert not torch.equal(augment(1), kept)


def test_batches_are_of_similar_length_within_the_budget_and_miss_no_clip():
    clips = [(np.zeros((length, 80), np.float16), str(length)) for length in range(1, 101)]
    stream = train_encoder.batches(clips, 300, torch.Generator().manual_seed(0))
    seen = []
    while len(seen) < len(clips):
        batch = [len(features) for features, _ in next(stream)]
        assert len(batch) * max(batch) <= 300
        seen += batch
    assert sorted(seen) == list(range(1, 101))


def test_the_trainable_tower_gets_gradients(tower, clips):
    tower.train()
    hidden = tower(*train_encoder.collate(clips)).last_hidden_state
    hidden[..., 0].sum().backward()
    assert tower.training
    assert tower.conv1.weight.grad.abs().max() > 1e-3


def test_a_saved_encoder_gives_the_same_output(tower, clips, tmp_path):
    head = torch.nn.Linear(16, 1 + len(lexicon().words))
    train_encoder.save(tower, head, tmp_path)
    encoder, loaded = load_recognizer(tmp_path)
    tower.eval()
    with torch.no_grad():
        expected = head(tower(*train_encoder.collate(clips)).last_hidden_state)
        torch.testing.assert_close(loaded(encoder(*train_encoder.collate(clips)).last_hidden_state), expected)
    assert not any(parameter.requires_grad for parameter in encoder.train().parameters())


# The models in assets/nano


@pytest.mark.nano
def test_the_shipped_llm_follows_unseen_wordings_about_unseen_sentences():
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "llm")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "llm")
    shares = train_llm.evaluate(model, tokenizer, POOL, rows=840, seed=2)
    assert set(shares) == set(POOL)
    assert min(shares.values()) >= 0.98, shares


@pytest.mark.nano
def test_the_shipped_encoder_understands_unseen_sentences_in_unheard_voices():
    encoder, head = load_recognizer(ASSETS / "encoder")
    clips = train_encoder.featurize("test", 2, range(150))
    assert train_encoder.word_error_rate(encoder, head, clips) <= 0.08


@pytest.mark.nano
def test_the_shipped_models_are_small_and_have_their_settings():
    assert sum(file.stat().st_size for file in ASSETS.rglob("*.safetensors")) <= 40 * 2**20
    for part in ("encoder", "llm"):
        assert "seed" in json.loads((ASSETS / part / "training.json").read_text())["settings"]
