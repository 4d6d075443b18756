"""Check the form of an answer, for corpora without an oracle. These rules cannot tell whether the content is right.

A copy of the transcript only has the form of a transcription.
"""

import re

from recipes.evaluation.following import is_copy
from recipes.evaluation.parsing import parse_label, parse_list

SENTIMENTS = ("positive", "negative", "neutral")
MOST_KEYWORDS, MOST_WORDS_OF_ONE = 15, 4
LONGEST_INTENT = 30  # words
ARTICLES = {"a", "an", "the"}  # no keywords, and in most transcripts


def is_correct(task: str, transcript: str, response: str) -> bool | None:
    """Return whether `response` has the form of an answer to `task`; None if the form is unknown, as for all tasks but
    the self-powered ones and transcription."""
    if task not in _FORMS:
        return None
    if not response.strip():
        return False
    copied = is_copy(transcript, response)
    return copied if task == "transcription" else not copied and _FORMS[task](transcript, response)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _shares_words(transcript: str, response: str) -> bool:
    """Return whether the response has a third of the transcript's longer words; the others may be inflected."""
    content = {word for word in _words(transcript) if len(word) > 3}
    return not content or len(content & _words(response)) >= len(content) / 3


def _is_keyword_list(transcript: str, response: str) -> bool:
    items = parse_list(response) or []
    short = all(len(item.split()) <= MOST_WORDS_OF_ONE for item in items)
    content = _words(transcript) - ARTICLES
    return 0 < len(items) <= MOST_KEYWORDS and short and any(_words(item) & content for item in items)


_FORMS = {
    "continuation": lambda transcript, response: not response.lower().startswith(transcript.lower()),
    "repetition": _shares_words,
    "keyword": _is_keyword_list,
    "intent": lambda _, response: len(response.split()) <= LONGEST_INTENT,
    "sentiment": lambda _, response: parse_label(response, SENTIMENTS) is not None,
    "translation": lambda transcript, response: len(_words(transcript) & _words(response)) <= len(_words(response)) / 3,
    "transcription": lambda *_: True,
}
