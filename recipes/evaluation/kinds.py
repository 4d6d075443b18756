"""The kinds of question: how references are spelt, what may be answered, which answer is right, and which figures tell.

All that depends on the kind of a question is its entry in `KINDS`.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dataset_builders.corpora.transcripts import bare_words
from dataset_builders.instructions import TRANSCRIPTION
from recipes.evaluation import metrics
from recipes.evaluation.constraints import Constraint, draw_constraint, satisfied
from recipes.evaluation.metrics import Metric, mean
from recipes.evaluation.parsing import parse_choice, parse_label, parse_list, parse_yes_no
from recipes.evaluation.rows import Question

LETTERS = string.ascii_uppercase
SAID = {"yes": "yes", "true": "yes", "1": "yes", "no": "no", "false": "no", "0": "no"}


class NoReferenceError(ValueError):
    """A row that says nothing of the right answer, or names one that is no label."""


# References, as the answers are read: from the texts of a row's columns, and the choices by their names


def as_labels(texts: Sequence[str], choices: Mapping[str, str]) -> list[str]:
    """As the labels are spelt, if there are labels."""
    labels = {label.casefold(): label for label in choices.values()}
    return _spell(texts, labels, f"is no label; expected one of {list(labels.values())}.") if labels else list(texts)


def as_yes_no(texts: Sequence[str], choices: Mapping[str, str]) -> list[str]:
    """As `yes` or `no`, from those, true and false, or 1 and 0."""
    return _spell(texts, SAID, f"says neither yes nor no; expected one of {list(SAID)}.")


def as_letters(texts: Sequence[str], choices: Mapping[str, str]) -> list[str]:
    """As letters, A for the first choice, from names, texts or numbers from 0; a name means more than a number."""
    known: dict[str, str] = {}
    for names in (map(str.casefold, choices), map(str, range(len(choices))), choices.values(), choices):
        known |= zip(names, LETTERS, strict=False)
    return _spell(texts, known, f"is no option; expected the name, text or number of one of {dict(choices)}.")


def _spell(texts: Sequence[str], known: Mapping[str, str], trouble: str) -> list[str]:
    """What is known by these texts; raises `NoReferenceError` for one by which nothing is."""
    if other := next((text for text in texts if text not in known and text.casefold() not in known), None):
        raise NoReferenceError(f"{other!r} {trouble}")
    return [known[text if text in known else text.casefold()] for text in texts]


# The kinds

Figures = Callable[[Sequence[Question], Sequence[str]], dict[str, Metric]]
NEEDS_REFERENCE: dict[str, tuple[str, ...]] = {"a `reference`, or `oracle` and `task`": ("reference", "oracle")}


def _is_reference(question: Question, response: str) -> bool:
    return bare_words(response) in map(bare_words, question.references)


@dataclass(frozen=True)
class Kind:
    """How the answers to a kind of question are read and scored."""

    figures: Figures  # those of the field, by their names in `metrics.FIGURES`
    is_right: Callable[[Question, str], bool] = _is_reference  # as strictly as the kind allows; references are known
    read: Callable[[Question, str], str | None] | None = None  # what a response says to a closed question, if one thing
    choices: Callable[[Question], Sequence[str]] | None = None  # all that `read` may say
    # A row's references as `read` says them, from texts of its columns and from the choices by their names.
    spell: Callable[[Sequence[str], Mapping[str, str]], list[str]] = as_labels
    # What a task must have: a name for it, and the keys of which one says it.
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: NEEDS_REFERENCE)
    pool_tasks: tuple[str, ...] = ()  # tasks of the instruction pool that are scored so; all others are by `oracle`
    separator: str | None = None  # between the references in an oracle's answer
    # From an utterance's id and a seed: an instruction that stands in for a prompt, and what it demands.
    draw: Callable[[str, int], tuple[str, Constraint]] | None = None


def _closed(read: Callable, choices: Callable, needs: dict[str, tuple[str, ...]], **more) -> Kind:
    """A kind whose answers are among a few."""

    def figures(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, Metric]:
        gold = [question.references[0] for question in questions]
        said = [read(*pair) for pair in zip(questions, responses, strict=True)]
        return {
            "accuracy": metrics.accuracy(gold, said),
            "macro_f1": metrics.macro_f1(gold, said),
            "unparsed": mean([label is None for label in said]),
        }

    def is_right(question: Question, response: str) -> bool:
        return read(question, response) in question.references

    return Kind(figures, is_right, read, choices, needs=NEEDS_REFERENCE | needs, **more)


def _error_rate(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, Metric]:
    references, language = [question.references[0] for question in questions], questions[0].language
    return dict([metrics.error_rate(references, responses, language)])


def _translation(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, Metric]:
    asked = [question.references for question in questions], responses, questions[0].target_language
    return {"bleu": metrics.bleu(*asked), "chrf": metrics.chrf(*asked)}


def _keywords(questions: Sequence[Question], responses: Sequence[str]) -> dict[str, Metric]:
    said = [parse_list(response) or [] for response in responses]
    return {"f1": metrics.set_f1([question.references for question in questions], said)}


def _has_keywords(question: Question, response: str) -> bool:
    return set(map(str.casefold, parse_list(response) or ())) == set(map(str.casefold, question.references))


def _is_transcript(question: Question, response: str) -> bool:
    return len({metrics.normalize_text(text, question.language) for text in (question.references[0], response)}) == 1


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
    "oracle": Kind(lambda *_: {}, needs={"`oracle` and `task`": ("oracle",)}),
}
POOL_KINDS = {task: name for name, kind in KINDS.items() for task in kind.pool_tasks}


def is_right(question: Question, response: str) -> bool | None:
    """Whether an answer is right; None if nobody knows what is."""
    if question.right:  # no matter how tolerantly figures read the answer
        return bare_words(response) in map(bare_words, question.right)
    if not (question.references or question.constraint):
        return None
    return KINDS[question.kind].is_right(question, response)


def allowed_answers(question: Question) -> list[str] | None:
    """The only answers that a constrained model may give; None for an open question."""
    choices = KINDS[question.kind].choices
    return [question.answer.format(choice) for choice in choices(question)] if choices else None
