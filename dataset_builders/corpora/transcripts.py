"""Transcripts as an LLM would rather read them: what each corpus's own conventions become.

An LLM answers "ARE YOU HURT SHE ASKED" or "yes <COMMA> sir <PERIOD>" worse than plain text. The rules change marks and
case alone, never a word, and are named in the set's card.

| rule | for | does |
|---|---|---|
| `plain` | any corpus | joins white space |
| `librispeech` | LibriSpeech | text in capitals only: lower case, "I" and the first letter excepted |
| `common_voice` | Common Voice | takes quotation marks off that wrap the whole sentence, as its TSV files have them |
| `gigaspeech` | GigaSpeech | `<COMMA>` and its like become marks; then as LibriSpeech; "" where noise is tagged |
"""

import re
import unicodedata
from collections.abc import Callable

_PRONOUN = re.compile(r"(?<!\w['’])\bi\b(?!\.\w)")  # "i", "i'm"; not "i.e", "hawai'i"
_MARKS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
_SPACE_BEFORE_MARK = re.compile(r"\s+([,.?!。，？！])")
_NO_SPEECH = re.compile(r"<(SIL|MUSIC|NOISE|OTHER)>")
_QUOTES = (('"', '"'), ("“", "”"), ("„", "“"), ("«", "»"))


def plain(text: str) -> str:
    """One space between words, none around."""
    return " ".join(text.split())


def bare_words(text: str) -> str:
    """Lower case, no punctuation, single spaces; accents stay. For comparing texts, not for showing them."""
    kept = (" " if unicodedata.category(char)[0] in "PSZC" else char for char in unicodedata.normalize("NFC", text))
    return " ".join("".join(kept).lower().split())


def sentence_case(text: str) -> str:
    """Text in capitals only becomes lower case, with a capital at the start and after `.?!`, and "I"; names stay lower.

    Any other text is returned as it is.
    """
    if not text.isupper():
        return text
    text = _PRONOUN.sub("I", text.lower())
    return re.sub(r"(^|[.?!]\s+)(\W*)(\w)", lambda match: match[1] + match[2] + match[3].upper(), text)


def common_voice(text: str) -> str:
    """`"He said ""no""."` → `He said "no".`: quotes that wrap the whole sentence go, doubled ones inside become one."""
    text = plain(text)
    for opening, closing in _QUOTES:
        inside = text[1:-1]
        if len(text) > 2 and text[0] == opening and text[-1] == closing and opening not in inside.replace('""', ""):
            return common_voice(inside.replace('""', '"'))
    return text


def gigaspeech(text: str) -> str:
    """`YES <COMMA> SIR <PERIOD>` → `Yes, sir.`; `<MUSIC>` and other clips with tagged noise → "". Unknown tags stay."""
    if _NO_SPEECH.search(text):
        return ""
    for tag, mark in _MARKS.items():
        text = text.replace(tag, mark)
    return sentence_case(_SPACE_BEFORE_MARK.sub(r"\1", plain(text)))


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "plain": plain,
    "librispeech": lambda text: sentence_case(plain(text)),
    "common_voice": common_voice,
    "gigaspeech": gigaspeech,
}
