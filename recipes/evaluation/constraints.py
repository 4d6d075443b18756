"""Instructions with a constraint on the form of the answer, which a program can check.

They measure whether a speech LLM follows instructions or merely transcribes, as do the closed-ended parts of IFEval
(arXiv 2311.07911) and Speech-IFEval (arXiv 2505.19037); the wordings here are our own. An instruction is a simple
request about the speech and one constraint, of which only the constraint is checked.

A verbatim English transcript in lower case and without punctuation always satisfies `lower_case`, `no_commas` and
`no_digits`. Because there are many other constraints, a model that only transcribes still scores low.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from dataset_builders.instructions import draw_fraction

BASE_INSTRUCTIONS = (
    "Describe what the speech is about.",
    "Say what the speaker talks about.",
    "Sum up what is said.",
    "Explain in your own way what you hear.",
    "Tell me the main point of the speech.",
    "Comment on what the speaker says.",
)

# Common function words. A word that two languages share ("la", "en", "die") counts for both.
_FUNCTION_WORDS = {
    "english": "the a an of and to in is was were are that this it he she they his her with for on at by from as about",
    "spanish": "el la los las un una de del y que en es se con por para su al lo como no está son habla sobre pero",
    "german": "der die das ein eine einen einem einer und ist nicht es er sie sich von zu mit auf für den dem des im "
    "in über dass wird hat war auch als",
    "french": "le la les un une des de du et est que qui il elle dans en au aux pour par sur pas ce cette se son sa "
    "ses avec l d qu c s",
}
_LEAST_SHARE = 0.2  # least share of function words among the words of a response

_ABBREVIATION = re.compile(r"\b(Mr|Mrs|Ms|Dr|Prof|St|e\.g|i\.e|etc|vs)\.")


@dataclass(frozen=True)
class Constraint:
    """A constraint on the form of an answer: `instruction` asks for it, and `check` returns whether a stripped,
    non-empty answer satisfies it."""

    name: str
    instruction: str
    check: Callable[[str], bool]


def draw_constraint(id: str, seed: int = 0) -> tuple[str, Constraint]:
    """Return the instruction for the utterance `id` (a request and a constraint), and the constraint to check. Both
    depend only on `seed` and `id`."""
    base = BASE_INSTRUCTIONS[int(draw_fraction(seed, "constraint base", id) * len(BASE_INSTRUCTIONS))]
    constraint = list(CONSTRAINTS.values())[int(draw_fraction(seed, "constraint", id) * len(CONSTRAINTS))]
    return f"{base} {constraint.instruction}", constraint


def satisfied(name: str, response: str) -> bool:
    """Return whether `response`, without leading and trailing white space, satisfies the constraint `name`. An empty
    response satisfies none.

    Raises:
        ValueError: `CONSTRAINTS` has no constraint of this name.
    """
    if name not in CONSTRAINTS:
        raise ValueError(f"unknown constraint {name!r}; there are {list(CONSTRAINTS)}")
    return bool(response.strip()) and CONSTRAINTS[name].check(response.strip())


def _words(text: str) -> list[str]:
    """Return the words in lower case; "don't" and "well-kept" are one word each."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.casefold())


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def count_sentences(text: str) -> int:
    """Return the number of sentences; the last one may lack its full stop."""
    bare = _ABBREVIATION.sub(r"\1", text)
    return sum(bool(_words(piece)) for piece in re.split(r"[.!?…]+[\"'”’)\]]*(?=\s|$)", bare))


def _begins(pattern: str) -> Callable[[str], bool]:
    return lambda text: bool(re.match(pattern, text))


def _is_answer_object(text: str) -> bool:
    """Return whether the text is a JSON object with the single key "answer", possibly in a code fence."""
    try:
        value = json.loads(re.sub(r"^```(?:json)?\s*\n|\n\s*```$", "", text))
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == ["answer"]


def _is_numbered(text: str) -> bool:
    return [line[:3] for line in _lines(text)] == ["1. ", "2. ", "3. "]


def _is_bulleted(text: str) -> bool:
    return [line[:2] for line in _lines(text)] == ["- "] * 3


def _language(name: str) -> Callable[[str], bool]:
    """Return a check of an answer's language: at least two words, and a fifth of all words, are function words of this
    language, and fewer are function words of any other language listed here.

    Answers of one or two words usually fail, and answers in a related language that is not listed (Portuguese, Dutch)
    can pass. The check is only meant to tell the language from English.
    """
    function_words = {language: set(words.split()) for language, words in _FUNCTION_WORDS.items()}

    def check(text: str) -> bool:
        words = re.findall(r"[^\W\d_]+", text.casefold())
        hits = {language: sum(word in listed for word in words) for language, listed in function_words.items()}
        others = max(count for language, count in hits.items() if language != name)
        return hits[name] >= max(2, _LEAST_SHARE * len(words)) and hits[name] > others

    return check


_ALL = (
    Constraint("upper_case", "Write your whole answer in capital letters.", str.isupper),
    Constraint("lower_case", "Write your whole answer in lower case, without any capital letter.", str.islower),
    Constraint("at_most_words", "Use at most ten words.", lambda text: 1 <= len(_words(text)) <= 10),
    Constraint("at_least_words", "Use at least fifty words.", lambda text: len(_words(text)) >= 50),
    Constraint("exactly_sentences", "Answer in exactly two sentences.", lambda text: count_sentences(text) == 2),
    Constraint("bullets", 'Answer in exactly three lines, each of which begins with "- ".', _is_bulleted),
    Constraint("numbered_list", "Answer with a list of exactly three points, numbered 1., 2. and 3.", _is_numbered),
    Constraint("json", 'Answer with a JSON object that has the single key "answer".', _is_answer_object),
    Constraint(
        "include_words",
        'Use both of the words "perhaps" and "listener" in your answer.',
        lambda text: {"perhaps", "listener"} <= set(_words(text)),
    ),
    Constraint("no_commas", "Do not use any comma.", lambda text: not re.search("[,，、]", text)),
    Constraint("forbid_word", 'Do not use the word "the".', lambda text: "the" not in _words(text)),
    Constraint("starts_with", 'Begin your answer with the words "In short".', _begins(r"In short\b")),
    Constraint(
        "ends_with",
        'End your answer with the sentence "That is all." and nothing after it.',
        lambda text: bool(re.search(r"(^|\s)That is all\.$", text)),
    ),
    Constraint("quoted", "Put your whole answer between double quotation marks.", _begins(r'("[^"]+"|“[^“”]+”)\Z')),
    Constraint(
        "title",
        "Give your answer a title in double angle brackets, such as <<Title>>, on a line of its own before it.",
        _begins(r"<<[^<>\n]*\w[^<>\n]*>>\s*\n\s*\S"),
    ),
    Constraint("language_spanish", "Answer in Spanish.", _language("spanish")),
    Constraint("language_german", "Answer in German.", _language("german")),
    Constraint("language_french", "Answer in French.", _language("french")),
    Constraint("no_digits", "Do not use any digit.", lambda text: not re.search(r"\d", text)),
    Constraint(
        "no_repeated_words",
        "Do not use any word more than once.",
        lambda text: bool(_words(text)) and len(set(_words(text))) == len(_words(text)),
    ),
    Constraint(
        "postscript",
        'After your answer, add a postscript that begins with "P.S." on a line of its own.',
        lambda text: bool(re.search(r"\S\s*\n\s*P\.S\.:?\s*\w[^\n]*$", text)),
    ),
)
CONSTRAINTS: dict[str, Constraint] = {constraint.name: constraint for constraint in _ALL}
