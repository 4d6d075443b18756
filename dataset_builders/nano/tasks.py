"""What a right answer is, task by task, in the nano language: one oracle and one checker, shared by all.

`answers(task, transcript)` lists every right answer (the first is the canonical one, on which the nano LLM is taught);
`is_correct(task, transcript, response)` accepts those and nothing else, so the transcript itself, another task's
answer and another sentence's answer are wrong. `repetition` means restating in another form: a verbatim transcript is
never right there. The oracle teaches the base LLM and checks answers; it never writes a self-powered response.
"""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

from dataset_builders.corpora.transcripts import bare_words
from dataset_builders.nano.grammar import Sentence, lexicon

POOL_PATH = Path(__file__).with_name("instructions.yaml")  # how each task is asked for
FOLLOWING_TASKS = ("continuation", "repetition", "keyword", "intent", "sentiment", "translation")
# Kinds that no training row of an LSM has. `spanish_who` asks for an answer in another language, `numbered` for a form.
UNSEEN_TASKS = ("question_who", "question_what", "question_circumstance", "question_deed", "spanish_who", "numbered")

# How the answers to closed questions are written, around what they say.
FORMS = {"intent": "The intent is {}.", "sentiment": "The sentiment is {}.", "keyword": "Keywords: {}."}


def labels(task: str) -> list[str]:
    """What a closed question can be answered with; nothing for an open one."""
    return {"intent": list(lexicon().sequels), "sentiment": ["positive", "negative", "neutral"]}.get(task, [])


def answers(task: str, transcript: str) -> list[str]:
    """Every right answer to `task` about `transcript`, canonical first, written as a sentence.

    Raises:
        ValueError: unknown task, or a transcript outside the nano language.
    """
    if task not in _ANSWERS:
        raise ValueError(f"unknown task {task!r}; expected one of {sorted(_ANSWERS)}.")
    return _ANSWERS[task](Sentence.parse(transcript))


def is_correct(task: str, transcript: str, response: str) -> bool:
    """Whether `response` is the asked kind of answer with the right content (case and punctuation aside)."""
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
