"""The kinds of question. Everything that depends on the kind of a question is in `KINDS`: how references are spelt,
which answers are possible and which are right, and the figures.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dataset_builders.corpora.transcripts import bare_words
from dataset_builders.instructions import TRANSCRIPTION
from recipes.evaluation import metrics
from recipes.evaluation.constraints import Constraint, draw_constraint, satisfied
from recipes.evaluation.ifeval import listed_constraints, satisfied_of
from recipes.evaluation.metrics import Metric, mean
from recipes.evaluation.parsing import (
    is_refusal,
    parse_choice,
    parse_count,
    parse_label,
    parse_list,
    parse_rating,
    parse_yes_no,
)
from recipes.evaluation.rows import NoReferenceError, Question

LETTERS = string.ascii_uppercase
CLOSED = (("yes", "no"), ("valid", "invalid"), ("A", "B"))  # sets of short answers
YES_NO = {"yes": "yes", "true": "yes", "1": "yes", "no": "no", "false": "no", "0": "no"}


# References in the spelling of the answers, from the texts in the columns of a row and the choices by name


def as_labels(texts: Sequence[str], choices: Mapping[str, str]) -> list[str]:
    """Return the texts in the spelling of the labels, or unchanged if there are no labels."""
    labels = {label.casefold(): label for label in choices.values()}
    return _spell(texts, labels, f"is not a label; expected one of {list(labels.values())}.") if labels else list(texts)


def as_yes_no(texts: Sequence[str], choices: Mapping[str, str]) -> list[str]:
    """Return `yes` or `no` for texts that are yes or no, true or false, or 1 or 0."""
    return _spell(texts, YES_NO, f"means neither yes nor no; expected one of {list(YES_NO)}.")


def as_letters(texts: Sequence[str], choices: Mapping[str, str]) -> list[str]:
    """Return the letters of choices (A is the first) from their names, texts or numbers (from 0). If a number is also
    the name of a choice, it is read as the name."""
    letters: dict[str, str] = {}
    for names in (map(str.casefold, choices), map(str, range(len(choices))), choices.values(), choices):
        letters |= zip(names, LETTERS, strict=False)
    return _spell(texts, letters, f"is not an option; expected the name, text or number of one of {dict(choices)}.")


def as_short_answers(texts: Sequence[str], choices: Mapping[str, str]) -> list[str]:
    """Return an answer of one of the sets in `CLOSED`, or the digits of a whole number; `(A)` is A."""
    spelt = {name.casefold(): name for names in CLOSED for name in names}
    bare = [text.strip("()").casefold() for text in texts]
    known = spelt | {text: str(int(text)) for text in bare if text.isdecimal()}
    return _spell(bare, known, f"is no short answer; expected a whole number or one of {CLOSED}.")


def _spell(texts: Sequence[str], spellings: Mapping[str, str], problem: str) -> list[str]:
    """Return the `spellings` of the texts. Raises `NoReferenceError` for a text without a value."""
    if unknown := next((text for text in texts if text not in spellings and text.casefold() not in spellings), None):
        raise NoReferenceError(f"{unknown!r} {problem}")
    return [spellings[text if text in spellings else text.casefold()] for text in texts]


# The kinds

Figures = Callable[[Sequence[Question], Sequence[str]], dict[str, Metric]]
NEEDS_REFERENCE: dict[str, tuple[str, ...]] = {"a `reference`, or `oracle` and `task`": ("reference", "oracle")}
NEEDS_JUDGE = {"a `judge`, what the judge is asked": ("judge",)}


def _is_reference(question: Question, response: str) -> bool:
    return bare_words(response) in map(bare_words, question.references)


@dataclass(frozen=True)
class Kind:
    """How the answers to a kind of question are read and scored."""

    figures: Figures  # computes the usual figures of this kind, by their names in `metrics.FIGURES`
    # Whether one answer is right, if its references are known; None if it cannot be told.
    is_right: Callable[[Question, str], bool | None] = _is_reference
    read: Callable[[Question, str], str | None] | None = None  # reads the label in a response; only of closed questions
    choices: Callable[[Question], Sequence[str]] | None = None  # the labels that `read` can return
    # Spells a row's references as `read` does, from the texts in its columns and the choices by name.
    spell: Callable[[Sequence[str], Mapping[str, str]], list[str]] = as_labels
    # What a task must have: descriptions, with the keys of which at least one must be set.
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: NEEDS_REFERENCE)
    pool_tasks: tuple[str, ...] = ()  # tasks of the instruction pool that are of this kind; all others are `oracle`
    separator: str | None = None  # separates the references in an oracle's answer
    # Makes the references from a row's columns where the task names none, which are not needed then.
    known: Callable[[Mapping], list[str]] | None = None
    judged: bool = False  # whether an LLM judges the answers; `is_right` and `figures` read its replies in their place
    # Draws an instruction and its constraint from an utterance's id and a seed; the task needs no prompt then.
    draw: Callable[[str, int], tuple[str, Constraint]] | None = None


def _closed(read: Callable, choices: Callable, needs: dict[str, tuple[str, ...]], **more) -> Kind:
    """Return a kind of closed questions."""

    def figures(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, Metric]:
        gold = [question.references[0] for question in questions]
        labels = [read(*pair) for pair in zip(questions, responses, strict=True)]
        return {
            "accuracy": metrics.accuracy(gold, labels),
            "macro_f1": metrics.macro_f1(gold, labels),
            "unparsed": mean([label is None for label in labels]),
        }

    def is_right(question: Question, response: str) -> bool:
        return read(question, response) in question.references

    return Kind(figures, is_right, read, choices, needs=NEEDS_REFERENCE | needs, **more)


def _error_rate(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, Metric]:
    references, language = [question.references[0] for question in questions], questions[0].language
    return dict([metrics.error_rate(references, responses, language)])


def _translation(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, Metric]:
    arguments = [question.references for question in questions], responses, questions[0].target_language
    return {"bleu": metrics.bleu(*arguments), "chrf": metrics.chrf(*arguments)}


def _keywords(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, Metric]:
    keywords = [parse_list(response) or [] for response in responses]
    return {"f1": metrics.set_f1([question.references for question in questions], keywords)}


def _has_keywords(question: Question, response: str) -> bool:
    return set(map(str.casefold, parse_list(response) or ())) == set(map(str.casefold, question.references))


def _is_transcript(question: Question, response: str) -> bool:
    return len({metrics.normalize_text(text, question.language) for text in (question.references[0], response)}) == 1


def _read_short(question: Question, response: str) -> str | None:
    """Read an answer of the same set as the right one."""
    options = _short_answers(question)
    if options == CLOSED[0]:
        return parse_yes_no(response)
    if options == CLOSED[1]:
        return parse_label(response, options, {"invalid": ["not valid", "not deductively valid"]})
    return parse_choice(response, options) if options else parse_count(response)


def _short_answers(question: Question) -> Sequence[str]:
    return next((names for names in CLOSED if question.references[0] in names), ())


def _rating(questions: Sequence[Question], replies: Sequence[str]) -> dict[str, Metric]:
    return _of_judge("rating", list(map(parse_rating, replies)))


def _verdict(questions: Sequence[Question], replies: Sequence[str]) -> dict[str, Metric]:
    return _of_judge("accuracy", [_judged_right(*pair) for pair in zip(questions, replies, strict=True)])


def _of_judge(name: str, read: Sequence[float | None]) -> dict[str, Metric]:
    """Return the mean of the replies that could be read, if there are any, and the share of the others."""
    values = [value for value in read if value is not None]
    return ({name: mean(values)} if values else {}) | {"unparsed": mean([value is None for value in read])}


def _judged_right(question: Question, reply: str) -> bool | None:
    return {"yes": True, "no": False, None: None}[parse_yes_no(reply)]


def _keeps_all(speech: bool) -> Callable[[Question, str], bool]:
    return lambda question, response: all(satisfied_of(question.references, response, speech))


def _speech_ifeval(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, Metric]:
    """Return the share of answers that satisfy all constraints, as in Speech-IFEval, whose rows have one each."""
    return {"following": mean([_keeps_all(True)(*pair) for pair in zip(questions, responses, strict=True)])}


def _ifeval(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, Metric]:
    """Return IFEval's four accuracies as one, `ifeval`, as VoiceBench does: their mean over answers and over single
    constraints, strict and loose. `following` and `following_loose` are those over answers.

    In the interval, the number of constraints is that of all rows.
    """
    pairs = list(zip(questions, responses, strict=True))
    kept = {loose: [satisfied_of(row.references, text, loose=loose) for row, text in pairs] for loose in (False, True)}
    per_answer = len(pairs) / sum(len(row.references) for row in questions)
    both = zip(kept[False], kept[True], strict=True)
    return {
        "ifeval": mean([sum(all(one) + sum(one) * per_answer for one in ways) / 4 for ways in both]),
        "following": mean(list(map(all, kept[False]))),
        "following_loose": mean(list(map(all, kept[True]))),
    }


def _refusals(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, Metric]:
    return {"refusals": mean(list(map(is_refusal, responses)))}


def _keeps_to_form(question: Question, response: str) -> bool:
    return satisfied(question.constraint, response)


def _following(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, Metric]:
    return {"following": mean([_keeps_to_form(*pair) for pair in zip(questions, responses, strict=True)])}


KINDS = {
    TRANSCRIPTION: Kind(
        _error_rate, _is_transcript, needs={"a `language`": ("language",)}, pool_tasks=(TRANSCRIPTION,)
    ),
    "translation": Kind(
        _translation,
        needs=NEEDS_REFERENCE | {"a `target_language`": ("target_language",)},
        pool_tasks=("translation",),
    ),
    "classification": _closed(
        read=lambda question, response: parse_label(response, question.labels),
        choices=lambda question: question.labels,
        needs={"`labels`: a list, or `column` for those of the rows that are read": ("labels", "oracle")},
        pool_tasks=("intent", "sentiment"),
    ),
    "keywords": Kind(_keywords, _has_keywords, pool_tasks=("keyword",), separator=", "),
    "yes_no": _closed(
        read=lambda question, response: parse_yes_no(response),
        choices=lambda question: ("yes", "no"),
        needs={},
        spell=as_yes_no,
    ),
    "choice": _closed(
        read=lambda question, response: parse_choice(response, question.labels),
        choices=lambda question: LETTERS[: len(question.labels)],
        needs={"`labels`, or `choices`, a column of options": ("labels", "choices")},
        spell=as_letters,
    ),
    "extraction": Kind(
        figures=lambda questions, responses: metrics.squad([question.references for question in questions], responses),
        is_right=lambda question, response: metrics.exact_match(question.references, response),
    ),
    "constraints": Kind(_following, _keeps_to_form, needs={}, draw=draw_constraint),
    "short_answer": _closed(_read_short, _short_answers, needs={}, spell=as_short_answers),
    "ifeval": Kind(_ifeval, _keeps_all(speech=False), needs={}, known=listed_constraints),
    "speech_ifeval": Kind(_speech_ifeval, _keeps_all(speech=True), needs={}, known=listed_constraints),
    "refusal": Kind(_refusals, lambda question, response: is_refusal(response), needs={}, known=lambda line: []),
    "rating": Kind(_rating, lambda *_: None, needs=NEEDS_JUDGE, known=lambda line: [], judged=True),
    "verdict": Kind(_verdict, _judged_right, needs=NEEDS_JUDGE, known=lambda line: [], judged=True),
    "oracle": Kind(lambda *_: {}, needs={"`oracle` and `task`": ("oracle",)}),
}
POOL_KINDS = {task: name for name, kind in KINDS.items() for task in kind.pool_tasks}


def is_right(question: Question, response: str) -> bool | None:
    """Return whether an answer is right; None if the right answer is unknown. If its kind is judged, `response` is the
    judge's reply."""
    if question.right:  # the oracle's answers are compared as a whole, more strictly than in the figures
        return bare_words(response) in map(bare_words, question.right)
    if not (question.references or question.constraint or KINDS[question.kind].known):
        return None
    return KINDS[question.kind].is_right(question, response)


def allowed_answers(question: Question) -> list[str] | None:
    """Return the answers that are possible in constrained decoding; None for an open question."""
    choices = KINDS[question.kind].choices
    return [question.answer.format(choice) for choice in choices(question)] if choices else None
