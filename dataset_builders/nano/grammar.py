"""The nano language: a grammar over a few hundred English words, whose sentences can be spoken, parsed and checked.

An example is `the farmer proudly repaired the old clock in the attic`. Each slot has its own words, so the meaning of a
transcript is unambiguous. The words are in `lexicon.yaml`.
"""

import dataclasses
import functools
import random
from pathlib import Path

from dataset_builders.files import read_yaml
from dataset_builders.instructions import draw_fraction

LEXICON_PATH = Path(__file__).with_name("lexicon.yaml")
SPLITS = ("train", "validation", "test")
# Shares of all possible sentences. The text of a sentence decides its split, so no two splits share a sentence.
_VALIDATION_SHARE, _TEST_SHARE = 0.05, 0.10


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """The words of each slot. English words map to what the tasks need: gender, Spanish, intent, sentiment."""

    subjects: dict[str, tuple[str, str]]  # word: (spanish, gender)
    verbs: dict[str, tuple[str, str, str]]  # past: (participle, spanish, intent)
    objects: dict[str, tuple[str, str, str]]  # word: (spanish, gender, intent)
    sequels: dict[str, tuple[str, ...]]  # intent: templates of what may happen next
    adjectives: dict[str, tuple[str, str]]  # word: (masculine, feminine)
    adverbs: dict[str, tuple[str, str]]  # word: (spanish, sentiment)
    circumstances: dict[str, tuple[str, str]]  # phrase: (keyword, spanish)

    @property
    def words(self) -> list[str]:
        """All English words of the language, sorted."""
        phrases = [*self.subjects, *self.verbs, *self.objects, *self.adjectives, *self.adverbs, *self.circumstances]
        return sorted({word for phrase in ["the", *phrases] for word in phrase.split()})


@functools.cache
def lexicon() -> Lexicon:
    """Return the lexicon in `lexicon.yaml`."""
    raw = read_yaml(LEXICON_PATH)
    intents = raw["intents"].items()
    return Lexicon(
        subjects={word: tuple(entry) for word, entry in raw["subjects"].items()},
        verbs={
            past: (topic.get("participles", {}).get(past, past), spanish, intent)
            for intent, topic in intents
            for past, spanish in topic["verbs"].items()
        },
        objects={word: (*entry, intent) for intent, topic in intents for word, entry in topic["objects"].items()},
        sequels={intent: tuple(topic["sequels"]) for intent, topic in intents},
        adjectives={word: tuple(forms) for word, forms in raw["adjectives"].items()},
        adverbs={word: (es, mood) for mood, words in raw["adverbs"].items() for word, es in words.items()},
        circumstances={phrase: tuple(entry) for phrase, entry in raw["circumstances"].items()},
    )


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A sentence of the nano language. `str(sentence)` is its transcript, in lower case without punctuation."""

    subject: str
    verb: str
    object: str
    circumstance: str
    adjective: str | None = None
    adverb: str | None = None

    def __str__(self) -> str:
        parts = ["the", self.subject, self.adverb, self.verb, "the", self.adjective, self.object, self.circumstance]
        return " ".join(part for part in parts if part)

    @property
    def intent(self) -> str:
        return lexicon().verbs[self.verb][2]

    @property
    def sentiment(self) -> str:
        return lexicon().adverbs[self.adverb][1] if self.adverb else "neutral"

    @property
    def keywords(self) -> tuple[str, str, str]:
        return self.subject, self.object, lexicon().circumstances[self.circumstance][0]

    @classmethod
    def parse(cls, transcript: str) -> "Sentence":
        """Parse a transcript.

        Raises:
            ValueError: the text is not a sentence of the nano language.
        """
        words, lex = transcript.split(), lexicon()
        slots = {name: getattr(lex, f"{name}s") for name in ("subject", "verb", "object", "adjective", "adverb")}
        parts = {name: next((word for word in words if word in slot), None) for name, slot in slots.items()}
        phrases = (phrase for phrase in lex.circumstances if transcript.endswith(" " + phrase))
        sentence = cls(**parts, circumstance=next(phrases, None))
        is_complete = all((sentence.subject, sentence.verb, sentence.object, sentence.circumstance))
        if not is_complete or str(sentence) != " ".join(words):
            raise ValueError(
                f"{transcript!r} is not a sentence of the nano language; expected "
                "'the SUBJECT [ADVERB] VERB the [ADJECTIVE] OBJECT CIRCUMSTANCE' with words of lexicon.yaml."
            )
        return sentence


def split_of(transcript: str) -> str:
    """Return the split (`train`, `validation` or `test`) of a sentence, which depends only on its text."""
    fraction = draw_fraction(0, "nano split", transcript)
    if fraction < _TEST_SHARE:
        return "test"
    return "validation" if fraction < _TEST_SHARE + _VALIDATION_SHARE else "train"


def sample_sentence(rng: random.Random, split: str) -> Sentence:
    """Draw a sentence of `split`. All sentiments are about equally likely.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {SPLITS}.")
    lex = lexicon()
    while True:
        intent = rng.choice(list(lex.sequels))
        mood = rng.choice(("positive", "negative", "neutral"))
        adverbs = [word for word, (_, adverb_mood) in lex.adverbs.items() if adverb_mood == mood]
        sentence = Sentence(
            subject=rng.choice(list(lex.subjects)),
            verb=rng.choice([word for word, entry in lex.verbs.items() if entry[2] == intent]),
            object=rng.choice([word for word, entry in lex.objects.items() if entry[2] == intent]),
            circumstance=rng.choice(list(lex.circumstances)),
            adjective=rng.choice(list(lex.adjectives)) if rng.random() < 0.7 else None,
            adverb=None if mood == "neutral" and rng.random() < 0.3 else rng.choice(adverbs),
        )
        if split_of(str(sentence)) == split:
            return sentence
