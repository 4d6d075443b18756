"""The right answers to each task about sentences of the nano language.

`answers(task, transcript)` lists all right answers; the nano LLM learns the first one. `is_correct(task, transcript,
response)` accepts only these, so the transcript itself and answers to other tasks or sentences are wrong. `repetition`
asks for the sentence in another form, so the transcript itself is wrong there, too. These answers train the base LLM
and check responses; they are never used as self-powered responses.
"""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

from dataset_builders.corpora.transcripts import bare_words
from dataset_builders.nano.grammar import Sentence, lexicon

POOL_PATH = Path(__file__).with_name("instructions.yaml")  # the instructions of each task
# No training row of an LSM has these tasks. `spanish_who` asks for an answer in Spanish, and `numbered` for a list.
UNSEEN_TASKS = ("question_who", "question_what", "question_circumstance", "question_deed", "spanish_who", "numbered")

# Sentences around the answers to closed questions.
FORMS = {"intent": "The intent is {}.", "sentiment": "The sentiment is {}.", "keyword": "Keywords: {}."}


def labels(task: str) -> list[str]:
    """Return the possible answers to a closed question; an empty list for an open one."""
    return {"intent": list(lexicon().sequels), "sentiment": ["positive", "negative", "neutral"]}.get(task, [])


def answers(task: str, transcript: str) -> list[str]:
    """Return all right answers to `task` about `transcript`, as sentences; the nano LLM learns the first one.

    Raises:
        ValueError: the task is unknown, or the transcript is not a sentence of the nano language.
    """
    if task not in _ANSWERS:
        raise ValueError(f"unknown task {task!r}; expected one of {sorted(_ANSWERS)}.")
    return _ANSWERS[task](Sentence.parse(transcript))


def is_correct(task: str, transcript: str, response: str) -> bool:
    """Return whether `response` is one of the right answers, apart from case and punctuation."""
    return bare_words(response) in {bare_words(answer) for answer in answers(task, transcript)}


def _capitalized(*parts: str | None) -> str:
    text = " ".join(part for part in parts if part)
    return text[0].upper() + text[1:] + "."


def _continuation(s: Sentence) -> list[str]:
    return [sequel.format(subject=s.subject, object=s.object) for sequel in lexicon().sequels[s.intent]]


def _repetition(s: Sentence) -> list[str]:
    participle = lexicon().verbs[s.verb][0]
    passive = ["the", s.adjective, s.object, "was", s.adverb, participle, "by the", s.subject]
    return [_capitalized(*passive, s.circumstance), _capitalized(s.circumstance, *passive)]


def _keyword(s: Sentence) -> list[str]:
    return [FORMS["keyword"].format(", ".join(order)) for order in permutations(s.keywords)]


def _translation(s: Sentence) -> list[str]:
    lex = lexicon()
    subject, subject_gender = lex.subjects[s.subject]
    thing, gender, _ = lex.objects[s.object]
    article = {"m": "el", "f": "la"}
    adjective = lex.adjectives[s.adjective][0 if gender == "m" else 1] if s.adjective else None
    adverb = lex.adverbs[s.adverb][0] if s.adverb else None
    verb, circumstance = lex.verbs[s.verb][1], lex.circumstances[s.circumstance][1]
    parts = [article[subject_gender], subject, verb, adverb, article[gender], thing, adjective, circumstance]
    return [_capitalized(*parts)]


def _reply(s: Sentence) -> list[str]:
    passive, turned = _repetition(s)
    return [f"So {restated[0].lower()}{restated[1:]}" for restated in (passive, turned)]


def _spanish_who(s: Sentence) -> list[str]:
    spanish, gender = lexicon().subjects[s.subject]
    return [_capitalized("el" if gender == "m" else "la", spanish)]


def _numbered(s: Sentence) -> list[str]:
    return [f"1. {a}, 2. {b}, 3. {c}." for a, b, c in permutations(s.keywords)]


def _question_what(s: Sentence) -> list[str]:
    return [_capitalized("the", s.object), _capitalized("the", s.adjective, s.object)]


_ANSWERS: dict[str, Callable[[Sentence], list[str]]] = {
    "continuation": _continuation,
    "repetition": _repetition,
    "keyword": _keyword,
    "intent": lambda s: [FORMS["intent"].format(s.intent)],
    "sentiment": lambda s: [FORMS["sentiment"].format(s.sentiment)],
    "translation": _translation,
    "transcription": lambda s: [str(s)],
    "reply": _reply,
    "question_who": lambda s: [_capitalized("the", s.subject)],
    "question_what": _question_what,
    "question_circumstance": lambda s: [_capitalized(s.circumstance)],
    "question_deed": lambda s: [_capitalized(s.verb, "the", s.object)],
    "spanish_who": _spanish_who,
    "numbered": _numbered,
}
