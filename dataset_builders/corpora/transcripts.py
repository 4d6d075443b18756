"""Rules that turn the transcripts of each corpus into ordinary text.

An LLM answers "ARE YOU HURT SHE ASKED" or "yes <COMMA> sir <PERIOD>" worse than ordinary text. The rules change only
punctuation and case, never a word. The card of the set names the rule.

| rule | for | does |
|---|---|---|
| `plain` | any corpus | puts one space between words |
| `librispeech` | LibriSpeech | changes text in capitals to lower case, except "I" and the first letter |
| `common_voice` | Common Voice | removes quotation marks around a whole sentence, which its TSV files add |
| `gigaspeech` | GigaSpeech | `<COMMA>` and the like become punctuation, then as LibriSpeech; noise becomes "" |
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
    """Put one space between words and remove it around the text."""
    return " ".join(text.split())


def bare_words(text: str) -> str:
    """Change to lower case, remove punctuation, and put one space between words. For comparing texts; keeps accents."""
    kept = (" " if unicodedata.category(char)[0] in "PSZC" else char for char in unicodedata.normalize("NFC", text))
    return " ".join("".join(kept).lower().split())


def sentence_case(text: str) -> str:
    """Change a text in capitals to lower case, except for "I" and the letters at the start and after `.?!`.

    Names become lower case, too. Any other text is returned unchanged.
    """
    if not text.isupper():
        return text
    text = _PRONOUN.sub("I", text.lower())
    return re.sub(r"(^|[.?!]\s+)(\W*)(\w)", lambda match: match[1] + match[2] + match[3].upper(), text)


def common_voice(text: str) -> str:
    """`"He said ""no""."` → `He said "no".`: remove quotes around the whole sentence, and halve doubled ones inside."""
    text = plain(text)
    for opening, closing in _QUOTES:
        inside = text[1:-1]
        if len(text) > 2 and text[0] == opening and text[-1] == closing and opening not in inside.replace('""', ""):
            return common_voice(inside.replace('""', '"'))
    return text


def gigaspeech(text: str) -> str:
    """`YES <COMMA> SIR <PERIOD>` → `Yes, sir.`; text with `<MUSIC>` or another tag of noise → "". Unknown tags stay."""
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
