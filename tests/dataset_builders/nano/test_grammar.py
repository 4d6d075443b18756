"""The nano language: sentences can be drawn and parsed, and each belongs to one split."""

import itertools
import random
from collections import Counter

import pytest

from dataset_builders.nano.grammar import SPLITS, Sentence, lexicon, sample_sentence, split_of

SPOKEN = "the farmer proudly repaired the old clock in the attic"
FUNCTION_WORDS = {"the", "in", "at", "on", "before", "after"}


def sample(count, split="train", seed=0):
    rng = random.Random(seed)
    return [sample_sentence(rng, split) for _ in range(count)]


def test_a_few_hundred_words():
    words = lexicon().words
    assert 300 <= len(words) <= 1000
    assert words == sorted(set(words))
    assert set(words) >= FUNCTION_WORDS


def test_no_word_stands_in_two_slots():
    """So each word of a transcript has one meaning, and transcripts can be parsed word by word."""
    lex = lexicon()
    slots = [lex.subjects, lex.verbs, lex.objects, lex.adjectives, lex.adverbs]
    slots = [set(slot) for slot in slots] + [{word for phrase in lex.circumstances for word in phrase.split()}]
    for one, other in itertools.combinations(slots, 2):
        assert not one & other
    for slot in slots[:-1]:
        assert not slot & FUNCTION_WORDS


def test_a_circumstance_holds_its_keyword_and_no_two_share_one():
    entries = lexicon().circumstances.items()
    for phrase, (keyword, _) in entries:
        assert set(phrase.split()) - FUNCTION_WORDS == {keyword}
    assert len({keyword for _, (keyword, _) in entries}) == len(entries)


def test_a_sentence_has_what_the_tasks_ask_for():
    sentence = Sentence.parse(SPOKEN)
    assert sentence == Sentence("farmer", "repaired", "clock", "in the attic", adjective="old", adverb="proudly")
    assert (sentence.intent, sentence.sentiment) == ("repair", "positive")
    assert sentence.keywords == ("farmer", "clock", "attic")


@pytest.mark.parametrize("split", SPLITS)
def test_every_sampled_sentence_parses_back(split):
    for sentence in sample(300, split):
        assert Sentence.parse(str(sentence)) == sentence
        assert sentence.intent == lexicon().objects[sentence.object][2]
        assert set(str(sentence).split()) <= set(lexicon().words)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the the",
        "ask not what your country can do for you",
        "farmer repaired the clock today",
        "the farmer repaired the clock",  # when or where?
        "the farmer the clock today",
        "the repaired the clock today",
        "the farmer repaired the today",
        "the farmer repaired the spaceship today",
        "the farmer repaired the clock old today",
        "the farmer repaired the clock today today",
        "the farmer proudly sadly repaired the clock today",
        "today the farmer repaired the clock",
        "The farmer repaired the clock today.",
        SPOKEN + " and",
    ],
)
def test_other_text_is_refused_and_the_form_is_told(text):
    with pytest.raises(ValueError, match=r"not a sentence of the nano language.*SUBJECT \[ADVERB\] VERB"):
        Sentence.parse(text)


def test_the_text_alone_decides_the_split():
    """The splits must not change, because otherwise a published corpus and a new one would share sentences between
    splits."""
    drawn = {split: {str(sentence) for sentence in sample(200, split)} for split in SPLITS}
    for split, texts in drawn.items():
        assert {split_of(text) for text in texts} == {split}
    assert split_of(SPOKEN) == "train"
    assert split_of("the scientist slowly sent the box before breakfast") == "validation"
    assert split_of("the journalist photographed the big garden in the prison") == "test"


def test_splits_are_large_enough_to_draw_from():
    shares = Counter(split_of(f"sentence {n}") for n in range(4000))
    assert {split: round(count / 4000, 2) for split, count in shares.items()} == pytest.approx(
        {"train": 0.85, "validation": 0.05, "test": 0.10}, abs=0.015
    )


def test_no_sentiment_and_no_intent_is_the_safe_guess():
    sentences = sample(3000)
    for values in (lambda s: s.sentiment, lambda s: s.intent):
        counts = Counter(map(values, sentences))
        even = len(sentences) / len(counts)
        assert all(abs(count - even) < 0.15 * even for count in counts.values()), counts


def test_the_rng_decides():
    assert sample(20, seed=3) == sample(20, seed=3)
    assert sample(20, seed=3) != sample(20, seed=4)


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'dev'.*'validation'"):
        sample_sentence(random.Random(0), "dev")
