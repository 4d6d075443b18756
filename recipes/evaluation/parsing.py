"""Tolerant readers of free answers: which label, choice or list an LLM's answer names.

Each returns None for an answer that says nothing, or more than one thing. None is wrong wherever it is scored: a
reader that guesses would credit an answer that hedges.
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from itertools import pairwise

MAX_ITEM_WORDS = 8  # a longer item is a sentence

_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot be|less|instead of|without|than)"
    r"(?: (?:a|an|the|be|being|been|very|really|quite|clearly|exactly|necessarily|particularly|at all|so|that|any))*$"
)
_PAIRS = {"yes": "no", "true": "false", "correct": "incorrect"}
_SAYS = dict.fromkeys([*_PAIRS, "yeah", "yep"], "yes") | dict.fromkeys([*_PAIRS.values(), "nope"], "no")
_BULLET = re.compile(r"^\s*(?:[-*•–]|\(?\d{1,2}[.):])\s+(.*)$")
_LIST_HEADER = re.compile(  # "Keywords:", "The main keywords of the speech are", "Here is a list of the key words:"
    r"^[^,;:\n]{0,60}?\b(?:key[- ]?(?:words?|phrases?|terms?)|words|terms|topics|tags|list|answer)\b"
    r"[^,;:\n]{0,60}?(?::|\b(?:are|is|include)\b:?)\s*",
    re.IGNORECASE,
)


def parse_label(
    response: str, labels: Sequence[str], synonyms: Mapping[str, Sequence[str]] | None = None
) -> str | None:
    """The one of `labels` that the response names, in whole words; case, punctuation and underscores do not count.

    A label within a longer one is not named by it, nor is one that is denied ("not positive"). Where several are named,
    the one after the last "answer" or "label" counts, or else the one that is said with "is", if it is one.

    Args:
        synonyms: other names of a label, such as `{"joy": ["happy", "happiness"]}`.

    Raises:
        ValueError: no labels, one without a letter or digit, two with the same name, or synonyms of what is no label.
    """
    if not labels:
        raise ValueError("no labels to look for; expected one or more")
    if unknown := sorted(set(synonyms or {}) - set(labels)):
        raise ValueError(f"{unknown[0]!r} has synonyms but is no label; the labels are {list(labels)}")
    names: dict[str, str] = {}
    for label in labels:
        for name in (label, *(synonyms or {}).get(label, ())):
            if names.setdefault(_words(name), label) != label:
                raise ValueError(f"{name!r} names both {names[_words(name)]!r} and {label!r}; expected one label")
    if "" in names:
        raise ValueError(f"the label {names['']!r} has a name without letters or digits, so no answer can have it")
    return _named(_words(response), names)


def parse_yes_no(response: str) -> str | None:
    """`yes` or `no`: the first word if it is one of yes, no, true, false, correct and incorrect, or else what the
    response says once or in agreement ("It is not true", "I would say no."). English."""
    said = re.sub(r"(?i)\bno (doubt|question|idea)\b", "", re.sub(r"[*_`\"]", "", response))  # no answers
    for yes, no in _PAIRS.items():  # the question again, or an answer that is both
        said = re.sub(rf"(?i)\b{yes}\b\W+((or|and)\W+)?{no}\b", "", said)
    text, says = _words(said), "|".join(_SAYS)
    lead = re.sub(r"^((the|my|a|final|correct|right|short) )*(answer|response)\b( would be| is)?", "", text).strip()
    lead = re.sub(r"^((well|so|okay|ok) )*((it|that|this) (is|was|s) )?", "", lead)
    if match := re.match(rf"(not )?({says})\b", lead):
        return _flip(_SAYS[match[2]], bool(match[1]))
    if told := re.findall(rf"\b(?:answer|response)(?: is| would be)? ({says})\b", text):
        return _only({_SAYS[word] for word in told})
    predicates = re.findall(rf"\b(?:is|s|was|are|be|seems|sounds)( not)?(?: \w+ly)? ({says})\b", text)
    answers = {_flip(_SAYS[word], bool(no)) for no, word in predicates if word != "no"}  # "there is no rain"
    # A "no" before another word is its article; one that ends a clause is an answer.
    answers |= {_SAYS[word.lower()] for word in re.findall(r"(?i)\b(yes|no)\b\s*(?=[.,;:!]|$)", said)}
    return _only(answers)


def parse_choice(response: str, options: Sequence[str]) -> str | None:
    """The letter of the option that the response chooses: `A` is `options[0]`. By its letter ("(B)", "B.", "b) the
    cat", "The answer is B") or by the text of one option alone. The article "a" is no choice.

    Raises ValueError for no options, or more than 26.
    """
    if not 1 <= len(options) <= 26:
        raise ValueError(f"got {len(options)} options; expected 1 to 26, one letter each")
    letters = string.ascii_uppercase[: len(options)]
    if chosen := _letters(re.sub(r"[*_`\"“”]|\$?\\boxed|[{}$]", "", response).strip(), letters, options):
        return _only(chosen)
    names: dict[str, str | None] = {}
    for letter, option in zip(letters, options, strict=True):
        names[_words(option)] = None if _words(option) in names else letter  # two options alike name neither
    return _named(_words(response), {name: letter for name, letter in names.items() if name and letter})


def parse_list(response: str) -> list[str] | None:
    """The items of an answer that lists keywords: a JSON list, lines with bullets or numbers, or words between commas
    and the like, perhaps after "Keywords:" or "The keywords are". Quotes, full stops and markup go.

    None for an answer without items, or with an item of more than `MAX_ITEM_WORDS` words: that is prose.
    """
    text = re.sub(r"^```\w*\n?|```$", "", response.strip()).strip()
    if (items := _json_list(text)) is None:
        text = _LIST_HEADER.sub("", re.sub(r"\*\*|__", "", text), count=1).strip()
        items = _json_list(text)
    if items is None:
        lines = [match[1] for line in text.splitlines() if (match := _BULLET.match(line))]
        items = [re.split(r":\s|\s[–—-]\s", line)[0] for line in lines] if len(lines) > 1 else _split(text)
    items = [item for item in map(_bare, items) if item]
    return items if items and all(len(item.split()) <= MAX_ITEM_WORDS for item in items) else None


def _words(text: str) -> str:
    """Lower-case words with single spaces between; "isn't" is "is not"."""
    text = re.sub(r"n['’]t\b", " not", text.casefold().replace("can't", "can not"))
    return re.sub(r"[\W_]+", " ", text).strip()


def _named(text: str, names: Mapping[str, str]) -> str | None:
    """The value of the one name in `text`, both as `_words` writes them."""
    if not names or text in names:
        return names.get(text)
    longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    asserted: list[tuple[int, str]] = []  # place and value
    denied, end = False, 0
    for match in re.finditer(rf"(?<!\S)(?:{longest_first})(?!\S)", text):
        between = text[end : match.start()].strip()
        joined = denied and between in ("or", "nor", "and")  # "not this or that"
        denied = joined or bool(_NEGATION.search(between))
        if not denied:
            asserted.append((match.start(), names[match[0]]))
        end = match.end()
    values = {value for _, value in asserted}
    return values.pop() if len(values) == 1 else _cued(text, asserted, names)


def _cued(text: str, asserted: Sequence[tuple[int, str]], names: Mapping[str, str]) -> str | None:
    """Which of several values the words before it single out."""
    inside = " ".join(names).split()  # a word of a label is no cue

    def after(cue: str) -> list[set[str]]:
        places = [match.start() for match in re.finditer(rf"\b{cue}\b", text)] if cue not in inside else []
        spans = pairwise([*places, len(text)])
        values = [{value for place, value in asserted if start < place < end} for start, end in spans]
        return [value for value in values if value]

    for cue in ("answer", "label"):
        if parts := after(cue):
            return _only(parts[-1])
    parts = after("is")
    return _only(set().union(*(part for part in parts if len(part) == 1))) if parts and len(parts[-1]) == 1 else None


def _letters(text: str, letters: str, options: Sequence[str]) -> set[str]:
    """The letters that a response without markup chooses, by the clearest way in which it chooses any."""
    either = f"[{letters}{letters.lower()}]"
    if match := re.fullmatch(rf"[(\[]?({either})[)\].:]*", text):
        return {match[1].upper()}
    one = rf"\(?\b[{letters}]\b\)?"
    more = rf"\s*(?:\b(?:or|and)\b|[&/])\s*{one}|\s*,\s*(?:or |and )?{one}(?=\s*(?:[,.&/]|or\b|and\b|$))"
    denials = rf"(?i:\bnot|n['’]t|\bthan|\binstead of)\s+(?i:option )?{one}|{one} (?:is|are) (?:not|wrong|incorrect)\b"
    text = re.sub(f"{one}(?:{more})+|{denials}", "", text)  # "A or B", "not C"
    told = re.findall(
        r"(?i:\banswer(?: is)?\s*:?\s*(?:option |choice )?)"
        rf"(?:[(\[]({either})[)\]]|([{letters}])(?!['’\w])|({either})(?=\s*(?:[).:]|$)))",
        text,
    )
    if told:
        return {"".join(groups).upper() for groups in told}
    listed = [letter for letter, option in zip(letters, options, strict=True) if _lists(text, letter, option)]
    leading = re.match(rf"(?:(?i:option|choice)\s+)?(?:[(\[]?({either})[)\]]|([{letters}])(?:[.:,]|\s+[-–—:]|$))", text)
    if leading and len(listed) < 2:  # else it says all the options again
        return {(leading[1] or leading[2]).upper()}
    # A capital A before another word is its article; I is the speaker.
    text = re.sub(r"(?:^|(?<=[.!?]\s))A(?=\s+\w)|\bI\b", "", text)
    mentions = rf"\(({either})\)|(?i:\b(?:option|choice)\s+)({either})\b|(?<!['’\w])([{letters}])(?!['’\w])"
    return {"".join(groups).upper() for groups in re.findall(mentions, text)}


def _only(values: set[str]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None


def _flip(answer: str, negated: bool) -> str:
    return {"yes": "no", "no": "yes"}[answer] if negated else answer


def _lists(text: str, letter: str, option: str) -> bool:
    """Whether the letter stands before its option's text, as where the options are listed."""
    return bool(re.search(rf"(?i)(?<!\w){letter}[).:\]]\s*{re.escape(option)}", text))


def _json_list(text: str) -> list[str] | None:
    """The items of a JSON list, perhaps the only value of an object; None for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if isinstance(value, dict) and len(value) == 1:
        value = next(iter(value.values()))
    return [str(item) for item in value] if isinstance(value, list) else None


def _split(text: str) -> list[str]:
    """The items of one paragraph, the first."""
    text = re.split(r"\n\s*\n", text)[0].strip(" []")
    if re.match(r"\(?1[.)]\s", text):  # numbers on one line
        return re.split(r"(?:^|[\s,;])\(?\d{1,2}[.)]\s+", text)
    items = re.split(r"\s*[,;\n|·•、，；،]\s*|\s+/\s+|\s+(?=#)", text)
    last = items.pop()
    if match := re.match(r"(?:and|&)\s+(.*)", last):
        return [*items, match[1]]
    return items + re.split(r"\s+(?:and|&)\s+(?!.*\s(?:and|&)\s)", last)


def _bare(item: str) -> str:
    return re.sub(r"^[-–]\s", "", item.strip()).strip("\"'“”‘’«»„*_`.!#[]()• ").strip()
