"""What the right answers to a question are, from the columns of a corpus or from an oracle.

A column is named as it is, by a dotted path (`answer_spans.answer`), or within a template (`{action} {object}`).
"""

import importlib
import re
import reprlib
import string
from collections.abc import Iterator, Mapping, Sequence

from recipes.evaluation.tasks import COLUMN, POOL_KINDS, Task

LETTERS = string.ascii_uppercase


def answers(task: Task, utterance: dict, line: dict) -> dict:
    """`references`, `right`, `labels` and `answer` of a row."""
    if task.kind == "constraints":
        return {"references": [], "right": [], "labels": [], "answer": task.answer}
    if task.oracle is not None and not task.reference:
        return from_oracle(task.oracle, task.task, utterance["transcript"])
    if not task.reference:
        if not utterance["transcript"]:
            raise NoReferenceError("nobody knows what is said; name the column with --data NAME.columns.transcript.")
        return {"references": [utterance["transcript"]], "right": [], "labels": [], "answer": task.answer}
    found, labels = references(task.reference, line), list(task.labels)
    if task.kind == "yes_no":
        found = as_yes_no(found)
    elif task.choices is not None:
        choices = options(line, task.choices)
        found, labels = as_letters(found, choices), list(choices.values())
    elif labels not in ([], [COLUMN]):
        found = as_labels(found, labels)
    return {"references": found, "right": [], "labels": labels, "answer": task.answer}


def fillings(task: Task, line: dict) -> dict[str, str]:
    """What stands in the slots of a prompt."""
    slots = {slot: " ".join(references([column], line)) for slot, column in task.slots.items()}
    if task.choices is not None:
        texts = options(line, task.choices).values()
        slots["choices"] = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
    return slots


def look_up(line: dict, path: str) -> list:
    """The values of a column, lists flattened; `answer_spans.answer` looks into dicts and lists of them.

    Raises:
        KeyError: there is no such column.
    """
    values = [line]
    for key in [path] if path in line else path.split("."):
        values = [value[key] for value in _flat(values)]
    return list(_flat(values))


def _flat(values: list) -> Iterator:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def fill(template: str, line: dict) -> list[str]:
    """The texts of a column, or of a template such as `{action} {object}` over columns; empty ones are left out.

    Raises:
        KeyError: there is no such column.
    """
    if "{" not in template:
        texts = [as_text(value) for value in look_up(line, template)]
    else:

        def join(match: re.Match) -> str:
            return " ".join(as_text(value) for value in look_up(line, match[1]))

        texts = [re.sub(r"\{([^{}]+)\}", join, template)]
    return list(dict.fromkeys(filter(None, (" ".join(text.split()) for text in texts))))


def as_text(value: object) -> str:
    """How a value of a column is written in a prompt or a reference; nothing for None."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


class NoReferenceError(ValueError):
    """A row that says nothing of the right answer, or names one that is no label."""


def references(columns: Sequence[str], line: dict) -> list[str]:
    """The right answers of a row, from columns and templates as in `fill`; none twice.

    Raises:
        ValueError: there is no such column; names those there are.
        NoReferenceError: all are empty.
    """
    try:
        found = [text for column in columns for text in fill(column, line)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no column {' or '.join(map(repr, columns))}; there are {sorted(line)}.") from error
    if not found:
        raise NoReferenceError(f"nothing stands in {' or '.join(map(repr, columns))}; expected a text.")
    return list(dict.fromkeys(found))


def as_labels(found: Sequence[str], labels: Sequence[str]) -> list[str]:
    """References spelt as the labels are; raises `NoReferenceError` for one that is none of them."""
    by_name = {label.casefold(): label for label in labels}
    if other := next((text for text in found if text.casefold() not in by_name), None):
        raise NoReferenceError(f"{other!r} is no label; expected one of {list(labels)}.")
    return [by_name[text.casefold()] for text in found]


def as_yes_no(found: Sequence[str]) -> list[str]:
    """References as `yes` or `no`; raises `NoReferenceError` for any other than those, true and false, 1 and 0."""
    said = {"yes": "yes", "true": "yes", "1": "yes", "no": "no", "false": "no", "0": "no"}
    if other := next((text for text in found if text.casefold() not in said), None):
        raise NoReferenceError(f"{other!r} says neither yes nor no; expected one of {list(said)}.")
    return [said[text.casefold()] for text in found]


def options(line: dict, column: str) -> dict[str, str]:
    """The options of a question by their names: a list of texts (A, B and so on), or `{"text", "label"}` of lists.

    Raises:
        ValueError: there is no such column, or fewer than two options in it.
    """
    if column not in line:
        raise ValueError(f"no column {column!r} with options; there are {sorted(line)}.")
    value = line[column]
    texts = value.get("text") if isinstance(value, dict) else value
    if not isinstance(texts, list | tuple) or not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"{column!r} is {reprlib.repr(value)}; expected a list of two options or more.")
    names = value.get("label") if isinstance(value, dict) else None
    return dict(zip(map(str, names or LETTERS), map(as_text, texts), strict=False))


def as_letters(found: Sequence[str], choices: Mapping[str, str]) -> list[str]:
    """References as letters, A for the first of `options`, from names, texts or numbers from 0; or NoReferenceError."""
    known = dict(zip(map(str, range(len(choices))), LETTERS, strict=False))
    known |= dict(zip(choices.values(), LETTERS, strict=False))
    known |= dict(zip(choices, LETTERS, strict=False))  # a name means more than a number
    if other := next((text for text in found if text not in known), None):
        raise NoReferenceError(f"{other!r} is no option; expected the name, text or number of one of {dict(choices)}.")
    return [known[text] for text in found]


def from_oracle(oracle: str | None, task: str, transcript: str) -> dict:
    """How answers to a task of the instruction pool are scored: `kind`, `references`, `right`, `labels` and `answer`.

    Args:
        oracle: module with `answers(task, transcript)`, the canonical answer first; it may have `FORMS`, what stands
            around the answers to closed questions (`{"intent": "The intent is {}."}`), and `labels(task)`, what they
            can be. None if nobody knows what is right but of transcriptions.
        task: of the pool.
        transcript: what is said.

    Raises:
        ValueError: the module has no `answers`, or the transcript is not of its language.
    """
    kind = POOL_KINDS.get(task, "oracle")
    asked = {"kind": kind, "references": [], "right": [], "labels": [], "answer": "{}"}
    if kind == "transcription":
        return asked | {"references": [transcript]}
    if oracle is None:
        return asked
    module = importlib.import_module(oracle)
    if not hasattr(module, "answers"):
        raise ValueError(f"{oracle} has no answers(task, transcript); name a module that has.")
    right = module.answers(task, transcript)
    asked["right"] = right
    form = getattr(module, "FORMS", {}).get(task)
    if form is None:
        return asked | {"references": right}
    before, after = form.split("{}")
    bare = right[0].removeprefix(before).removesuffix(after)
    if kind == "keywords":
        return asked | {"references": bare.split(", ")}
    return asked | {"references": [bare], "labels": module.labels(task), "answer": form}
